"""Which sample when: a pure function of the seed and the data, so the whole state of the data is one integer.

A run's samples stand in one endless row: epoch after epoch, each a permutation of all samples. A place in the row tells
the epoch and the sample. Step k of a run whose steps take G samples takes places k*G to (k+1)*G, however many processes
and workers share them. The last batch of an epoch is filled from the next one; or the epoch's rest is left out.

An epoch is shuffled in two stages, so that reading stays nearly sequential: blocks of neighbouring samples are permuted
over the whole epoch, then the samples of a window of blocks among each other. Data of one window (8192 samples) or less
is one true permutation. The worst case, 1281 shards of 1000 that hold 1000 classes one after the other, in batches of
512 (`python -m benchmarks shuffle`):

                                                      this      a true permutation
    rank correlation of the order with the data's     0.0016    0.0006
    share of neighbours that are of one shard         0.0017    0.0008
    share of neighbours that were neighbours          0.0003    0
    classes in a batch                                338       401
    images of a batch's most frequent class           5.6       4.0
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ssl_global.data.randomness import ORDER, WINDOW, stream
from ssl_global.recipe import Recipe


@dataclass(frozen=True)
class Epoch:
    """An epoch's blocks in their order, cut into windows."""

    starts: np.ndarray  # int64 (blocks,), first sample of each block
    lengths: np.ndarray  # int64 (blocks,), samples of each
    windows: np.ndarray  # int64 (windows + 1,), place of each window's first sample in the epoch


class Order:
    """The endless row of a source's samples under `seed`.

    bounds       int64 (shards + 1,): the samples at which shards begin, and the end; no block crosses one
    block        neighbouring samples that stay near each other
    window       blocks whose samples are shuffled among each other
    whole_steps  samples of a step, if what is left of an epoch after its last whole step is to be left out
    """

    def __init__(
        self, bounds: np.ndarray, seed: int, *, block: int, window: int, whole_steps: int | None = None
    ) -> None:
        self.num_samples = int(bounds[-1])
        self.seed = seed
        self.window = window
        self.starts = np.concatenate([np.arange(start, stop, block) for start, stop in pairwise(bounds)])
        self.lengths = np.diff(np.append(self.starts, self.num_samples))
        self.epoch_length = self.num_samples - (self.num_samples % whole_steps if whole_steps else 0)
        # A batch lies in a few neighbouring windows, and in at most two epochs unless it is larger than the data.
        self._epoch = lru_cache(maxsize=2)(self._permute_blocks)
        self._window = lru_cache(maxsize=4)(self._permute_window)

    @classmethod
    def of(cls, bounds: np.ndarray, recipe: Recipe) -> "Order":
        data = recipe.data
        drop = data.last_batch == "drop" and data.reader == "indexed"
        whole_steps = recipe.train.global_batch // data.repeats if drop else None
        return cls(bounds, recipe.seed, block=data.shuffle_block, window=data.shuffle_window, whole_steps=whole_steps)

    def __getitem__(self, place: int) -> tuple[int, int]:
        """(epoch, sample) at that place of the row."""
        epoch, at = divmod(place, self.epoch_length)
        windows = self._epoch(epoch).windows
        window = int(np.searchsorted(windows, at, side="right")) - 1
        return epoch, int(self._window(epoch, window)[at - windows[window]])

    def _permute_blocks(self, epoch: int) -> Epoch:
        order = stream(self.seed, ORDER, epoch).permutation(len(self.starts))
        lengths = self.lengths[order]
        windows = np.append(np.append(0, np.cumsum(lengths))[:-1][:: self.window], self.num_samples)
        return Epoch(self.starts[order], lengths, windows)

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        blocks = self._epoch(epoch)
        here = slice(window * self.window, (window + 1) * self.window)
        pairs = zip(blocks.starts[here], blocks.lengths[here], strict=True)
        samples = np.concatenate([np.arange(start, start + length) for start, length in pairs])
        return stream(self.seed, WINDOW, epoch, window).permutation(samples)


def batches(
    *, start_step: int, num_steps: int, global_batch: int, micro_batch: int, process: int, num_processes: int
) -> Iterator[range]:
    """The images that one process takes, micro-batch by micro-batch, from `start_step` to the end of the run.

    Each process takes a contiguous share of the global batch, so that the batch does not depend on their number.
    `micro_batch` must divide that share, and `num_processes` the global batch.
    """
    share = global_batch // num_processes
    for step in range(start_step, num_steps):
        begin = step * global_batch + process * share
        for first in range(begin, begin + share, micro_batch):
            yield range(first, first + micro_batch)
