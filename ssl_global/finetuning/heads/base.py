"""What every segmentation head offers: maps of a backbone, fine to coarse, in; logits at the maps' resolution out.

B  images    K  classes    h, w  rows and columns of the map that the logits are for
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Logits(NamedTuple):
    """auxiliary: what is learnt from beside the main ones, and not looked at later; as many in training as after."""

    main: Tensor  # (B, K, h, w)
    auxiliary: list[Tensor]  # each (B, K, ., .)


class Head(nn.Module):
    """
    channels, strides   of the maps, fine to coarse; a map's H and W may be anything, 1 x 1 with one image included

    Raises ValueError for numbers that cannot be.
    """

    has_width = True  # its maps have a number of channels to choose
    joins_scales = False  # it uses all maps, and wants them at several resolutions: else only the last
    auxiliary_weight = 1.0  # of each auxiliary output's loss beside the main one's

    def __init__(self, channels: Sequence[int], strides: Sequence[float], num_classes: int) -> None:
        super().__init__()
        check(self, channels, strides, num_classes)
        self.channels, self.strides, self.num_classes = list(channels), list(strides), num_classes

    def forward(self, features: list[Tensor]) -> Logits:
        raise NotImplementedError


def check(head: nn.Module, channels: Sequence[int], strides: Sequence[float], num_classes: int) -> None:
    name = type(head).__module__.rpartition(".")[2]
    if not channels or min(channels) < 1:
        raise ValueError(f"{name}: channels = {list(channels)}: of at least one map, each at least 1")
    if len(strides) != len(channels) or list(strides) != sorted(strides) or strides[0] <= 0:
        raise ValueError(f"{name}: strides = {list(strides)}: one for each of {len(channels)} maps, fine to coarse")
    if num_classes < 1:
        raise ValueError(f"{name}: num_classes = {num_classes}: at least 1")


def classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Drops whole channels in training, as the published heads do; then a 1 x 1 convolution."""
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))
