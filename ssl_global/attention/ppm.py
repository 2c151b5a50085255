"""Pyramid pooling: the map's means over 1, 2, 3 and 6 parts along each axis beside the map itself (Zhao et al. 2017,
"PSPNet", https://arxiv.org/abs/1612.01105).

As the authors' code: a 1 x 1 convolution, norm and ReLU for each pooled map, enlarged with aligned corners, and a 3 x 3
convolution over all of them together. (The source has neither norms nor the 3 x 3.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import BatchNorm, Mixed, Start

BINS = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """(B, channels, H, W) -> (B, out_channels, H, W): for a segmentation head."""

    def __init__(self, channels: int, out_channels: int, *, bins: tuple[int, ...] = BINS) -> None:
        super().__init__()
        if not bins or min(bins) < 1:
            raise ValueError(f"ppm: bins = {bins}: at least one number, each at least 1; the paper's are {BINS}")
        self.bins, each = bins, max(1, channels // len(bins))
        self.pooled = nn.ModuleList(convolution(channels, each, 1) for _ in bins)
        self.join = convolution(channels + each * len(bins), out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for bins, layer in zip(self.bins, self.pooled, strict=True):
            pooled = layer(F.adaptive_avg_pool2d(x, bins))
            parts.append(F.interpolate(pooled, size=x.shape[2:], mode="bilinear", align_corners=True))
        joined: Tensor = self.join(torch.cat(parts, dim=1))
        return joined


class PPM(Mixed):
    """The same within a backbone: as many channels out as in.  bins: parts of the map along each axis."""

    def __init__(self, channels: int, *, bins: tuple[int, ...] = BINS, start: Start = "identity") -> None:
        super().__init__(channels, start)
        self.pyramid = PyramidPooling(channels, channels, bins=bins)

    def mix(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.pyramid(x)
        return mixed


def convolution(channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, BatchNorm(out_channels), nn.ReLU())
