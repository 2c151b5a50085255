"""Everything that changes during a run as a pure function of the step: nothing here has a state to save.

Recipes speak in epochs; inside the program there are only steps. An epoch is the number of images divided by the
images of a step, and need not be whole: the last incomplete batch of an epoch is filled from the next one.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands, as a method sees it."""

    step: int  # optimizer steps done; 0 in the first
    num_steps: int  # in the whole run
    steps_per_epoch: float  # images in the data / images in a step

    @property
    def epoch(self) -> float:
        """Passes over the data done so far; 2.5 is the middle of the third."""
        return self.step / self.steps_per_epoch

    @property
    def share(self) -> float:
        """0 at the first step, 1 after the last."""
        return self.step / self.num_steps


def cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` at share 0 to `end` at share 1; flat outside."""
    share = min(max(share, 0.0), 1.0)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


def linear(start: float, end: float, share: float) -> float:
    """A straight line from `start` at share 0 to `end` at share 1; flat outside."""
    share = min(max(share, 0.0), 1.0)
    return start + (end - start) * share


def share_of(done: float, whole: float) -> float:
    """How much of `whole` is done; all of it where there is nothing to do."""
    return done / whole if whole else 1.0


def warmup_cosine(peak: float, end: float, *, warmup_epochs: float, progress: Progress) -> float:
    """A straight line from 0 to `peak` over the warm-up, then half a cosine down to `end` at the run's last step."""
    warmup_steps = warmup_epochs * progress.steps_per_epoch
    if progress.step < warmup_steps:
        return peak * progress.step / warmup_steps
    return cosine(peak, end, (progress.step - warmup_steps) / max(progress.num_steps - warmup_steps, 1))
