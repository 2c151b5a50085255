"""UPerNet's head: a feature pyramid whose top is pooled as PSPNet's (Xiao et al. 2018, https://arxiv.org/abs/1807.10221).

From coarse to fine each map, made as wide by a 1 x 1 convolution, takes what is above it; a 3 x 3 convolution on each;
all at the resolution of the finest, beside each other, and a 3 x 3 over them. Of the paper's tasks this is the one that
tells objects.

As the authors' code: norm and ReLU after each convolution, and none of the 3 x 3 on the top, which ends in one. Not as
there: the pooled maps have a quarter of the channels each, not 512. `width` is the default of their class; Swin and
ConvNeXt report theirs with 512.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.ppm import BINS, PyramidPooling, convolution
from ssl_global.finetuning.heads.base import Head, Logits, classifier


class UPerNet(Head):
    """bins: parts of the top map along each axis.  width: channels of all maps of the pyramid."""

    joins_scales = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[float],
        num_classes: int,
        *,
        width: int = 256,
        dropout: float = 0.1,
        bins: tuple[int, ...] = BINS,
    ) -> None:
        super().__init__(channels, strides, num_classes)
        self.top = PyramidPooling(channels[-1], width, bins=bins)
        self.lateral = nn.ModuleList(convolution(each, width, 1) for each in channels[:-1])
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in channels[:-1])
        self.join = convolution(len(channels) * width, width, 3)
        self.classify = classifier(width, num_classes, dropout)

    def forward(self, features: list[Tensor]) -> Logits:
        above = self.top(features[-1])
        levels = [above]
        for level in reversed(range(len(features) - 1)):
            beside = self.lateral[level](features[level])
            above = beside + enlarged(above, like=beside)
            levels.append(self.smooth[level](above))
        joined = self.join(torch.cat([enlarged(level, like=above) for level in reversed(levels)], dim=1))
        return Logits(self.classify(joined), [])


def enlarged(x: Tensor, *, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
