"""Cross-shaped windows: half of the heads attend within bands of rows, half within bands of columns (Dong et al. 2022,
"CSWin", https://arxiv.org/abs/2107.00652).

Positions come from a depth-wise 3 x 3 convolution of the values within each band, added to what attention gathers (the
paper's LePE). Parameters do not depend on the map's size.

Not as in the authors' code: maps need be neither square nor a multiple of the bands; padding is behind a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start, fused_attention, heads_for


class CrossShapedWindow(Residual):
    """
    stripe   rows, or columns, of a band
    heads    even, and must divide the channels; None: at least two, as many of 32 channels as go in
    """

    def __init__(self, channels: int, *, stripe: int = 7, heads: int | None = None, start: Start = "identity") -> None:
        super().__init__(channels, start, paper_gamma=None)
        if stripe < 1:
            raise ValueError(f"cross_shaped_window: stripe = {stripe}: at least 1")
        if channels % 2:
            raise ValueError(
                f"cross_shaped_window: {channels} channels: an even number, half for rows, half for columns"
            )
        heads = 2 * heads_for(channels // 2) if heads is None else heads
        if heads < 2 or heads % 2 or channels % heads:
            raise ValueError(f"cross_shaped_window: heads = {heads}: an even number that divides {channels} channels")
        self.stripe, self.heads_each = stripe, heads // 2
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        half = channels // 2
        self.positions = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1, groups=half) for _ in range(2))
        self.out = nn.Linear(channels, channels)

    def branch(self, x: Tensor) -> Tensor:
        places = x.permute(0, 2, 3, 1)
        of_rows, of_cols = self.qkv(self.norm(places)).unflatten(-1, (3, 2, -1)).unbind(4)  # (B, H, W, 3, C / 2) each
        rows = self.within_bands(of_rows, self.positions[0])
        cols = self.within_bands(of_cols.transpose(1, 2), self.positions[1], columns=True).transpose(1, 2)
        added: Tensor = self.out(torch.cat([rows, cols], dim=-1))
        return added.permute(0, 3, 1, 2)

    def within_bands(self, qkv: Tensor, positions: nn.Module, *, columns: bool = False) -> Tensor:
        """Attention within bands of the first axis: (B, H, W, 3, C / 2) -> (B, H, W, C / 2)."""
        length, stripe = qkv.shape[1], min(self.stripe, qkv.shape[1])
        below = -length % stripe
        bands = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, below)).unflatten(1, (-1, stripe)).flatten(0, 1)
        # (B * bands, stripe, W, 3, C / 2) -> (B * bands, heads, stripe * W, C / 2 / heads) each
        q, k, v = bands.flatten(1, 2).unflatten(-1, (self.heads_each, -1)).permute(2, 0, 3, 1, 4)
        there = torch.arange(length + below, device=qkv.device).view(-1, stripe) < length
        seen = there.repeat_interleave(qkv.shape[2], dim=1).repeat(qkv.shape[0], 1)[:, None, None]
        mixed = fused_attention(q, k, v, mask=seen).transpose(1, 2).flatten(2)
        values = bands[..., 2, :].permute(0, 3, 1, 2)  # (B * bands, C / 2, stripe, W)
        values = positions(values.transpose(2, 3)).transpose(2, 3) if columns else positions(values)
        joined = mixed + values.permute(0, 2, 3, 1).reshape(mixed.shape)
        return joined.unflatten(0, (qkv.shape[0], -1)).unflatten(2, (stripe, -1)).flatten(1, 2)[:, :length]
