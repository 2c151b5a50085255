"""Where images come from: a folder, or webdataset .tar shards. Both are a numbered list of files with keys and labels.

    open_source("photos/")                          image files at any depth
    open_source("shards/")                          a folder that holds .tar shards
    open_source("shards/train-{000..099}.tar")      each must be there
    open_source("shards/train-*.tar")               those that are there, sorted

Nothing here decodes. A source is listed once, when it is opened; it can be pickled, forked and read by threads.
"""

import glob
import hashlib
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # its types lack the error

from ssl_global.data.decode import BadImage
from ssl_global.data.shards import IMAGE_SUFFIXES, ShardIndex, index_shard, read_classes
from ssl_global.errors import UserError

MAX_OPEN_SHARDS = 256  # in a process (ours); a usual limit is 1024 open files, and there may be more shards than that


class Source(ABC):
    """Images by number, 0 to len - 1, still encoded, in an order that does not change."""

    path: str  # as the user gave it
    labels: np.ndarray | None  # int64 (N,); None: at least one image has none
    classes: list[str] | None  # the labels' names, where they are known
    sizes: np.ndarray  # int64 (N,), bytes of each image

    def __len__(self) -> int:
        return len(self.sizes)

    @abstractmethod
    def key(self, index: int) -> str:
        """A unique name, for people: a relative path, or "shard.tar/key". Never make a path of it."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image file's bytes. Raises BadImage if this one cannot be read, UserError if its whole shard cannot."""

    @abstractmethod
    def describe(self) -> str:
        """One line: "3038 images in 4 shards, 9 classes"."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of keys, sizes and order: other data has another, the same data elsewhere on the disk has not."""
        whole = hashlib.sha256()
        for index, size in enumerate(self.sizes.tolist()):
            whole.update(f"{self.key(index)}\0{size}\0".encode(errors="surrogateescape"))
        return whole.hexdigest()[:32]

    def describe_labels(self) -> str:
        if self.labels is None:
            return "no labels"
        return counted(len(self.classes) if self.classes else len(np.unique(self.labels)), "class", "classes")


class FolderSource(Source):
    """Image files under a folder, at any depth, sorted by name; hidden files are left out, links are followed.

    If there are at least two first-level folders and every image lies in one, that folder is its label.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = Path(path).expanduser()
        found = sorted(find_images(str(self.root)))
        if not found:
            raise UserError(f"{path}: no image in this folder (looked for {' '.join(IMAGE_SUFFIXES)} at any depth)")
        self.files = [name for name, _ in found]
        self.sizes = np.array([size for _, size in found], dtype=np.int64)
        self.classes = class_folders(self.files)
        self.labels = None
        if self.classes:
            number = {name: label for label, name in enumerate(self.classes)}
            self.labels = np.array([number[name.partition("/")[0]] for name in self.files], dtype=np.int64)

    def key(self, index: int) -> str:
        return self.files[index]

    def read(self, index: int) -> bytes:
        try:
            return (self.root / self.files[index]).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error

    def describe(self) -> str:
        return f"{counted(len(self), 'image')}, {self.describe_labels()}"


class ShardSource(Source):
    """The samples of .tar shards, in the order of the shards and of their members; no member is ever extracted."""

    def __init__(self, path: str, shards: list[str]) -> None:
        self._descriptors: dict[int, int] = {}  # by shard, opened on first use
        self.path = path
        self.shards = shards
        self.shard_names = relative_names(shards)
        indexes = [index_shard(shard) for shard in shards]
        self.keys = [key for index in indexes for key in index.keys]
        self.offsets = np.concatenate([index.offsets for index in indexes])
        self.sizes = np.concatenate([index.sizes for index in indexes])
        self.starts = np.cumsum([0] + [len(index.keys) for index in indexes])  # of each shard, in the list of images
        self.labels, self.num_labelled = join_labels(indexes)
        self.classes = None if self.labels is None else read_classes(os.path.dirname(shards[0]), self.labels)

    def key(self, index: int) -> str:
        return f"{self.shard_names[self._shard(index)]}/{self.keys[index]}"

    def read(self, index: int) -> bytes:
        shard, size, offset = self._shard(index), int(self.sizes[index]), int(self.offsets[index])
        try:
            data = self._pread(shard, size, offset)
        except OSError as error:
            raise UserError(f"{self.shards[shard]}: cannot be read at byte {offset}: {error.strerror}") from error
        if len(data) < size:
            raise UserError(f"{self.shards[shard]}: became shorter since it was opened: byte {offset + size} is gone")
        return data

    def describe(self) -> str:
        line = f"{counted(len(self), 'image')} in {counted(len(self.shards), 'shard')}, {self.describe_labels()}"
        return line + (f" (only {self.num_labelled} have one)" if self.labels is None and self.num_labelled else "")

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        """Reads at a place without moving one: threads and forked processes may share a descriptor."""
        if shard in self._descriptors:
            return os.pread(self._descriptors[shard], size, offset)
        opened = os.open(self.shards[shard], os.O_RDONLY)
        keep = len(self._descriptors) < MAX_OPEN_SHARDS and self._descriptors.setdefault(shard, opened) == opened
        try:
            return os.pread(opened, size, offset)
        finally:
            if not keep:
                os.close(opened)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_descriptors": {}}  # a descriptor means nothing in another process

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def open_source(path: str) -> Source:
    """Lists the images at `path` (see the head of this file). Raises UserError, one line naming what is wrong."""
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
        raise UserError(f"{path}: {scheme[0]} is not read, only local files; copy the shards to a local folder")
    place = os.path.expanduser(path)
    if not os.path.isdir(place):
        return ShardSource(path, expand(path, place))
    shards = sorted(glob.glob(os.path.join(glob.escape(place), "*.tar")))
    if not shards:
        return FolderSource(path)
    if any(True for _ in find_images(place)):
        raise UserError(f"{path}: holds both .tar shards and image files; give {path.rstrip('/')}/*.tar or move one")
    return ShardSource(path, shards)


def expand(path: str, place: str) -> list[str]:
    """The .tar files that braces and globs stand for. Braces name files that must exist, a glob those that do."""
    shards: list[str] = []
    try:
        for word in [place] if os.path.exists(place) else braceexpand(place):
            shards += expand_word(path, word)
    except UnbalancedBracesError as error:
        raise UserError(f"{path}: a brace is not closed; write {{000..099}}") from error
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise UserError(f"{path}: names {twice} twice")
    return shards


def expand_word(path: str, word: str) -> list[str]:
    if os.path.exists(word):
        found = [word]
    elif glob.has_magic(word):
        found = sorted(glob.glob(word))
        if not found:
            raise UserError(f"{path}: no shard matches {word}")
    elif "{" in path:
        raise UserError(f"{path}: shard {word} is missing")
    else:
        raise UserError(f"{path}: there is no such file or folder")
    for shard in found:
        if not (shard.endswith(".tar") and os.path.isfile(shard)):
            raise UserError(f"{path}: {shard} is no .tar file; give .tar shards (not compressed) or a folder of images")
    return found


def find_images(root: str, below: str = "", above: frozenset[str] = frozenset()) -> Iterator[tuple[str, int]]:
    """(path relative to the root, bytes) of each image file, in no particular order."""
    folder = os.path.join(root, below)
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that holds it
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if is_folder(entry):
            yield from find_images(root, f"{below}{entry.name}/", above | {real})
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and (size := file_size(entry)) is not None:
            yield below + entry.name, size


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def file_size(entry: os.DirEntry[str]) -> int | None:
    """None for a pipe or a device, which could be waited on for ever."""
    try:
        status = entry.stat()
    except OSError:
        return 0  # a link to nothing: listed, so that it is counted as bad and not passed over in silence
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def class_folders(files: list[str]) -> list[str] | None:
    folders = {name.partition("/")[0] for name in files if "/" in name}
    all_inside = all("/" in name for name in files)
    return sorted(folders) if all_inside and len(folders) >= 2 else None


def relative_names(shards: list[str]) -> list[str]:
    """The shards' names below the folder that they share: unique, and the same wherever that folder lies."""
    absolute = [os.path.abspath(shard) for shard in shards]
    shared = os.path.commonpath([os.path.dirname(shard) for shard in absolute])
    return [Path(os.path.relpath(shard, shared)).as_posix() for shard in absolute]


def join_labels(indexes: list[ShardIndex]) -> tuple[np.ndarray | None, int]:
    """The labels if every image has one, and how many do."""
    labels = [label for index in indexes for label in index.labels]
    present = [label for label in labels if label is not None]
    return (np.array(present, dtype=np.int64) if len(present) == len(labels) else None), len(present)


def counted(number: int, word: str, words: str | None = None) -> str:
    return f"{number} {word if number == 1 else words or word + 's'}"
