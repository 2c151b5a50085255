"""Deformable attention: keys and values are read off where the image says, the same places for all queries (Xia et al.
2022, "DAT", https://arxiv.org/abs/2201.00520).

A grid of places, `stride` apart, is moved by offsets that a small network makes from the queries, for each group of
channels its own; the map is sampled there, and every place attends to the samples.

Not as in the authors' code: places are the middles of the grid's cells in torch's align_corners=False sense, so that a
grid of one place has one (theirs divides by zero); what is sampled beyond the edge is the edge; no relative biases,
whose table is bound to one size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start, fused_attention


class DeformableAttention(Residual):
    """
    stride   places of the map to one of the grid, along each axis
    groups   of channels, each with offsets of its own; must divide the channels
    reach    how far an offset may go, in cells of the grid
    heads    must divide the channels; None: as many of 32 channels as go in
    """

    def __init__(
        self,
        channels: int,
        *,
        stride: int = 4,
        groups: int = 1,
        reach: float = 2.0,
        heads: int | None = None,
        start: Start = "identity",
    ) -> None:
        super().__init__(channels, start, paper_gamma=None)
        if stride < 1:
            raise ValueError(f"deformable: stride = {stride}: at least 1")
        if groups < 1 or channels % groups:
            raise ValueError(f"deformable: groups = {groups}: does not divide {channels} channels")
        if reach <= 0:
            raise ValueError(f"deformable: reach = {reach}: above 0; the paper's is 1 to 5")
        self.heads = self.number_of_heads(heads)
        self.stride, self.groups, self.reach = stride, groups, reach
        width, kernel = channels // groups, stride + 1 + stride % 2  # odd, and wider than the stride
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Conv2d(channels, 2 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.look = nn.Conv2d(width, width, kernel, stride=stride, padding=kernel // 2, groups=width)
        self.look_norm = nn.LayerNorm(width)
        self.offset = nn.Linear(width, 2, bias=False)

    def branch(self, x: Tensor) -> Tensor:
        normal = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        query = self.query(normal)
        key, value = self.key_value(self.sampled(normal, query)).chunk(2, dim=1)
        q, k, v = (part.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for part in (query, key, value))
        mixed = fused_attention(q, k, v)  # (B, heads, H * W, C / heads)
        added: Tensor = self.out(mixed.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))
        return added

    def sampled(self, x: Tensor, query: Tensor) -> Tensor:
        """The map at the moved places: (B, C, h, w)."""
        looked = self.look(query.unflatten(1, (self.groups, -1)).flatten(0, 1)).permute(
            0, 2, 3, 1
        )  # (B * groups, h, w, c)
        offsets = self.offset(F.gelu(self.look_norm(looked))).tanh() * self.reach
        rows, cols = looked.shape[1:3]
        middles = [(torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) for n in (rows, cols)]
        places = torch.stack(torch.meshgrid(*middles, indexing="ij"), dim=-1) + offsets  # in cells
        grid = places / places.new_tensor([rows, cols]) * 2 - 1  # of the map, -1 to 1
        parts = x.unflatten(1, (self.groups, -1)).flatten(0, 1)
        # torch wants columns first.
        read = F.grid_sample(parts, grid.flip(-1).to(x.dtype), padding_mode="border", align_corners=False)
        return read.unflatten(0, (-1, self.groups)).flatten(1, 2)
