"""Coordinate attention: gates for each row and each column (Hou et al. 2021, https://arxiv.org/abs/2103.02907).

timm's module; hidden channels are rounded up to 8, as in the authors' code.
"""

from timm.layers.coord_attn import CoordAttn
from torch import Tensor

from ssl_global.attention.base import Gated, Start


class CoordinateAttention(Gated):
    """ratio: hidden channels as a share of all, at least eight."""

    def __init__(self, channels: int, *, ratio: float = 1 / 32, start: Start = "identity") -> None:
        super().__init__(channels, start)
        if not 0 < ratio <= 1:
            raise ValueError(f"coord: ratio = {ratio}: above 0, at most 1; the paper's is 1/32")
        self.coord = CoordAttn(channels, rd_ratio=ratio, se_factor=1, gate_layer=self.gate_layer)
        self.begin(self.coord.conv_h)
        self.begin(self.coord.conv_w)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.coord(x)
        return gated
