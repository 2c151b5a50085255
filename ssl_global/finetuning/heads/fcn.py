"""A fully convolutional head: two 3 x 3 convolutions, each with norm and ReLU, and a 1 x 1 on the last map (Long et al.
2015, https://arxiv.org/abs/1411.4038).

What is called FCN today: the source has no norms, and adds up the logits of several maps. `width` is ours; those of
others are 256 to 512.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ssl_global.attention.ppm import convolution
from ssl_global.finetuning.heads.base import Head, Logits, classifier


class FCN(Head):
    """width: channels of both convolutions."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[float],
        num_classes: int,
        *,
        width: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(channels, strides, num_classes)
        self.convolve = nn.Sequential(convolution(channels[-1], width, 3), convolution(width, width, 3))
        self.classify = classifier(width, num_classes, dropout)

    def forward(self, features: list[Tensor]) -> Logits:
        return Logits(self.classify(self.convolve(features[-1])), [])
