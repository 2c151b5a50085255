"""SE: each channel is weighted by what all channels are on average (Hu et al. 2018, https://arxiv.org/abs/1709.01507).

timm's module, which equals torchvision's, with as many hidden channels as the paper has (timm rounds them up to 8). The
published gates are about 0.5 at first and halve a pretrained feature; from an identity they begin at 1.
"""

from timm.layers import SEModule
from torch import Tensor

from ssl_global.attention.base import Gated, Start


class SE(Gated):
    """ratio: hidden channels as a share of all, at least one."""

    def __init__(self, channels: int, *, ratio: float = 1 / 16, start: Start = "identity") -> None:
        super().__init__(channels, start)
        if not 0 < ratio <= 1:
            raise ValueError(f"se: ratio = {ratio}: above 0, at most 1; the paper's is 1/16")
        self.se = SEModule(channels, rd_ratio=ratio, rd_divisor=1, gate_layer=self.gate_layer)
        self.begin(self.se.fc2)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.se(x)
        return gated
