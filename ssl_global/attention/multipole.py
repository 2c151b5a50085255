"""Multipole attention: windows near by, and the same windows on coarser and coarser maps for what is far away
(Colagrande et al. 2025, "MANO", https://arxiv.org/abs/2507.02748).

One local attention serves all levels. The map is halved until one window covers it; on the way back each level is added
to what comes up from the coarser one, times a factor: 1 / (levels below it) as in the authors' code, by which coarse
levels count little (1, 1/4, 1/12, 1/24, 1/24 of five), or 1.

Levels follow from each map's size (the source's from the image size, and one too few). Odd maps are halved upwards,
with their edge repeated. Halving and doubling are a mean of 2 x 2 and its repetition, without parameters, or one
strided convolution each, shared by all levels.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start
from ssl_global.attention.local import LocalAttention


class Multipole(Residual):
    """
    window, stride, heads   of the local attention, see there
    weights                 factors of the coarser levels: "code" or "uniform", see above
    sampling                "mean" or "conv"
    """

    def __init__(
        self,
        channels: int,
        *,
        window: int = 7,
        stride: int | None = None,
        heads: int | None = None,
        weights: Literal["code", "uniform"] = "code",
        sampling: Literal["mean", "conv"] = "mean",
        start: Start = "identity",
    ) -> None:
        super().__init__(channels, start, paper_gamma=None)
        if window < 2:
            raise ValueError(f"multipole: window = {window}: at least 2, to cover the coarsest map")
        if weights not in ("code", "uniform"):
            raise ValueError(f"multipole: weights = {weights!r}: code or uniform")
        if sampling not in ("mean", "conv"):
            raise ValueError(f"multipole: sampling = {sampling!r}: mean or conv")
        self.weights = weights
        self.local = LocalAttention(channels, window=window, stride=stride, heads=heads, start="paper")
        self.down: nn.Module = nn.AvgPool2d(2)
        self.up: nn.Module = nn.Upsample(scale_factor=2)
        if sampling == "conv":
            self.down, self.up = (
                nn.Conv2d(channels, channels, 2, stride=2),
                nn.ConvTranspose2d(channels, channels, 2, 2),
            )

    def branch(self, x: Tensor) -> Tensor:
        levels = [x]
        while max(levels[-1].shape[2:]) > self.local.window:
            finest = levels[-1]
            levels.append(self.down(F.pad(finest, (0, finest.shape[3] % 2, 0, finest.shape[2] % 2), mode="replicate")))
        attended = [self.local.branch(level) for level in levels]
        total = attended[-1]
        for below, level in enumerate(reversed(attended[:-1]), start=1):
            coarse = self.up(total)[:, :, : level.shape[2], : level.shape[3]]
            total = level + (coarse / below if self.weights == "code" else coarse)
        return total
