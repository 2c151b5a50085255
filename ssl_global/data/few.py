"""A few labelled images of each class, as pretraining is judged by: what is learnt from them is what it brought.

    few_of_each_class(source, 10, seed=0)    ten images of each class, or all of a class that has less

Which ones is a function of the seed and of the source's order, not of the machine, and fewer are always among more: the
images for 10 hold those for 1, so that figures of several counts differ by what was added.
"""

from functools import cached_property

import numpy as np

from ssl_global.data.randomness import FEW, stream
from ssl_global.data.source import Source, counted
from ssl_global.errors import UserError, wrong


class FewOfEachClass(Source):
    """Those images of another source, in its order; labels keep their numbers and their names."""

    def __init__(self, source: Source, count: int, indices: np.ndarray) -> None:
        assert source.labels is not None
        self.source, self.count = source, count
        self.indices = indices  # int64 (N,), rising
        self.path, self.classes = source.path, source.classes
        self.sizes, self.labels = source.sizes[indices], source.labels[indices]

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def place(self, index: int) -> str:
        return self.source.place(int(self.indices[index]))

    @cached_property
    def bounds(self) -> np.ndarray:
        return np.unique(np.searchsorted(self.indices, self.source.bounds))

    def describe(self) -> str:
        assert self.labels is not None
        of_each = np.unique(self.labels, return_counts=True)[1]
        lacking = int((of_each < self.count).sum())
        less = f" ({counted(lacking, 'class has', 'classes have')} less)" if lacking else ""
        labels = f"{self.describe_labels()}, {counted(self.count, 'image')} of each{less}"
        return f"{len(self)} of {counted(len(self.source), 'image')}, {labels}"


def few_of_each_class(source: Source, count: int, *, seed: int) -> FewOfEachClass:
    """`count` images of each class, or all of one that has less; the ones that `seed` says.

    Raises UserError if images have no label, and for a count below 1.
    """
    if count < 1:
        raise wrong("data.images_per_class", count, "at least 1, or None for all")
    if source.sets is not None:
        raise UserError(f"data.images_per_class = {count}: the images of {source.path} have several classes each")
    if source.labels is None:
        raise UserError(f"data.images_per_class = {count}: the images of {source.path} have no labels to choose by")
    ends = np.cumsum(np.unique(source.labels, return_counts=True)[1])
    members = np.split(np.argsort(source.labels, kind="stable"), ends[:-1])
    # A whole permutation of each, so that the first ones do not depend on how many are taken.
    chosen = [own[stream(seed, FEW, n).permutation(len(own))[:count]] for n, own in enumerate(members)]
    return FewOfEachClass(source, count, np.sort(np.concatenate(chosen)))
