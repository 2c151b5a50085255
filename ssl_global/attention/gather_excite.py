"""Gather-excite: gates from the means of regions (Hu et al. 2018, https://arxiv.org/abs/1810.12348).

Gather is a mean over overlapping regions, excite two 1 x 1 convolutions, and each place gets the gate of the nearest
region. With the whole map as one region it is SE. Written here: timm 1.0.31's fails with its defaults.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import Gated, Start


class GatherExcite(Gated):
    """
    extent   regions are 2 * extent - 1 wide and extent apart; None: one region, the whole map
    ratio    hidden channels as a share of all, at least one
    """

    def __init__(
        self, channels: int, *, extent: int | None = None, ratio: float = 1 / 16, start: Start = "identity"
    ) -> None:
        super().__init__(channels, start)
        if extent is not None and extent < 2:
            raise ValueError(f"gather_excite: extent = {extent}: at least 2, or None for the whole map")
        if not 0 < ratio <= 1:
            raise ValueError(f"gather_excite: ratio = {ratio}: above 0, at most 1; the paper's is 1/16")
        self.extent = extent
        hidden = max(1, int(channels * ratio))
        self.excite = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))
        self.gate = self.gate_layer()
        self.begin(self.excite[2])

    def forward(self, x: Tensor) -> Tensor:
        if self.extent is None:
            gathered = x.mean((2, 3), keepdim=True)
        else:
            gathered = F.avg_pool2d(
                x, 2 * self.extent - 1, self.extent, padding=self.extent - 1, count_include_pad=False
            )
        gates: Tensor = self.gate(F.interpolate(self.excite(gathered), size=x.shape[2:]))
        return x * gates
