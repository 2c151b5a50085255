"""A linear head: how much of the classes lies ready in the last map (Oquab et al. 2023, "DINOv2",
https://arxiv.org/abs/2304.07193, section 7.4).

Batch norm and a 1 x 1 convolution, as BNHead in the authors' dinov2/eval/segmentation. It has no width; its dropout is
theirs, none. Their "+ms", which joins four blocks and several scales, is not here.
"""

from collections.abc import Sequence

from torch import Tensor

from ssl_global.attention.base import BatchNorm
from ssl_global.finetuning.heads.base import Head, Logits, classifier


class Linear(Head):
    has_width = False

    def __init__(
        self, channels: Sequence[int], strides: Sequence[float], num_classes: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__(channels, strides, num_classes)
        self.norm = BatchNorm(channels[-1])
        self.classify = classifier(channels[-1], num_classes, dropout)

    def forward(self, features: list[Tensor]) -> Logits:
        return Logits(self.classify(self.norm(features[-1])), [])
