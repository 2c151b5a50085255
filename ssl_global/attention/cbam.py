"""CBAM: channels are weighted, then places (Woo et al. 2018, https://arxiv.org/abs/1807.06521).

timm's module with the authors' biases, which equals their code once the two inputs of the spatial convolution are
swapped (mean, maximum; theirs is maximum, mean). timm's own header warns that results with it are mixed.
"""

from timm.layers.cbam import CbamModule
from torch import Tensor

from ssl_global.attention.base import BatchNorm, Gated, Start


class CBAM(Gated):
    """ratio: hidden channels as a share of all, at least one.  kernel_size: of the spatial convolution, odd."""

    def __init__(
        self, channels: int, *, ratio: float = 1 / 16, kernel_size: int = 7, start: Start = "identity"
    ) -> None:
        super().__init__(channels, start)
        if not 0 < ratio <= 1:
            raise ValueError(f"cbam: ratio = {ratio}: above 0, at most 1; the paper's is 1/16")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"cbam: kernel_size = {kernel_size}: an odd number; the paper's is 7")
        self.cbam = CbamModule(
            channels, rd_ratio=ratio, spatial_kernel_size=kernel_size, mlp_bias=True, gate_layer=self.gate_layer
        )
        self.cbam.spatial.conv.bn = BatchNorm(1)
        self.begin(self.cbam.channel.fc2)
        self.begin(self.cbam.spatial.conv.bn)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.cbam(x)
        return gated
