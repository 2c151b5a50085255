"""Non-local block: each place gathers from all others (Wang et al. 2018, https://arxiv.org/abs/1711.07971).

Letters, in this file only:

    B  images     C  channels     K  inner channels     N  places that ask     M  places that are asked

The four modes of the paper, none with an N x M map in memory:

    embedded_gaussian   softmax over M of theta . phi / sqrt(K), by torch's fused attention
    gaussian            softmax over M of x . x / sqrt(C), likewise
    dot                 theta . phi / M: associative, so phi^T g is taken first
    concat              relu(w . [theta, phi]) / M = relu(a_n + b_m) / M: with b sorted, two running sums say all

The scale 1 / sqrt(K) is that of the authors' code, not in the paper's text; timm's takes sqrt(C) for it. As published
the last norm begins at 0, so the block is an identity; from start="identity" gamma is 0 instead and the norm at 1.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import BatchNorm, Residual, Start, fused_attention

MODES = ("embedded_gaussian", "gaussian", "dot", "concat")


class NonLocal(Residual):
    """
    mode         see above
    inner        K; None: half of the channels, at least 1
    sub_sample   places that are asked: the maxima of 2 x 2, as the paper does to save time
    """

    def __init__(
        self,
        channels: int,
        *,
        mode: Literal["embedded_gaussian", "gaussian", "dot", "concat"] = "embedded_gaussian",
        inner: int | None = None,
        sub_sample: bool = False,
        start: Start = "identity",
    ) -> None:
        super().__init__(channels, start, paper_gamma=None)
        if mode not in MODES:
            raise ValueError(f"non_local: mode = {mode!r}: one of {', '.join(MODES)}")
        if inner is not None and inner < 1:
            raise ValueError(f"non_local: inner = {inner}: at least 1 channel, or None for half of them")
        inner = max(1, channels // 2) if inner is None else inner
        self.mode, self.sub_sample = mode, sub_sample
        if mode != "gaussian":
            self.theta, self.phi = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        if mode == "concat":
            self.weigh = nn.Linear(2 * inner, 1, bias=False)
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = BatchNorm(channels)
        if start == "paper":
            nn.init.zeros_(self.norm.weight)

    def branch(self, x: Tensor) -> Tensor:
        asked = F.max_pool2d(x, 2, ceil_mode=True) if self.sub_sample else x
        value = places(self.value(asked))  # (B, M, K)
        query = places(x if self.mode == "gaussian" else self.theta(x))
        key = places(asked if self.mode == "gaussian" else self.phi(asked))
        if self.mode == "dot":
            gathered = query @ (key.transpose(1, 2) @ value) / value.shape[1]
        elif self.mode == "concat":
            of_query, of_key = self.weigh.weight[0].chunk(2)
            gathered = (sum_of_rectified(query @ of_query, key @ of_key, value) / value.shape[1]).to(value.dtype)
        else:
            gathered = fused_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return self.norm(self.out(gathered.transpose(1, 2).unflatten(2, x.shape[2:])))


def places(x: Tensor) -> Tensor:
    """(B, K, H, W) -> (B, H * W, K)."""
    return x.flatten(2).transpose(1, 2)


def sum_of_rectified(a_BN: Tensor, b_BM: Tensor, value_BMK: Tensor) -> Tensor:
    """(B, N, K): the sum over m of relu(a_n + b_m) * value_m, in float32, with memory for (N + M) K numbers.

    a_n + b_m is above 0 for the m whose b is largest: with b sorted, the sums over those are running sums, of value and
    of b * value, read off at the place where b falls below -a_n.
    """
    with torch.autocast(a_BN.device.type, enabled=False):
        wide = torch.promote_types(a_BN.dtype, torch.float32)
        a_BN, b_BM, value_BMK = a_BN.to(wide), b_BM.to(wide), value_BMK.to(wide)
        b_BM, order_BM = b_BM.sort(dim=1, descending=True)
        value_BMK = value_BMK.gather(1, order_BM[..., None].expand_as(value_BMK))
        both = torch.cat([value_BMK, b_BM[..., None] * value_BMK], dim=-1).cumsum(1)
        both = F.pad(both, (0, 0, 1, 0))  # of the first 0, 1, ... M
        above_BN = torch.searchsorted((-b_BM).contiguous(), a_BN.detach().contiguous())  # how many b_m are above -a_n
        of_value, of_product = both.gather(1, above_BN[..., None].expand(-1, -1, both.shape[-1])).chunk(2, dim=-1)
        return a_BN[..., None] * of_value + of_product
