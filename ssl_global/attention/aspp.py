"""Atrous spatial pyramid pooling: convolutions with taps 12, 24 and 36 places apart beside the map's mean (Chen et al.
2017, "DeepLabv3", https://arxiv.org/abs/1706.05587).

torchvision's module, whose norms fail on the single value that the mean of one image is; here they do not. It drops
half of what it says while training, as published.
"""

from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3

from ssl_global.attention.base import BatchNorm, Mixed, Start

RATES = (12, 24, 36)


class ASPP(Mixed):
    """rates: places between the taps of each convolution; as many channels out as in."""

    def __init__(self, channels: int, *, rates: tuple[int, ...] = RATES, start: Start = "identity") -> None:
        super().__init__(channels, start)
        self.pyramid = pyramid(channels, channels, rates)

    def mix(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.pyramid(x)
        return mixed


def pyramid(channels: int, out_channels: int, rates: tuple[int, ...] = RATES) -> nn.Module:
    """(B, channels, H, W) -> (B, out_channels, H, W): for a segmentation head."""
    if not rates or min(rates) < 1:
        raise ValueError(f"aspp: rates = {rates}: at least one number, each at least 1; the paper's are {RATES}")
    module: nn.Module = deeplabv3.ASPP(channels, list(rates), out_channels)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.__class__ = BatchNorm
    return module
