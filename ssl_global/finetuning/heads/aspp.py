"""DeepLabv3's head: atrous spatial pyramid pooling of the last map, a 3 x 3 and a 1 x 1 convolution (Chen et al. 2017,
https://arxiv.org/abs/1706.05587).

torchvision's DeepLabHead (ssl_global/attention/aspp.py says of what). The paper's taps are 6, 12 and 18 places apart on
a map of stride 16 and twice as many on one of stride 8: 96, 192 and 288 pixels. That is kept at any stride, also at 32,
which the paper does not try.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ssl_global.attention.aspp import pyramid
from ssl_global.attention.ppm import convolution
from ssl_global.finetuning.heads.base import Head, Logits

PIXELS_APART = (96, 192, 288)


class ASPP(Head):
    """
    width     channels of each part and of the 3 x 3 convolution
    dropout   of what the parts are joined to: torchvision's
    rates     places between the taps; None: by the stride, see above
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[float],
        num_classes: int,
        *,
        width: int = 256,
        dropout: float = 0.5,
        rates: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(channels, strides, num_classes)
        self.rates = rates_for(strides[-1]) if rates is None else rates
        self.pyramid = pyramid(channels[-1], width, self.rates)
        for part in self.pyramid.modules():
            if isinstance(part, nn.Dropout):
                part.p = dropout
        self.convolve = convolution(width, width, 3)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Logits:
        return Logits(self.classify(self.convolve(self.pyramid(features[-1]))), [])


def rates_for(stride: float) -> tuple[int, ...]:
    return tuple(max(1, round(pixels / stride)) for pixels in PIXELS_APART)
