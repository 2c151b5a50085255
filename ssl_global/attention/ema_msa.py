"""Efficient multi-scale attention: gates from two branches that weigh each other (Ouyang et al. 2023,
https://arxiv.org/abs/2305.13563). No moving average: the paper's short name is EMA.

Channels are cut into groups. In each, one branch gates rows and columns and normalises, the other is a 3 x 3
convolution; the average of each, as a distribution over channels, sums up the other to one map, and the two maps make
the gate of each place. Written from the paper's formulas: its code has no licence.
"""

import torch
from torch import Tensor, nn

from ssl_global.attention.base import Mixed, Start


class EfficientMultiScaleAttention(Mixed):
    """groups: of channels, which it must divide; None: the largest number up to the paper's 32 that does."""

    def __init__(self, channels: int, *, groups: int | None = None, start: Start = "identity") -> None:
        super().__init__(channels, start)
        if groups is None:
            groups = max(n for n in range(1, min(32, channels) + 1) if channels % n == 0)
        if groups < 1 or channels % groups:
            raise ValueError(f"ema_msa: groups = {groups}: does not divide {channels} channels")
        self.groups, width = groups, channels // groups
        self.along = nn.Conv2d(width, width, 1)
        self.around = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(width, width)

    def mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        group = x.unflatten(1, (self.groups, -1)).flatten(0, 1)  # (B * groups, c, H, W)
        strips = torch.cat([group.mean(3, keepdim=True), group.mean(2, keepdim=True).transpose(2, 3)], dim=2)
        by_row, by_col = self.along(strips).sigmoid().split([height, width], dim=2)
        first = self.normalise(group * by_row * by_col.transpose(2, 3))
        second = self.around(group)
        gates = summed_up(first, second) + summed_up(second, first)  # (B * groups, 1, H, W)
        return (group * gates.sigmoid()).unflatten(0, (-1, self.groups)).flatten(1, 2)

    def normalise(self, x: Tensor) -> Tensor:
        """A single place has no deviation, and torch refuses it: it is 0 there, then scaled and shifted."""
        if x.shape[2:] == (1, 1):
            return torch.zeros_like(x) * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
        normal: Tensor = self.norm(x)
        return normal


def summed_up(weighing: Tensor, weighed: Tensor) -> Tensor:
    """(n, c, H, W) twice -> (n, 1, H, W): the softmax over channels of one's averages, times the other."""
    return (weighing.mean((2, 3), keepdim=True).softmax(1) * weighed).sum(1, keepdim=True)
