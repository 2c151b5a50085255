"""GCA: channels are weighted by a context that is gathered with attention (Cao et al. 2019, https://arxiv.org/abs/1904.11492).

timm's module in the form that multiplies; the paper's GC block adds the same context, of which timm's authors found the
product to do better ("gca" there).
"""

from timm.layers import GlobalContext
from torch import Tensor

from ssl_global.attention.base import Gated, Start


class GCA(Gated):
    """ratio: hidden channels as a share of all, at least one."""

    def __init__(self, channels: int, *, ratio: float = 1 / 8, start: Start = "identity") -> None:
        super().__init__(channels, start)
        if not 0 < ratio <= 1:
            raise ValueError(f"gca: ratio = {ratio}: above 0, at most 1")
        self.context = GlobalContext(channels, rd_ratio=ratio, gate_layer=self.gate_layer)
        self.begin(self.context.mlp_scale.fc2)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.context(x)
        return gated
