"""Neighbourhood attention: each place attends to the k x k nearest ones (Hassani et al. 2023, https://arxiv.org/abs/2204.07143).

Near an edge the neighbourhood slides inwards: a place has k x k neighbours everywhere, or the whole map where that is
smaller. On CUDA by NATTEN, the authors' kernels, if that is installed; else keys and values of the neighbours are
gathered, N k^2 of them, in plain torch, which trains on CPUs too. Both are the same attention (tested where NATTEN is).

Not as in the paper: no relative biases (the authors have dropped them from NATTEN's newer releases too).
"""

import importlib.util

import torch
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start

HAS_NATTEN = importlib.util.find_spec("natten") is not None


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
        fits = 1 < self.kernel <= min(x.shape[2:])  # NATTEN takes no others
        attend = by_natten if HAS_NATTEN and x.is_cuda and fits else by_gathering
        added: Tensor = self.out(attend(query, key, value, self.kernel).flatten(3))
        return added.permute(0, 3, 1, 2)


def by_gathering(query: Tensor, key: Tensor, value: Tensor, kernel: int) -> Tensor:
    """Each (B, H, W, heads, channels of a head)."""
    rows = neighbours(query.shape[1], kernel, query.device)  # (H, k)
    cols = neighbours(query.shape[2], kernel, query.device)  # (W, k)
    at = (slice(None), rows[:, None, :, None], cols[None, :, None, :])
    near = key[at].flatten(3, 4)  # (B, H, W, k * k, heads, channels of a head)
    logits = torch.einsum("bhwnc,bhwknc->bhwnk", query, near) * query.shape[-1] ** -0.5
    return torch.einsum("bhwnk,bhwknc->bhwnc", logits.softmax(-1).to(value.dtype), value[at].flatten(3, 4))


def by_natten(query: Tensor, key: Tensor, value: Tensor, kernel: int) -> Tensor:
    from natten.functional import na2d

    attended: Tensor = na2d(query, key, value, kernel_size=kernel)
    return attended


def neighbours(length: int, kernel: int, device: torch.device) -> Tensor:
    """Along one axis, the kernel places nearest to each place that lie on the map: (length, min(kernel, length))."""
    kernel = min(kernel, length)
    first = (torch.arange(length, device=device) - kernel // 2).clamp(0, length - kernel)
    return first[:, None] + torch.arange(kernel, device=device)
