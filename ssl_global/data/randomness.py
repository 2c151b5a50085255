"""Random numbers by name instead of by turn: no generator has a state that a checkpoint would have to keep.

`stream(seed, purpose, a, b)` gives the numbers for one purpose at one place, (epoch, sample) or (step, process). They
are those of Philox (Salmon et al. 2011), a counter-based generator: same names, same numbers, anywhere, in any order.
"""

import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

ORDER = 1  # of the blocks of an epoch
VIEWS = 2  # of a sample in an epoch
STEP = 3  # of a process in a step: drop path
SAMPLE = 4  # of the built-in sample's crops
SHAPE = 6  # of the built-in sample's shapes
WINDOW = 5  # of the samples of a window of an epoch
FEW = 7  # of the images of a class that are learnt from


def stream(seed: int, purpose: int, a: int = 0, b: int = 0) -> np.random.Generator:
    """The generator for `purpose` at (a, b); all are whole numbers, 0 or more, below 2**63."""
    # The counter's low words count the draws: streams meet only after 2**128 of them.
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, a, b]))


_drawing = threading.Lock()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """For code of others that draws from the program's own generators (random, numpy, torch on the CPU): from `seed`,
    one thread at a time, and as if nothing had been drawn."""
    with _drawing, torch.random.fork_rng(devices=[]):
        before = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
