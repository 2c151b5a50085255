"""Where images come from: a folder, or webdataset .tar shards. Both are a numbered list of files with keys and labels.

A key names a sample for people; nothing ever builds a path from one.
"""

import glob
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls

from ssl_global.data.shards import IMAGE_SUFFIXES, Member, class_names, index_shard
from ssl_global.errors import UserError


class Source(ABC):
    """Images by number, 0 to len - 1, in an order that does not change."""

    path: str  # as the user gave it
    labels: np.ndarray | None  # int64 (N,); None: at least one image has none
    classes: list[str] | None  # the labels' names, where they are known
    fingerprint: str  # of keys, sizes and order: other data has another, the same data elsewhere on the disk has not

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """A unique name, for people."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image file's bytes. Raises OSError."""

    @abstractmethod
    def describe(self) -> str:
        """One line: how many, of what."""


def open_source(path: str) -> Source:
    """The source at `path`: a folder of images or of shards, one .tar, a glob, or braces as in 'train-{000..099}.tar'.

    Raises UserError, in one line, when there is nothing that can be read.
    """
    if "://" in path or path.startswith("pipe:"):
        raise UserError(f"{path}: only files on this machine are read; copy the shards to a local folder")
    folder = Path(path)
    if folder.is_dir():
        shards = sorted(str(shard) for shard in folder.glob("*.tar"))
        return ShardSource(path, shards) if shards else FolderSource(path)
    if any(mark in path for mark in "*?[{"):
        return ShardSource(path, expand(path))
    if not folder.exists():
        raise UserError(f"{path}: there is no such folder or shard")
    if folder.suffix != ".tar":
        raise UserError(f"{path}: a folder of images or .tar shards would be right, this is a single file")
    return ShardSource(path, [path])


def expand(pattern: str) -> list[str]:
    """The shards that a glob or braces name, in order; each must be there."""
    shards: list[str] = []
    for part in expand_urls(pattern):
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        missing = [shard for shard in found if not os.path.isfile(shard)]
        if missing or not found:
            raise UserError(f"{pattern}: there is no shard {missing[0] if missing else part}")
        shards += found
    return shards


class FolderSource(Source):
    """Every image below a folder, by name. The first folder of its path is its class, if all images have one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = Path(path)
        self.files = sorted(
            str(file.relative_to(self.root))
            for file in self.root.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in file.relative_to(self.root).parts)
            and file.is_file()
        )
        if not self.files:
            raise UserError(f"{path}: no image in this folder ({' '.join(sorted(IMAGE_SUFFIXES))}) and no .tar shard")
        firsts = [Path(file).parts[0] if len(Path(file).parts) > 1 else None for file in self.files]
        names = sorted({first for first in firsts if first is not None})
        labelled = None not in firsts and len(names) > 1
        self.classes = names if labelled else None
        number = {name: place for place, name in enumerate(names)}
        self.labels = np.array([number[f] for f in firsts if f is not None], dtype=np.int64) if labelled else None
        sizes = [(self.root / file).stat().st_size for file in self.files]
        self.fingerprint = digest(f"{file} {size}" for file, size in zip(self.files, sizes, strict=True))

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return self.files[index]

    def read(self, index: int) -> bytes:
        return (self.root / self.files[index]).read_bytes()

    def describe(self) -> str:
        return f"{len(self)} images in {self.path}{in_classes(self)}"


class ShardSource(Source):
    """The samples of .tar shards, read in place: no member is ever extracted."""

    def __init__(self, path: str, shards: list[str]) -> None:
        self.path = path
        self.shards = shards
        members = [index_shard(Path(shard)) for shard in shards]
        self.members: list[tuple[int, Member]] = [(s, member) for s, found in enumerate(members) for member in found]
        if not self.members:
            raise UserError(f"{path}: no image in {len(shards)} shards ({' '.join(sorted(IMAGE_SUFFIXES))})")
        labels = [member.label for _, member in self.members]
        self.labels = np.array(labels, dtype=np.int64) if None not in labels else None
        self.classes = class_names(Path(shards[0]).parent) if self.labels is not None else None
        if self.classes is not None and self.labels is not None and self.labels.max() >= len(self.classes):
            file = Path(shards[0]).parent / "classes.json"
            raise UserError(f"{file}: {len(self.classes)} names, and the shards have a label {self.labels.max()}")
        self.fingerprint = digest(
            f"{Path(shards[s]).name} {member.key} {member.size} {member.label}" for s, member in self.members
        )
        self.descriptors: dict[tuple[int, int], int] = {}  # by process and shard: opened on first use, not carried over

    def __len__(self) -> int:
        return len(self.members)

    def key(self, index: int) -> str:
        shard, member = self.members[index]
        return f"{Path(self.shards[shard]).name}/{member.key}"

    def read(self, index: int) -> bytes:
        shard, member = self.members[index]
        place = (os.getpid(), shard)
        if place not in self.descriptors:
            self.descriptors[place] = os.open(self.shards[shard], os.O_RDONLY)
        data = os.pread(self.descriptors[place], member.size, member.offset)
        if len(data) != member.size:
            raise OSError(f"{self.shards[shard]} ends within this sample: it changed while it was read")
        return data

    def describe(self) -> str:
        return f"{len(self)} images in {len(self.shards)} shards of {self.path}{in_classes(self)}"

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"descriptors": {}}

    def __del__(self) -> None:
        for (process, _), descriptor in getattr(self, "descriptors", {}).items():
            if process == os.getpid():
                os.close(descriptor)


def in_classes(source: Source) -> str:
    if source.labels is None:
        return ", without labels"
    return f", {len(np.unique(source.labels))} classes"


def digest(lines: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for line in lines:
        whole.update(f"{line}\n".encode())
    return whole.hexdigest()[:32]
