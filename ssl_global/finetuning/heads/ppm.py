"""PSPNet's head: pyramid pooling of the last map, and a 1 x 1 convolution (Zhao et al. 2017,
https://arxiv.org/abs/1612.01105).

The module and where it departs from its source: ssl_global/attention/ppm.py. `width` and dropout are those of the
authors' code, where the backbone is dilated to a stride of 8 and an auxiliary head (auxiliary.py) stands beside it.
"""

from collections.abc import Sequence

from torch import Tensor

from ssl_global.attention.ppm import BINS, PyramidPooling
from ssl_global.finetuning.heads.base import Head, Logits, classifier


class PPM(Head):
    """bins: parts of the map along each axis.  width: channels of what joins them."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[float],
        num_classes: int,
        *,
        width: int = 512,
        dropout: float = 0.1,
        bins: tuple[int, ...] = BINS,
    ) -> None:
        super().__init__(channels, strides, num_classes)
        self.pool = PyramidPooling(channels[-1], width, bins=bins)
        self.classify = classifier(width, num_classes, dropout)

    def forward(self, features: list[Tensor]) -> Logits:
        return Logits(self.classify(self.pool(features[-1])), [])
