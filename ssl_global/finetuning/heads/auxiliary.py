"""A second, smaller head on the last map but one, for a loss there too (Zhao et al. 2017, "PSPNet",
https://arxiv.org/abs/1612.01105, section 3.3).

As the authors' code: a 3 x 3 convolution, norm and ReLU, and a 1 x 1. Its loss is added with the paper's weight. It can
stand beside any head: `Logits(main, [*auxiliary, beside(features)])`; after training it is thrown away.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ssl_global.attention.ppm import convolution
from ssl_global.finetuning.heads.base import check, classifier

WEIGHT = 0.4  # PSPNet, section 5.1


class AuxiliaryHead(nn.Module):
    """width: channels of the convolution, PSPNet's at the default."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[float],
        num_classes: int,
        *,
        width: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check(self, channels, strides, num_classes)
        if len(channels) < 2:
            raise ValueError("auxiliary: the backbone gives one map; this head is for the last but one")
        self.convolve = convolution(channels[-2], width, 3)
        self.classify = classifier(width, num_classes, dropout)

    def forward(self, features: list[Tensor]) -> Tensor:
        """(B, K, h, w) at the resolution of the last map but one."""
        logits: Tensor = self.classify(self.convolve(features[-2]))
        return logits
