"""Attention of every place to every other, as in a ViT's block (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929).

timm's attention, fused, after a layer norm, added to x. It takes the square of the number of places in time, not in
memory; it knows no positions.
"""

from timm.layers import Attention as TokenAttention
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start


class GlobalAttention(Residual):
    """heads: must divide the channels; None: as many of 32 channels as go in."""

    def __init__(self, channels: int, *, heads: int | None = None, start: Start = "identity") -> None:
        super().__init__(channels, start, paper_gamma=None)
        heads = self.number_of_heads(heads)
        self.norm = nn.LayerNorm(channels)
        self.attention = TokenAttention(channels, num_heads=heads, qkv_bias=True)

    def branch(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed: Tensor = self.attention(self.norm(tokens))
        return mixed.transpose(1, 2).unflatten(2, x.shape[2:])
