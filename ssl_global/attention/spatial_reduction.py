"""Attention to a smaller map: keys and values from squares of places (Wang et al. 2021, "PVT",
https://arxiv.org/abs/2102.12122).

A strided convolution and a norm make the smaller map; parameters are named as timm's in pvt_v2, which equals the
authors'. A map that the squares do not divide is padded with zeros for it, so that maps smaller than a square work.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start


class SpatialReductionAttention(Residual):
    """
    reduction   side of a square; 1: attention of every place to every other
    heads       must divide the channels; None: as many of 32 channels as go in
    """

    def __init__(
        self, channels: int, *, reduction: int = 4, heads: int | None = None, start: Start = "identity"
    ) -> None:
        super().__init__(channels, start, paper_gamma=None)
        if reduction < 1:
            raise ValueError(f"spatial_reduction: reduction = {reduction}: at least 1")
        self.reduction, self.heads = reduction, self.number_of_heads(heads)
        self.norm_places = nn.LayerNorm(channels)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr, self.norm = nn.Conv2d(channels, channels, reduction, stride=reduction), nn.LayerNorm(channels)

    def branch(self, x: Tensor) -> Tensor:
        places = self.norm_places(x.permute(0, 2, 3, 1))  # (B, H, W, C)
        query = self.q(places).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(self.reduced(places)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        added: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return added.transpose(1, 2).unflatten(2, x.shape[2:])

    def reduced(self, places: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, M, C)."""
        if self.reduction == 1:
            return places.flatten(1, 2)
        below, right = -places.shape[1] % self.reduction, -places.shape[2] % self.reduction
        smaller = self.sr(F.pad(places.permute(0, 3, 1, 2), (0, right, 0, below)))
        normal: Tensor = self.norm(smaller.flatten(2).transpose(1, 2))
        return normal
