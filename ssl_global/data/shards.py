"""Webdataset .tar shards: finding the images in one by reading headers only, and writing them from a folder.

A sample is the members of one name up to the first dot of its last part: an image (0007.jpg) and its label, as text
(0007.cls) or in 0007.json ({"label": 3} or {"cls": 3}). All else is passed over.

Not as Python's tarfile, which takes a damaged header for the end of the archive and is silent about the samples behind
it: here a shard is good to its end mark or it is refused. Nothing is ever extracted, and a member's name is no path:
links, devices, absolute names and names with `..` are passed over.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset.writer import TarWriter

from ssl_global.data.decode import BadImage
from ssl_global.errors import UserError, wrong

if TYPE_CHECKING:  # source.py reads shards, so it imports this file
    from ssl_global.data.source import FolderSource

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # a sample uses the first
KNOWN_SUFFIXES = frozenset((*IMAGE_SUFFIXES, ".cls", ".json"))

BLOCK = 512  # bytes: a header is one, contents are padded to whole ones
REGULAR = (b"0", b"\0", b"7")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders: nothing follows them
MAX_LABEL = 2**31 - 1  # (ours)
MAX_TEXT_BYTES = 2**20  # of a label or of an extended header (ours)
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal (ours)


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class ShardIndex:
    """The images of one shard, in its order: key, place, and label where there is one."""

    keys: list[str]
    offsets: np.ndarray  # int64 (N,), bytes from the start of the shard
    sizes: np.ndarray  # int64 (N,), bytes
    labels: list[int | None]


class Member(NamedTuple):
    name: str
    offset: int
    size: int


def index_shard(path: str) -> ShardIndex:
    """The images of a .tar. Raises UserError naming shard and byte if it is damaged or cut short, or holds no image."""
    try:
        with open(path, "rb", buffering=0) as file:
            return build_index(path, file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def build_index(path: str, file: int) -> ShardIndex:
    samples: dict[str, dict[str, Member]] = {}
    for member in read_members(path, file):
        key, suffix = split_name(member.name)
        if suffix not in KNOWN_SUFFIXES or not is_safe(member.name):
            continue
        parts = samples.setdefault(key, {})
        if suffix in parts:
            raise UserError(f"{path}: {member.name} a second time, at byte {member.offset}")
        parts[suffix] = member
    images = {key: image for key, parts in samples.items() if (image := find_image(parts))}
    if not images:
        raise UserError(f"{path}: no image in this shard (members named KEY.jpg or the like, without a further dot)")
    return ShardIndex(
        keys=list(images),
        offsets=np.array([image.offset for image in images.values()], dtype=np.int64),
        sizes=np.array([image.size for image in images.values()], dtype=np.int64),
        labels=[read_label(path, file, samples[key]) for key in images],
    )


def split_name(name: str) -> tuple[str, str]:
    """("a/b", ".seg.png") for "./a/b.seg.PNG". A hidden file has no key, and so no suffix."""
    name = name.removeprefix("./")
    start = name.rfind("/") + 1
    first_dot = name.find(".", start)
    return (name[:first_dot], name[first_dot:].lower()) if first_dot > start else (name, "")


def is_safe(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


def find_image(parts: dict[str, Member]) -> Member | None:
    return next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)


def read_members(path: str, file: int) -> Iterator[Member]:
    """The regular files of a .tar, from the headers only, checked up to its end mark."""
    end, at, long_name = os.fstat(file).st_size, 0, ""
    extended: dict[str, str] = {}  # what a pax header says of the member behind it
    if not end:
        raise UserError(f"{path}: cut short at byte 0: an empty file")
    while (header := os.pread(file, BLOCK, at)) != bytes(BLOCK):
        if len(header) < BLOCK:
            raise UserError(f"{path}: cut short at byte {end}: the end mark is missing")
        kind, size = check_header(path, header, at)
        size = 0 if kind in WITHOUT_CONTENT else int(extended.get("size", size))
        start = at + BLOCK
        if start + size > end:
            raise UserError(f"{path}: cut short at byte {end}: the member at byte {at} goes up to byte {start + size}")
        at = start + whole_blocks(size)
        if kind == b"x":
            extended = read_extended(path, file, start, size)
        elif kind == b"L":
            long_name = text(read_text(path, file, start, size).partition(b"\0")[0])
        elif kind not in (b"g", b"K"):  # global headers and long link names say nothing of the next name
            if kind in REGULAR:
                yield Member(extended.get("path") or long_name or header_name(header), start, size)
            extended, long_name = {}, ""
    check_end_mark(path, file, at, end)


def whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def check_header(path: str, header: bytes, at: int) -> tuple[bytes, int]:
    """Kind and size of the member, if the header's own sum is right."""
    try:
        stated_sum = int(header[148:156].strip(b" \0"), 8)
        size = header_size(header[124:136])
    except ValueError:
        stated_sum, size = -1, 0
    if stated_sum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise UserError(f"{path}: damaged header at byte {at}" + ("; is it a .tar file?" if at == 0 else ""))
    kind = header[156:157]
    if kind == b"S":
        raise UserError(f"{path}: sparse member at byte {at}; write the shard without --sparse")
    return kind, size


def header_size(field: bytes) -> int:
    """Octal text, or, from 8 GB on, a binary number behind a set bit."""
    size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b" \0") or b"0", 8)
    if size < 0:
        raise ValueError("negative size")
    return size


def header_name(header: bytes) -> str:
    name = text(header[:100].partition(b"\0")[0])
    prefix = text(header[345:500].partition(b"\0")[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")  # a name that is no UTF-8 must still print


def read_extended(path: str, file: int, start: int, size: int) -> dict[str, str]:
    """A pax header: records of "LENGTH NAME=VALUE\\n", the length counting all of it."""
    records, data = {}, read_text(path, file, start, size)
    try:
        while data:
            digits = data.partition(b" ")[0]
            length = int(digits)
            name, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
            if not equals or length <= len(digits):
                raise ValueError("not a record")
            records[text(name)] = text(value)
            data = data[length:]
        if int(records.get("size", 0)) < 0:
            raise ValueError("negative size")
    except ValueError as error:
        raise UserError(f"{path}: damaged extended header at byte {start}") from error
    return records


def read_text(path: str, file: int, start: int, size: int) -> bytes:
    if size > MAX_TEXT_BYTES:
        raise UserError(f"{path}: {size} bytes at byte {start} where a name or a label should be")
    return os.pread(file, size, start)


def check_end_mark(path: str, file: int, at: int, end: int) -> None:
    """A .tar ends with two blocks of zeros, and perhaps more of them, but nothing else."""
    if end - at < 2 * BLOCK:
        raise UserError(f"{path}: cut short at byte {end}: half of the end mark is missing")
    for start in range(at, end, MAX_TEXT_BYTES):
        rest = os.pread(file, MAX_TEXT_BYTES, start)
        if found := rest.lstrip(b"\0"):
            byte = start + len(rest) - len(found)
            raise UserError(f"{path}: damaged: the end mark is at byte {at}, but there is more at byte {byte}")


def read_label(path: str, file: int, parts: dict[str, Member]) -> int | None:
    """From .cls, which must hold a whole number, else from .json, which may. Below 0 means: not labelled."""
    if member := parts.get(".cls"):
        written = read_text(path, file, member.offset, member.size)
        try:
            label = int(written)
        except ValueError:
            label = MAX_LABEL + 1
        if label > MAX_LABEL:
            raise UserError(
                f"{path}: {member.name} holds {text(written[:20])!r}; a label is a whole number below 2**31"
            )
        return label if label >= 0 else None
    if (member := parts.get(".json")) and member.size <= MAX_TEXT_BYTES:
        return label_in_json(os.pread(file, member.size, member.offset))
    return None


def label_in_json(raw: bytes) -> int | None:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    label = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    return label if type(label) is int and 0 <= label <= MAX_LABEL else None  # True would be an int too


def read_classes(folder: str, labels: np.ndarray) -> list[str] | None:
    """The names in classes.json beside the shards; None if it is not there or is no list of names."""
    path = os.path.join(folder, "classes.json")
    try:
        with open(path, encoding="utf-8") as file:
            classes = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return None
    if labels.max() >= len(classes):
        raise UserError(f"{path}: names {len(classes)} classes, but the shards hold the label {labels.max()}")
    return classes


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Packed:
    """What `pack` has made."""

    shards: list[Path]
    written: int  # of them in this call; the others were whole already
    num_images: int


def pack(source: "FolderSource", out: Path, *, shard_bytes: int, progress: bool = True) -> Packed:
    """Copies a folder's images, unchanged and in their order, into OUT/FOLDER-000000.tar, ..., and classes.json.

    shard_bytes   a shard is closed before it would grow beyond this; one image that is larger gets its own

    The bytes are a function of the folder and of shard_bytes. After a stop the same call goes on with the first missing
    shard. Raises UserError if the folder or the size changed since, a file cannot be read, or OUT holds other shards.
    """
    if shard_bytes < 1:
        raise wrong("shard_bytes", shard_bytes, "at least 1; 256 MB is usual")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.root.resolve().name)
    shards = plan(source, shard_bytes)
    paths = [out / f"{name}-{number:06d}.tar" for number in range(len(shards))]
    begin_or_go_on(source, out, name, shard_bytes)
    written = 0
    with report("packed", len(source), Console(stderr=True, quiet=not progress)) as done:
        for path, images in zip(paths, shards, strict=True):
            if not path.exists():
                write_shard(path, samples_of(source, images, done))
                written += 1
            done(images.stop)
    return Packed(shards=paths, written=written, num_images=len(source))


def plan(source: "FolderSource", shard_bytes: int) -> list[range]:
    """Which images go into which shard: a function of their sizes."""
    members_beside = 0 if source.labels is None else 2 * BLOCK
    starts, filled = [0], 0
    for image, size in enumerate(source.sizes.tolist()):
        needed = BLOCK + whole_blocks(size) + members_beside
        if filled and filled + needed + 2 * BLOCK > shard_bytes:
            starts.append(image)
            filled = 0
        filled += needed
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(source)], strict=True)]


def begin_or_go_on(source: "FolderSource", out: Path, name: str, shard_bytes: int) -> None:
    """Leaves FOLDER-pack.json, by which a later run sees that it is given the same folder, and classes.json."""
    note = out / f"{name}-pack.json"
    now = {"images": source.fingerprint, "shard_bytes": shard_bytes}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if note.exists():
            refuse_change(note, now)
        elif any(out.glob(f"{name}-*.tar")):
            raise UserError(f"{out}: holds {name}-*.tar from elsewhere; give another folder for the shards")
        if source.classes:
            keep_classes(out / "classes.json", source.classes)
        write_whole(note, json.dumps(now).encode())
    except OSError as error:
        raise UserError(f"{out}: shards cannot be written there: {error.strerror}") from error


def refuse_change(note: Path, now: dict[str, object]) -> None:
    try:
        before = json.loads(note.read_bytes())
    except ValueError:
        before = {}
    if before == now:
        return
    same_images = isinstance(before, dict) and before.get("images") == now["images"]
    changed = f"shards of {before['shard_bytes']} bytes" if same_images else "other images (has the folder changed?)"
    raise UserError(f"{note}: packing was begun with {changed}; give another folder for the shards")


def keep_classes(path: Path, classes: list[str]) -> None:
    names = json.dumps(classes, ensure_ascii=False).encode(errors="backslashreplace")
    if path.exists() and path.read_bytes() != names:
        raise UserError(f"{path}: names other classes than this folder has; give another folder for the shards")
    write_whole(path, names)


def samples_of(source: "FolderSource", images: range, done: Callable[[int], None]) -> Iterator[dict[str, str | bytes]]:
    for image in images:
        try:
            data = source.read(image)
        except BadImage as error:
            raise UserError(f"{source.path}: {source.key(image)} {error}") from error
        if len(data) != source.sizes[image]:
            raise UserError(f"{source.path}: {source.key(image)} changed while it was packed")
        label = None if source.labels is None else int(source.labels[image])
        yield sample(image, data, os.path.splitext(source.key(image))[1], label)
        done(image + 1)


def sample(number: int, data: bytes, suffix: str, label: int | None) -> dict[str, str | bytes]:
    """One sample as webdataset writes it. Its key is its number: safe in any file system, and sorted as it was."""
    members: dict[str, str | bytes] = {"__key__": f"{number:09d}", suffix.lower().removeprefix("."): data}
    return members if label is None else members | {"cls": str(label).encode()}


def write_shard(path: Path, samples: Iterable[dict[str, str | bytes]]) -> None:
    """Writes a .tar that is there whole or not at all, and whose bytes depend on the samples alone."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                for each in samples:
                    tar.write(each)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def write_whole(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(data)
    unfinished.rename(path)


@contextlib.contextmanager
def report(verb: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Gives a function to be told how many images are done: a bar on a terminal, else a line now and then."""
    if not console.is_terminal:
        yield lines(verb, total, console)
        return
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda done: bar.update(task, completed=done)


def lines(verb: str, total: int, console: Console) -> Callable[[int], None]:
    last = time.monotonic()

    def print_now_and_then(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"{verb} {done} of {total} images")

    return print_now_and_then
