"""Large kernel attention: gates from a decomposed 21 x 21 convolution (Guo et al. 2022, https://arxiv.org/abs/2202.09741).

A depth-wise 5 x 5, a depth-wise 7 x 7 with steps of 3, a 1 x 1; what they say multiplies x, without a sigmoid, as in
the paper. Together they see 23 x 23 places.
"""

from torch import Tensor, nn

from ssl_global.attention.base import Mixed, Start


class LKA(Mixed):
    """kernel, dilation: of the two depth-wise convolutions, odd; the paper's 5, and 7 with steps of 3."""

    def __init__(
        self, channels: int, *, kernel: tuple[int, int] = (5, 7), dilation: int = 3, start: Start = "identity"
    ) -> None:
        super().__init__(channels, start)
        if len(kernel) != 2 or any(size < 1 or size % 2 == 0 for size in kernel):
            raise ValueError(f"lka: kernel = {kernel}: two odd numbers; the paper's are 5 and 7")
        if dilation < 1:
            raise ValueError(f"lka: dilation = {dilation}: at least 1; the paper's is 3")
        near, far = kernel
        self.near = nn.Conv2d(channels, channels, near, padding=near // 2, groups=channels)
        self.far = nn.Conv2d(channels, channels, far, padding=far // 2 * dilation, dilation=dilation, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1)

    def mix(self, x: Tensor) -> Tensor:
        return x * self.point(self.far(self.near(x)))
