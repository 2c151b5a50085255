"""Criss-cross attention: each place gathers from its row and its column, twice (Huang et al. 2019, https://arxiv.org/abs/1811.11721).

Twice, with the same weights, any place reaches any other. One softmax over row and column together, in which the place
itself counts once; logits are not scaled, as in the authors' code. Memory and time are N (H + W), where attention among
all places would take N^2.

Letters, in this file only:

    B  images     H, W  rows and columns     K  channels of query and key     C  channels
"""

import torch
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start


class CrissCross(Residual):
    """
    reduction    channels of query and key are all divided by this, at least one
    recurrence   how often it is done, with the same weights; 1 sees row and column only
    """

    def __init__(self, channels: int, *, reduction: int = 8, recurrence: int = 2, start: Start = "identity") -> None:
        super().__init__(channels, start, paper_gamma=0.0)
        if reduction < 1:
            raise ValueError(f"criss_cross: reduction = {reduction}: at least 1; the paper's is 8")
        if recurrence < 1:
            raise ValueError(f"criss_cross: recurrence = {recurrence}: at least 1; the paper's is 2")
        self.recurrence = recurrence
        narrow = max(1, channels // reduction)
        self.query, self.key = nn.Conv2d(channels, narrow, 1), nn.Conv2d(channels, narrow, 1)
        self.value = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            x = self.add(x, self.branch(x))
        return x

    def branch(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        rows = torch.einsum("bkhw,bkhv->bhwv", query, key)  # to the places (h, v) of the same row
        cols = torch.einsum("bkhw,bkgw->bhwg", query, key)  # to the places (g, w) of the same column
        itself = torch.eye(x.shape[2], dtype=torch.bool, device=x.device)[:, None, :]  # already in its row
        weights = torch.cat([rows, cols.masked_fill(itself, float("-inf"))], dim=-1).softmax(-1).to(value.dtype)
        of_row, of_col = weights.split([x.shape[3], x.shape[2]], dim=-1)
        return torch.einsum("bhwv,bchv->bchw", of_row, value) + torch.einsum("bhwg,bcgw->bchw", of_col, value)
