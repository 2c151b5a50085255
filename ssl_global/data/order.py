"""Which sample when: a pure function of the seed, so the whole state of the data is one integer, samples consumed.

A run's samples stand in one endless row: epoch after epoch, each a permutation of all samples. A position in the row
tells the epoch and the sample. Step k of a run with a global batch of G takes positions k*G to (k+1)*G, however many
processes and workers share them; the last batch of an epoch is filled from the next one, so nothing is dropped.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from ssl_global.data.randomness import ORDER, stream


class Order:
    """The endless row of `num_samples` samples under `seed`."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, sample) at that place of the row."""
        epoch, place = divmod(position, self.num_samples)
        return epoch, int(permutation(self.num_samples, self.seed, epoch)[place])


@lru_cache(maxsize=2)  # a batch lies in at most two neighbouring epochs, unless it is larger than the data
def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return stream(seed, ORDER, epoch).permutation(num_samples)


def batches(
    *, start_step: int, num_steps: int, global_batch: int, micro_batch: int, process: int, num_processes: int
) -> Iterator[list[int]]:
    """The positions that one process takes, micro-batch by micro-batch, from `start_step` to the end of the run.

    Each process takes a contiguous share of the global batch, so that the batch does not depend on their number.
    `micro_batch` must divide that share, and `num_processes` the global batch.
    """
    share = global_batch // num_processes
    for step in range(start_step, num_steps):
        begin = step * global_batch + process * share
        for first in range(begin, begin + share, micro_batch):
            yield list(range(first, first + micro_batch))
