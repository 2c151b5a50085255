"""CCNet's head: criss-cross attention, twice, on the last map (Huang et al. 2019, https://arxiv.org/abs/1811.11721).

As the authors' code: convolution, attention, convolution; the map beside that; convolution and classifier. There
activations are leaky, here ReLU; `width` is theirs at 2048 channels, of which they take a quarter. The attention begins
as there, with one gamma of 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssl_global.attention.criss_cross import CrissCross
from ssl_global.attention.ppm import convolution
from ssl_global.finetuning.heads.base import Head, Logits, classifier


class CCNet(Head):
    """width: channels of all convolutions.  reduction, recurrence: of the attention."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[float],
        num_classes: int,
        *,
        width: int = 512,
        dropout: float = 0.1,
        reduction: int = 8,
        recurrence: int = 2,
    ) -> None:
        super().__init__(channels, strides, num_classes)
        self.gather = nn.Sequential(
            convolution(channels[-1], width, 3),
            CrissCross(width, reduction=reduction, recurrence=recurrence, start="paper"),
            convolution(width, width, 3),
        )
        self.join = convolution(channels[-1] + width, width, 3)
        self.classify = classifier(width, num_classes, dropout)

    def forward(self, features: list[Tensor]) -> Logits:
        x = features[-1]
        joined = self.join(torch.cat([x, self.gather(x)], dim=1))
        return Logits(self.classify(joined), [])
