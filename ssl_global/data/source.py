"""Where images come from: always a numbered list of encoded files with keys and labels.

    open_source("photos/")                          image files at any depth
    open_source("shards/")                          a folder that holds .tar shards
    open_source("shards/train-{000..099}.tar")      each must be there
    open_source("shards/train-*.tar")               those that are there, sorted
    open_source("s3://bucket/train-{000..099}.tar") brought to a local cache folder first (remote.py)
    open_source("datasets:beans@train")             of Hugging Face's datasets (huggingface.py)
    open_source("torchvision:cifar10@train")        of torchvision's, written to local shards first (vision.py)

Nothing here decodes. A source is listed once, when it is opened; it can be pickled, forked and read by threads.
"""

import contextlib
import glob
import hashlib
import os
import re
import resource
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # its types lack the error

from ssl_global.data import vision
from ssl_global.data.decode import BadImage
from ssl_global.data.index import indexes, is_current
from ssl_global.data.remote import fetch
from ssl_global.data.several import FILE, Sets, numbers_as_names, read_sets
from ssl_global.data.shards import IMAGE_SUFFIXES, NO_LABEL, SEVERAL, Names, read_classes
from ssl_global.errors import UserError

OTHER_FILES = 512  # that a process may want to have open besides its shards (ours)


class Source(ABC):
    """Images by number, 0 to len - 1, still encoded, in an order that does not change."""

    path: str  # as the user gave it
    labels: np.ndarray | None  # int64 (N,); None: at least one image has none
    classes: list[str] | None  # the labels' names, where they are known
    sets: Sets | None = None  # of any number of classes for each image, instead of labels
    sizes: np.ndarray  # int64 (N,), bytes of each image

    def __len__(self) -> int:
        return len(self.sizes)

    @abstractmethod
    def key(self, index: int) -> str:
        """A unique name, for people: a relative path, or "shard.tar/key". Never make a path of it."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image file's bytes. Raises BadImage if they cannot be read, UserError if they are no longer the same."""

    def place(self, index: int) -> str:
        """Where the image's bytes are, for people who want to look at them."""
        return self.key(index)

    @property
    def bounds(self) -> np.ndarray:
        """int64: the indices at which its files of many images begin, and the number of images."""
        return np.array([0, len(self)])

    def parts(self) -> dict[str, str]:
        """What each part (shard, folder) holds, as a hash: by which two sources that differ are told apart."""
        return {"images": self.digest(range(len(self)))}

    def digest(self, indices: Iterable[int]) -> str:
        """Hash of keys, sizes and order: other data has another, the same data elsewhere on the disk has not."""
        whole = hashlib.sha256()
        for index in indices:
            whole.update(f"{self.key(index)}\0{self.sizes[index]}\0".encode(errors="surrogateescape"))
        return whole.hexdigest()[:16]

    @cached_property
    def fingerprint(self) -> str:
        """One hash of all parts and their order."""
        return hash_of(self.parts())

    @abstractmethod
    def describe(self) -> str:
        """One line: "3038 images in 4 shards, 9 classes"."""

    def describe_labels(self) -> str:
        if self.sets is not None:
            return f"{counted(len(self.classes or ()), 'class', 'classes')}, any number for each image"
        if self.labels is None:
            return "no labels"
        return counted(len(self.classes) if self.classes else len(np.unique(self.labels)), "class", "classes")


def hash_of(parts: dict[str, str]) -> str:
    lines = "".join(f"{name}\0{digest}\0" for name, digest in parts.items())
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:32]


class FolderSource(Source):
    """Image files under a folder, at any depth, sorted by name; hidden files are left out, links are followed.

    If there are at least two first-level folders and every image lies in one, that folder is its label. If there is a
    labels.csv, that says its labels, any number of them (several.py).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = Path(path).expanduser()
        found = sorted(find_images(str(self.root)))
        if not found:
            raise UserError(f"{path}: no image in this folder (looked for {' '.join(IMAGE_SUFFIXES)} at any depth)")
        self.files = [name for name, _ in found]
        self.sizes = np.array([size for _, size in found], dtype=np.int64)
        self.labels = None
        if found_sets := read_sets(self.root, self.files):
            self.sets, self.classes = found_sets
            return
        self.classes = class_folders(self.files)
        if self.classes:
            number = {name: label for label, name in enumerate(self.classes)}
            self.labels = np.array([number[name.partition("/")[0]] for name in self.files], dtype=np.int64)

    def key(self, index: int) -> str:
        return self.files[index]

    def place(self, index: int) -> str:
        return str(self.root / self.files[index])

    def parts(self) -> dict[str, str]:
        """By first-level folder; "." is the files beside them."""
        folders = [name.partition("/")[0] if "/" in name else "." for name in self.files]
        members: dict[str, list[int]] = {}
        for index, folder in enumerate(folders):
            members.setdefault(folder, []).append(index)
        labels = {FILE: self.sets.digest(self.classes or [])} if self.sets is not None else {}
        return {folder: self.digest(indices) for folder, indices in members.items()} | labels

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
        found = indexes(shards)
        self.keys = Names.join([index.keys for index in found])
        self.offsets = np.concatenate([index.offsets for index in found])
        self.sizes = np.concatenate([index.sizes for index in found])
        self.starts = np.cumsum([0] + [len(index.keys) for index in found])  # of each shard, and the end
        self.stamps = [index.stamp for index in found]
        self.digests = [index.digest() for index in found]
        labels = np.concatenate([index.labels for index in found])
        self.num_labelled = int((labels != NO_LABEL).sum())
        self.labels = labels if self.num_labelled == len(labels) else None
        self.classes = None if self.labels is None else read_classes(os.path.dirname(shards[0]), self.labels)
        if (labels == SEVERAL).any():
            self.labels = None
            if self.num_labelled == len(labels):
                self.sets = Sets.join([index.all_sets() for index in found])
                named = read_classes(os.path.dirname(shards[0]), self.sets.members)
                self.classes = named or numbers_as_names(path, self.sets)
        self.max_open = may_stay_open(len(shards))

    @property
    def bounds(self) -> np.ndarray:
        return self.starts

    def key(self, index: int) -> str:
        return f"{self.shard_names[self._shard(index)]}/{self.keys[index]}"

    def place(self, index: int) -> str:
        return f"{self.shards[self._shard(index)]} at byte {self.offsets[index]}: {self.keys[index]}"

    def parts(self) -> dict[str, str]:
        return dict(zip(self.shard_names, self.digests, strict=True))

    def read(self, index: int) -> bytes:
        shard, size, offset = self._shard(index), int(self.sizes[index]), int(self.offsets[index])
        try:
            data = self._pread(shard, size, offset)
        except OSError as error:
            raise BadImage(f"cannot be read at byte {offset}: {error.strerror}") from error
        if len(data) < size:
            raise UserError(f"{self.shards[shard]}: became shorter since it was opened: byte {offset + size} is gone")
        return data

    def describe(self) -> str:
        line = f"{counted(len(self), 'image')} in {counted(len(self.shards), 'shard')}, {self.describe_labels()}"
        return line + (f" (only {self.num_labelled} have one)" if 0 < self.num_labelled < len(self) else "")

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        """Reads at a place without moving one: threads and forked processes may share a descriptor."""
        opened = self._descriptors.get(shard)
        if opened is not None:
            return self._read_unchanged(shard, opened, size, offset)
        opened = os.open(self.shards[shard], os.O_RDONLY)
        keep = len(self._descriptors) < self.max_open and self._descriptors.setdefault(shard, opened) == opened
        try:
            return self._read_unchanged(shard, opened, size, offset)
        finally:
            if not keep:
                os.close(opened)

    def _read_unchanged(self, shard: int, opened: int, size: int, offset: int) -> bytes:
        data = os.pread(opened, size, offset)
        # One that is shorter is told by its missing byte.
        if len(data) == size and not is_current(self.stamps[shard], opened):
            raise UserError(f"{self.shards[shard]}: was changed since it was opened; begin again with the new data")
        return data

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_descriptors": {}}  # a descriptor means nothing in another process

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def may_stay_open(wanted: int) -> int:
    """How many shards may stay open at once; asks the system for as many as are wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + OTHER_FILES:
        more = min(wanted + OTHER_FILES, hard) if hard != resource.RLIM_INFINITY else wanted + OTHER_FILES
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(more, soft), hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(min(wanted, soft - OTHER_FILES), 16)


def open_source(path: str) -> Source:
    """Lists the images at `path` (see the head of this file). Raises UserError, one line naming what is wrong."""
    if path.startswith("datasets:"):
        from ssl_global.data.huggingface import open_dataset  # an extra

        return open_dataset(path)
    shards = list_shards(path)
    return FolderSource(path) if shards is None else ShardSource(path, shards)


def list_shards(path: str) -> list[str] | None:
    """The local .tar files that `path` stands for; None if it is a folder of images. Fetches remote ones."""
    if path.startswith("datasets:"):
        return None
    if path.startswith(vision.PREFIX):
        return vision.shards_of(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
        return fetch(path)
    place = os.path.expanduser(path)
    if not os.path.isdir(place):
        return expand(path, place)
    shards = sorted(glob.glob(os.path.join(glob.escape(place), "*.tar")))
    if shards and any(True for _ in find_images(place)):
        raise UserError(f"{path}: holds both .tar shards and image files; give {path.rstrip('/')}/*.tar or move one")
    return shards or None


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
        meant = f"; of torchvision's datasets it is {vision.PREFIX}{path}" if path in vision.datasets() else ""
        raise UserError(f"{path}: there is no such file or folder{meant}")
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


def counted(number: int, word: str, words: str | None = None) -> str:
    return f"{number} {word if number == 1 else words or word + 's'}"


def difference(before: dict[str, str], now: dict[str, str]) -> str:
    """What tells two sources' parts apart, in a line: "changed: train-000003.tar; missing: train-000009.tar"."""
    said = {
        "changed": [name for name in before if name in now and before[name] != now[name]],
        "missing": [name for name in before if name not in now],
        "new": [name for name in now if name not in before],
    }

    def listed(names: list[str]) -> str:
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    return "; ".join(f"{kind}: {listed(names)}" for kind, names in said.items() if names) or "in another order"
