"""Attention within windows that overlap, averaged where they do (Colagrande et al. 2025, https://arxiv.org/abs/2507.02748,
whose multipole attention is built of it; the windows of Swin where they do not overlap).

Windows reach over the edges as far as they must to cover every place; what is not on the map is behind a mask, and a
place is the mean of the windows that hold it. (In the source a quarter of a 16 x 16 map was 0 / 0.)
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start, fused_attention


class LocalAttention(Residual):
    """
    window   side of a window
    stride   places from one window to the next, at most its side; None: its side, no overlap
    heads    must divide the channels; None: as many of 32 channels as go in
    """

    def __init__(
        self,
        channels: int,
        *,
        window: int = 7,
        stride: int | None = None,
        heads: int | None = None,
        start: Start = "identity",
    ) -> None:
        super().__init__(channels, start, paper_gamma=None)
        self.window, self.stride = window, window if stride is None else stride
        if window < 1:
            raise ValueError(f"local: window = {window}: at least 1; the source's is 7")
        if not 1 <= self.stride <= window:
            raise ValueError(f"local: stride = {stride}: 1 to the window, {window}, or places would be left out")
        self.heads = self.number_of_heads(heads)
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def branch(self, x: Tensor) -> Tensor:
        height, width = (self.covered(size) for size in x.shape[2:])
        window, stride = (self.window, self.window), (self.stride, self.stride)
        projected = self.qkv(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # (B, 3C, H, W)
        there = x.new_ones(1, 1, *x.shape[2:])
        projected, there = (F.pad(part, (0, width - x.shape[3], 0, height - x.shape[2])) for part in (projected, there))
        pieces = F.unfold(projected, window, stride=stride)  # (B, 3C * A, windows)
        q, k, v = pieces.unflatten(1, (3, self.heads, -1, self.window**2)).permute(1, 0, 5, 2, 4, 3).flatten(1, 2)
        seen = F.unfold(there, window, stride=stride)[0].t().repeat(x.shape[0], 1)[:, None, None] > 0
        mixed = fused_attention(q, k, v, mask=seen)  # (B * windows, heads, A, C / heads)
        places = mixed.transpose(1, 2).flatten(2).unflatten(0, (x.shape[0], -1))  # (B, windows, A, C)
        added: Tensor = self.out(places).permute(0, 3, 2, 1).flatten(1, 2)
        count = F.fold(F.unfold(torch.ones_like(there), window, stride=stride), (height, width), window, stride=stride)
        total = F.fold(added, (height, width), window, stride=stride)
        return (total / count)[:, :, : x.shape[2], : x.shape[3]]

    def covered(self, size: int) -> int:
        """The least length of at least `size` that windows cover without a rest."""
        return self.window + max(0, ceil((size - self.window) / self.stride)) * self.stride
