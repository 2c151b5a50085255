"""Webdataset .tar shards: where each sample lies in them, and how they are written.

A sample is the members of one name up to the first dot of its last part: 0007.jpg and 0007.cls. Only headers are read
to find them. Python's tarfile takes a damaged header for the end of the archive, so a damaged shard would be silently
short: here each must end with the two zero blocks that the format demands, and be as long as its headers say.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

import webdataset
from rich.progress import Progress

from ssl_global.errors import UserError

if TYPE_CHECKING:
    from ssl_global.data.source import FolderSource

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
BLOCK = 512  # bytes: the unit of the tar format
CLASSES = "classes.json"


@dataclass(frozen=True, slots=True)
class Member:
    """An image in a shard."""

    key: str
    offset: int  # bytes from the start of the shard
    size: int  # bytes
    label: int | None


# ------------------------------------------------------------------------------------------------------------- reading


def index_shard(shard: Path) -> list[Member]:
    """The images of a shard in its order. Raises UserError naming the shard and the byte where it is damaged."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with shard.open("rb") as file:
            for member in members(shard, file):
                path = PurePosixPath(member.name)
                stem, dot, suffix = path.name.partition(".")
                key = str(path.with_name(stem)) if stem else path.name
                suffix = f"{dot}{suffix.lower()}"
                if suffix in IMAGE_SUFFIXES:
                    if key in images:
                        raise UserError(f"{shard}: two images have the key {key}; each sample needs its own")
                    images[key] = member
                elif suffix in (".cls", ".json"):
                    label = read_label(shard, member, os.pread(file.fileno(), member.size, member.offset_data))
                    if label is not None:
                        labels[key] = label
    except OSError as error:
        raise UserError(f"{shard}: {error.strerror or error}") from error
    return [Member(key, image.offset_data, image.size, labels.get(key)) for key, image in images.items()]


def members(shard: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files of a shard, with harmless names; UserError unless it goes on to its very end mark."""
    size = shard.stat().st_size
    if size == 0:
        raise UserError(f"{shard}: an empty file, not a tar shard")
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # closing it would close the caller's file
        for member in archive:
            if member.offset_data + member.size > size:
                raise UserError(f"{shard}: truncated at byte {size}, within {member.name}")
            if member.isreg() and not member.name.startswith("/") and ".." not in PurePosixPath(member.name).parts:
                yield member
    except tarfile.TarError as error:
        raise UserError(f"{shard}: not a whole tar shard: {error}") from error
    check_end(shard, file, archive.offset, size)


def check_end(shard: Path, file: BinaryIO, end: int, size: int) -> None:
    """The end mark is two zero blocks, and nothing but zeros follows."""
    file.seek(end)
    tail = file.read(1 << 20)  # ten thousand bytes of zeros are usual
    if len(tail) < 2 * BLOCK:
        raise UserError(f"{shard}: truncated at byte {size}: the end mark of a tar is missing")
    if tail.strip(b"\0"):
        raise UserError(f"{shard}: a damaged header at byte {end}: {size - end} bytes after it cannot be read")


def read_label(shard: Path, member: tarfile.TarInfo, data: bytes) -> int | None:
    """The class in a .cls (a whole number as text) or .json ("label" or "cls"); None where a .json has neither."""
    try:
        label: object = int(data) if member.name.lower().endswith(".cls") else label_of(json.loads(data))
    except ValueError as error:
        raise UserError(f"{shard}: {member.name}: {data[:40]!r} is no class; a whole number would be right") from error
    if label is None or (isinstance(label, int) and label >= 0):
        return label
    raise UserError(f"{shard}: {member.name}: the class {label!r} is not a whole number, 0 or more")


def label_of(content: object) -> object:
    return content.get("label", content.get("cls")) if isinstance(content, dict) else None


def class_names(folder: Path) -> list[str] | None:
    """The names in the folder's classes.json, if it has one."""
    file = folder / CLASSES
    if not file.is_file():
        return None
    try:
        names = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: a list of class names would be right")
    return names


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Packed:
    """What `pack` has made."""

    shards: list[Path]
    written: int  # of them in this call; the others were whole already
    num_images: int


def pack(source: "FolderSource", out: Path, *, shard_bytes: int, name: str = "images") -> Packed:
    """Write a folder's images into shards of about `shard_bytes`: OUT/NAME-000000.tar, ..., and classes.json.

    Files are copied as they are. The plan (which file goes where) is a function of the folder, and a shard gets its
    name only when it is whole: after a stop the same call goes on, and the bytes are the same. Raises UserError if OUT
    was begun with other images or another size.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards = plan(source, shard_bytes)
    begin(out, {"images": source.fingerprint, "shard_bytes": shard_bytes, "name": name, "shards": len(shards)})
    if source.classes is not None:
        (out / CLASSES).write_text(json.dumps(source.classes))
    paths = [out / f"{name}-{number:06d}.tar" for number in range(len(shards))]
    written = 0
    with Progress() as bar:
        task = bar.add_task("packing", total=len(source))
        for path, images in zip(paths, shards, strict=True):
            if not path.exists():
                write_shard(path, source, images)
                written += 1
            bar.advance(task, len(images))
    return Packed(shards=paths, written=written, num_images=len(source))


def plan(source: "FolderSource", shard_bytes: int) -> list[range]:
    """Which images go into which shard: a new one begins when the last has reached its size."""
    shards, first, size = [], 0, 0
    for image in range(len(source)):
        size += (source.root / source.files[image]).stat().st_size
        if size >= shard_bytes:
            shards.append(range(first, image + 1))
            first, size = image + 1, 0
    return [*shards, range(first, len(source))] if first < len(source) else shards


def begin(out: Path, now: dict[str, object]) -> None:
    """Leave a note of what is packed here; refuse to go on with something else."""
    note = out / "pack.json"
    if note.exists():
        before = json.loads(note.read_text())
        changed = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]
        if changed:
            raise UserError(f"{out}: begun with something else ({'; '.join(changed)}); give another folder")
    else:
        note.write_text(json.dumps(now))


def write_shard(path: Path, source: "FolderSource", images: range) -> None:
    """The shard under a temporary name, flushed, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0)  # the same bytes each time
        for image in images:
            suffix = PurePosixPath(source.files[image]).suffix.lower()[1:]
            sample: dict[str, str | bytes] = {"__key__": f"{image:09d}", suffix: source.read(image)}
            if source.labels is not None:
                sample["cls"] = str(source.labels[image]).encode()
            writer.write(sample)
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
