"""A depth-wise convolution with a very large kernel, trained beside a small one (Ding et al. 2022, "RepLKNet",
https://arxiv.org/abs/2203.06717).

timm's module, which equals the authors'. `merge` makes the two kernels and their norms one, for inference. The source
has neither the small kernel nor norms.
"""

from timm.models.fastvit import ReparamLargeKernelConv
from torch import Tensor, nn

from ssl_global.attention.base import BatchNorm, Mixed, Start


class LargeKernel(Mixed):
    """kernel, small_kernel: sides, odd."""

    def __init__(self, channels: int, *, kernel: int = 31, small_kernel: int = 5, start: Start = "identity") -> None:
        super().__init__(channels, start)
        if kernel % 2 == 0 or small_kernel % 2 == 0 or not 1 <= small_kernel <= kernel:
            raise ValueError(
                f"large_kernel: kernel = {kernel}, small_kernel = {small_kernel}: odd, the small one within"
            )
        self.conv = ReparamLargeKernelConv(
            channels, channels, kernel_size=kernel, stride=1, group_size=1, small_kernel=small_kernel
        )
        for module in self.conv.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = BatchNorm  # timm's has an activation, which is none here

    def mix(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.conv(x)
        return mixed

    def merge(self) -> None:
        """One convolution from now on, the same to rounding; not to be trained any more."""
        self.conv.reparameterize()
