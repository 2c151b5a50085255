"""Three 3 x 3 convolutions whose taps lie 1, 2 and 4 places apart: 15 x 15 places in view (Yu and Koltun 2016,
https://arxiv.org/abs/1511.07122).

A norm and a ReLU after each; the source has neither, and three linear layers are one.
"""

from torch import Tensor, nn

from ssl_global.attention.base import BatchNorm, Mixed, Start


class Dilated(Mixed):
    """dilations: places between the taps of each convolution."""

    def __init__(self, channels: int, *, dilations: tuple[int, ...] = (1, 2, 4), start: Start = "identity") -> None:
        super().__init__(channels, start)
        if not dilations or min(dilations) < 1:
            raise ValueError(f"dilated: dilations = {dilations}: at least one number, each at least 1")
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, padding=d, dilation=d, bias=False), BatchNorm(channels), nn.ReLU()
                )
                for d in dilations
            )
        )

    def mix(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.layers(x)
        return mixed
