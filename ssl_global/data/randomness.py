"""Random numbers by name instead of by turn: no generator has a state that a checkpoint would have to keep.

`stream(seed, purpose, a, b)` gives the numbers for one purpose at one place, (epoch, sample) or (step, process). They
are those of Philox (Salmon et al. 2011), a counter-based generator: same names, same numbers, anywhere, in any order.
"""

import numpy as np

ORDER = 1  # of the blocks of an epoch
VIEWS = 2  # of a sample in an epoch
STEP = 3  # of a process in a step: drop path
SAMPLE = 4  # of the built-in sample's crops
WINDOW = 5  # of the samples of a window of an epoch


def stream(seed: int, purpose: int, a: int = 0, b: int = 0) -> np.random.Generator:
    """The generator for `purpose` at (a, b); all are whole numbers, 0 or more, below 2**63."""
    # The counter's low words count the draws: streams meet only after 2**128 of them.
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, a, b]))
