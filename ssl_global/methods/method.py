"""What the loop asks of every method, and nothing more: the loop knows no teacher, no mask and no label."""

from typing import TypedDict

from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder
from ssl_global.schedules import Progress


class Batch(TypedDict):
    """What a method is given: the images of one process, or a part of them."""

    views: list[Tensor]  # float (B, C, H, W), normalised, global views first
    seed: Tensor  # int64 (B,): a function of the run's seed, the epoch and the sample, on the device
    key: list[str]  # names of the samples
    label: Tensor  # int64 (B,); -1 where there is none


class Method(nn.Module):
    """Owns all that is learnt or averaged: encoders, heads, centre. One module, since Accelerate prepares one.

    In a step the loop calls begin_step, then forward (once, or once for each part of the batch) with backward,
    gradients_done, and after the optimizer after_step. A step whose loss or gradient is not finite ends before
    after_step: whatever forward has kept of it must be dropped by the next begin_step.
    """

    def begin_step(self, progress: Progress) -> None:
        """Before the first forward of an optimizer step."""

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """{"loss": 0-d float32, the mean over the batch; ...}: other entries are 0-d figures to show."""
        raise NotImplementedError

    def gradients_done(self, progress: Progress) -> None:
        """After the last backward, before clipping: the place to withhold a gradient."""

    def after_step(self, progress: Progress) -> None:
        """After the optimizer: the place of moving averages."""

    def backbones(self) -> dict[str, Encoder]:
        """The encoders by name, the one to judge and to export first."""
        raise NotImplementedError
