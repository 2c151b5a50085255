"""Webdataset .tar shards: finding the images in one by reading headers only.

A sample is the members of one name up to the first dot of its last part: an image (0007.jpg) and its label, as a whole
number in text (0007.cls or 0007.txt) or in 0007.json ({"label": 3} or {"cls": 3}). Any number of labels are several
numbers in a .cls ("3 7"), or in a .json without a .cls ({"labels": [3, 7]}, {"labels": []}). All else is passed over.

Not as Python's tarfile, which takes a damaged header for the end of the archive and is silent about the samples behind
it: here a shard is good to its end mark or it is refused. Nothing is ever extracted, and a member's name is no path:
links, devices, absolute names and names with `..` are passed over.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ssl_global.data.several import Sets
from ssl_global.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # a sample uses the first
LABEL_SUFFIXES = (".cls", ".txt", ".json")  # likewise
KNOWN_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *LABEL_SUFFIXES))

BLOCK = 512  # bytes: a header is one, contents are padded to whole ones
REGULAR = (b"0", b"\0", b"7")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders: nothing follows them
MAX_LABEL = 2**31 - 1  # (ours)
MAX_TEXT_BYTES = 2**20  # of a label or of an extended header (ours)
MAX_LABEL_DIGITS = 32  # bytes of a .txt that may be a label (ours)
NO_LABEL = -1
SEVERAL = -2  # or none of them, but said so


class Names:
    """Many strings in two arrays: ten million keys as Python's strings would take a gigabyte."""

    def __init__(self, joined: np.ndarray, ends: np.ndarray) -> None:
        self.joined = joined  # uint8, all of them in UTF-8, one behind the other
        self.ends = ends  # int64 (N,)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        raw = [name.encode() for name in names]
        ends = np.cumsum([len(name) for name in raw], dtype=np.int64)
        return cls(np.frombuffer(b"".join(raw), dtype=np.uint8), ends)

    @classmethod
    def join(cls, parts: Sequence["Names"]) -> "Names":
        starts = np.cumsum([0] + [len(part.joined) for part in parts])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.joined for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.joined[start : self.ends[index]].tobytes().decode()


class Stamp(NamedTuple):
    """By which a changed file is known."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class ShardIndex:
    """The images of one shard, in its order: key, place, and label where there is one."""

    keys: Names
    offsets: np.ndarray  # int64 (N,), bytes from the start of the shard
    sizes: np.ndarray  # int64 (N,), bytes
    labels: np.ndarray  # int64 (N,), NO_LABEL where there is none, SEVERAL where it is in `sets`
    stamp: Stamp  # of the file that was read
    sets: Sets = field(default_factory=lambda: Sets.of([]))  # of all images, if any has SEVERAL; else of none

    def all_sets(self) -> Sets:
        return self.sets if len(self.sets) else Sets.of(map(as_set, self.labels.tolist()))

    def digest(self) -> str:
        """Of keys and sizes: the same for a copy of the shard, another for other samples."""
        whole = hashlib.sha256(self.keys.joined.tobytes())
        for numbers in (self.keys.ends, self.sizes):
            whole.update(numbers.astype("<i8").tobytes())
        return whole.hexdigest()[:16]


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


def stamp_of(file: int | str) -> Stamp:
    status = os.stat(file)
    return Stamp(status.st_size, status.st_mtime_ns)


def build_index(path: str, file: int) -> ShardIndex:
    stamp = stamp_of(file)
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
    said = [read_label(path, file, samples[key]) for key in images]
    index = ShardIndex(
        keys=Names.of(images),
        offsets=np.array([image.offset for image in images.values()], dtype=np.int64),
        sizes=np.array([image.size for image in images.values()], dtype=np.int64),
        labels=np.array([x if isinstance(x, int) else SEVERAL for x in said], dtype=np.int64),
        stamp=stamp,
        sets=Sets.of([] if all(isinstance(x, int) for x in said) else map(as_set, said)),
    )
    if stamp_of(file) != stamp:
        raise UserError(f"{path}: changed while it was read")
    return index


def as_set(label: int | list[int]) -> list[int]:
    return label if isinstance(label, list) else [label] if label >= 0 else []


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


def read_label(path: str, file: int, parts: dict[str, Member]) -> int | list[int]:
    """From .cls, which must hold whole numbers, else from .txt or .json, which may. Below 0 means: not labelled."""
    if member := parts.get(".cls"):
        written = read_text(path, file, member.offset, member.size)
        if several := whole_numbers(written):
            return several
        label = whole_number(written)
        if label is None or label > MAX_LABEL:
            raise UserError(
                f"{path}: {member.name} holds {text(written[:20])!r}; a label is a whole number below 2**31"
            )
        return max(label, NO_LABEL)
    if (member := parts.get(".txt")) and member.size <= MAX_LABEL_DIGITS:  # a longer text is a caption
        label = whole_number(os.pread(file, member.size, member.offset))
        if label is not None and 0 <= label <= MAX_LABEL:
            return label
    if (member := parts.get(".json")) and member.size <= MAX_TEXT_BYTES:
        written = os.pread(file, member.size, member.offset)
        labels = labels_in_json(written)
        return label_in_json(written) if labels is None else labels
    return NO_LABEL


def whole_numbers(written: bytes) -> list[int]:
    """Two labels or more; [] if it holds anything else."""
    found = [whole_number(word) for word in written.split()]
    labels = [label for label in found if label is not None and 0 <= label <= MAX_LABEL]
    return labels if len(labels) == len(found) > 1 else []


def whole_number(written: bytes) -> int | None:
    try:
        return int(written)
    except ValueError:
        return None


def labels_in_json(raw: bytes) -> list[int] | None:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    labels = fields.get("labels") if isinstance(fields, dict) else None
    right = isinstance(labels, list) and all(type(label) is int and 0 <= label <= MAX_LABEL for label in labels)
    return labels if right else None


def label_in_json(raw: bytes) -> int:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return NO_LABEL
    label = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    return label if type(label) is int and 0 <= label <= MAX_LABEL else NO_LABEL  # True would be an int too


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
    if len(labels) and labels.max() >= len(classes):
        raise UserError(f"{path}: names {len(classes)} classes, but the shards hold the label {labels.max()}")
    return classes
