"""Neighbourhood attention: each place attends to the k x k nearest ones (Hassani et al. 2023, https://arxiv.org/abs/2204.07143).

Near an edge the neighbourhood slides inwards: a place has k x k neighbours everywhere, or the whole map where that is
smaller. In plain torch: keys and values of the neighbours are gathered, N k^2 of them, which trains on CPUs too.

Not as in the paper: no relative biases (the authors have dropped them from NATTEN's newer releases too).
"""

import torch
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start


class NeighbourhoodAttention(Residual):
    """kernel: k, odd.  heads: must divide the channels; None: as many of 32 channels as go in."""

    def __init__(self, channels: int, *, kernel: int = 7, heads: int | None = None, start: Start = "identity") -> None:
        super().__init__(channels, start, paper_gamma=None)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"neighbourhood: kernel = {kernel}: an odd number; the paper's is 7")
        self.kernel, self.heads = kernel, self.number_of_heads(heads)
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def branch(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        query, key, value = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1)).unbind(3)
        rows = neighbours(x.shape[2], self.kernel, x.device)  # (H, k)
        cols = neighbours(x.shape[3], self.kernel, x.device)  # (W, k)
        at = (slice(None), rows[:, None, :, None], cols[None, :, None, :])
        near = key[at].flatten(3, 4)  # (B, H, W, k * k, heads, C / heads)
        logits = torch.einsum("bhwnc,bhwknc->bhwnk", query, near) * query.shape[-1] ** -0.5
        mixed = torch.einsum("bhwnk,bhwknc->bhwnc", logits.softmax(-1).to(value.dtype), value[at].flatten(3, 4))
        added: Tensor = self.out(mixed.flatten(3))
        return added.permute(0, 3, 1, 2)


def neighbours(length: int, kernel: int, device: torch.device) -> Tensor:
    """Along one axis, the kernel places nearest to each place that lie on the map: (length, min(kernel, length))."""
    kernel = min(kernel, length)
    first = (torch.arange(length, device=device) - kernel // 2).clamp(0, length - kernel)
    return first[:, None] + torch.arange(kernel, device=device)
