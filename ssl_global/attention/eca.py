"""ECA: each channel is weighted by its neighbours' averages (Wang et al. 2020, https://arxiv.org/abs/1910.03151).

timm's module: one small convolution over the channels, as wide as the paper's rule says for their number.
"""

from timm.layers import EcaModule
from torch import Tensor

from ssl_global.attention.base import Gated, Start


class ECA(Gated):
    def __init__(self, channels: int, *, start: Start = "identity") -> None:
        super().__init__(channels, start)
        self.eca = EcaModule(channels, gate_layer=self.gate_layer)
        self.begin(self.eca.conv)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.eca(x)
        return gated
