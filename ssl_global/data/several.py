"""Images with any number of classes each. Of a folder, the file labels.csv in it says which (of shards: shards.py).

    image,labels
    a/0001.jpg,Cardiomegaly|Effusion
    a/0002.jpg,

Paths are those below the folder, names are parted by "|" (as in NIH's ChestX-ray14, "Finding Labels"), none at all
means that the image has none of the classes. Each image has one line. The classes are all names that occur, sorted.
"""

import csv
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_global.errors import UserError

FILE = "labels.csv"
HEAD = ["image", "labels"]
BETWEEN = "|"
MOST_CLASSES = 2**20  # of numbers without names (ours)


@dataclass(frozen=True)
class Sets:
    """A set of classes for each of N images."""

    members: np.ndarray  # int64 (M,), the classes of the first image, then those of the second...
    ends: np.ndarray  # int64 (N,), where each image's end

    @classmethod
    def of(cls, sets: Iterable[Iterable[int]]) -> "Sets":
        rising = [sorted(set(one)) for one in sets]
        ends = np.cumsum([len(one) for one in rising], dtype=np.int64)
        return cls(np.array([number for one in rising for number in one], dtype=np.int64), ends)

    @classmethod
    def join(cls, parts: Sequence["Sets"]) -> "Sets":
        starts = np.cumsum([0] + [len(part.members) for part in parts])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.members for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """int64: the classes of one image, rising."""
        return self.members[self.ends[index - 1] if index else 0 : self.ends[index]]

    def target(self, index: int, num_classes: int) -> np.ndarray:
        """uint8 (num_classes,): 1 for the classes that the image has."""
        target = np.zeros(num_classes, dtype=np.uint8)
        target[self[index]] = 1
        return target

    def digest(self, classes: Sequence[str]) -> str:
        """Of other labels it is another."""
        whole = hashlib.sha256("\0".join(classes).encode())
        for numbers in (self.members, self.ends):
            whole.update(numbers.astype("<i8").tobytes())
        return whole.hexdigest()[:16]

    def renumbered(self, numbers: Sequence[int]) -> "Sets":
        """With numbers[k] for class k."""
        return Sets.of([[numbers[k] for k in self[index]] for index in range(len(self))])


def numbers_as_names(path: str, sets: Sets) -> list[str]:
    """Of classes that have none. Raises UserError for a number that would take all memory."""
    most = int(sets.members.max(initial=-1))
    if most >= MOST_CLASSES:
        raise UserError(f"{path}: holds the label {most}; classes are numbered from 0, below {MOST_CLASSES}")
    return [str(number) for number in range(most + 1)]


def read_sets(folder: Path, files: Sequence[str]) -> tuple[Sets, list[str]] | None:
    """Of these images of the folder, and the classes' names; None if there is no labels.csv.

    Raises UserError naming the line that is wrong, or an image that has none.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not rows or rows[0] != HEAD:
        raise UserError(f"{path}, line 1: {','.join(rows[0]) if rows else ''!r}; {','.join(HEAD)} would be right")
    names = named(path, rows[1:], set(files))
    if lacking := [name for name in files if name not in names]:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"{path}: has no line for {lacking[0]}{more}; one of no class ends with its comma")
    classes = sorted({label for labels in names.values() for label in labels})
    number = {label: k for k, label in enumerate(classes)}
    return Sets.of([[number[label] for label in names[file]] for file in files]), classes


def named(path: Path, rows: list[list[str]], files: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line, row in enumerate(rows, start=2):
        if not row:  # an empty line, as at the end
            continue
        if len(row) != len(HEAD):
            raise UserError(
                f"{path}, line {line}: {len(row)} value{'s'[len(row) == 1 :]}; image,name|name would be right"
            )
        image, labels = row[0], row[1].split(BETWEEN) if row[1].strip() else []
        if image not in files:
            raise UserError(f"{path}, line {line}: there is no image {image} in {path.parent}")
        if image in found:
            raise UserError(f"{path}, line {line}: {image} a second time")
        if not all(label.strip() for label in labels):
            raise UserError(f"{path}, line {line}: {row[1]!r} holds an empty name; name|name would be right")
        found[image] = [label.strip() for label in labels]
    return found
