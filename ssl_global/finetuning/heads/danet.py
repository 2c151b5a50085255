"""DANet's head: position attention and channel attention side by side (Fu et al. 2019, https://arxiv.org/abs/1809.02983).

As the authors' code: each branch is convolution, attention, convolution; what they sum to is classified, and so is each
branch by itself, for two auxiliary losses of weight 1. The attentions begin as there, with one gamma of 0 each.

`width` is theirs at 2048 channels, of which they take a quarter.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from ssl_global.attention.channel import ChannelAttention
from ssl_global.attention.position import PositionAttention
from ssl_global.attention.ppm import convolution
from ssl_global.finetuning.heads.base import Head, Logits, classifier


class DANet(Head):
    """width: channels of both branches.  reduction: of position's query and key.  energy: of channel's; see both."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[float],
        num_classes: int,
        *,
        width: int = 512,
        dropout: float = 0.1,
        reduction: int = 8,
        energy: Literal["official", "paper"] = "official",
    ) -> None:
        super().__init__(channels, strides, num_classes)
        self.position = nn.Sequential(
            convolution(channels[-1], width, 3),
            PositionAttention(width, reduction=reduction, start="paper"),
            convolution(width, width, 3),
        )
        self.channel = nn.Sequential(
            convolution(channels[-1], width, 3),
            ChannelAttention(width, energy=energy, start="paper"),
            convolution(width, width, 3),
        )
        self.classify = classifier(width, num_classes, dropout)
        self.classify_position = classifier(width, num_classes, dropout)
        self.classify_channel = classifier(width, num_classes, dropout)

    def forward(self, features: list[Tensor]) -> Logits:
        position, channel = self.position(features[-1]), self.channel(features[-1])
        auxiliary = [self.classify_position(position), self.classify_channel(channel)]
        return Logits(self.classify(position + channel), auxiliary)
