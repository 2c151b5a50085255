"""Global tokens: a few vectors that read all patches and are read by all, so that any patch reaches any other.

The idea is Longformer's (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150) and, for images, ViL's (Zhang et al.
2021, https://arxiv.org/abs/2103.15358). Where those put the tokens into the same softmax as the patches, here they have
two attentions of their own: a pretrained softmax is not diluted, and with its gate at 0 the patches stay as they were.

Letters, in this file only:

    B  images     N  patches     G  global tokens     C  channels     K  the bottleneck's width, C / 4 as a rule

Cost for an image: N C K 4 multiply-adds for the products and N G K 4 for the attentions: linear in N, where attention
among all patches would take N^2. Evidence: tests/attention/test_global_tokens.py and the tables in README.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import Attention, Start


class GlobalTokens(nn.Module):
    """Read: tokens attend to patches. Write: patches attend to the tokens, which by then know the image.

    Slowly, for one head, with s = 1 / sqrt(K):

        tokens_G  += out( sum over n of softmax_n(s q(norm(tokens_G)) . k(norm(patches_n))) * v(norm(patches_n)) )
        patches_n += gate * out'( sum over g of softmax_g(s q'(norm(patches_n)) . k'(norm'(tokens_g))) * v'(...) )

    bottleneck  K, the width of queries, keys and values
    heads       of each attention; must divide the bottleneck
    gate        what the write is multiplied with at first, in each channel: 0 leaves the patches bitwise as they are
    writes      False: the tokens read only
    """

    def __init__(self, channels: int, *, bottleneck: int, heads: int, gate: float, writes: bool = True) -> None:
        super().__init__()
        if bottleneck % heads:
            raise ValueError(f"{heads} heads do not divide a bottleneck of {bottleneck}")
        self.heads, self.bottleneck, self.writes = heads, bottleneck, writes
        self.norm_patches = nn.LayerNorm(channels)
        self.norm_tokens = nn.LayerNorm(channels)
        # Keys and values of the read and queries of the write see the same normalised patches: one product.
        self.of_patches = nn.Linear(channels, bottleneck * (3 if writes else 2))
        self.read_query = nn.Linear(channels, bottleneck)
        self.read_out = nn.Linear(bottleneck, channels)
        if writes:
            self.norm_read = nn.LayerNorm(channels)
            self.of_tokens = nn.Linear(channels, bottleneck * 2)
            self.write_out = nn.Linear(bottleneck, channels)
            self.gate = nn.Parameter(torch.empty(channels))
        self.first_gate = gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As timm's Swin initialises its own."""
        for module in self.children():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.writes:
            nn.init.constant_(self.gate, self.first_gate)

    def forward(self, patches: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) and (B, G, C) -> the same shapes. Any N and G, of each call."""
        keys, values, *write_query = self.of_patches(self.norm_patches(patches)).split(self.bottleneck, dim=-1)
        read = self.attend(self.read_query(self.norm_tokens(tokens)), keys, values)
        tokens = tokens + self.read_out(read)
        if self.writes:
            keys, values = self.of_tokens(self.norm_read(tokens)).chunk(2, dim=-1)
            written = self.gate * self.write_out(self.attend(write_query[0], keys, values))
            patches = patches + written.to(patches.dtype)  # under autocast the gate is wider than the patches
        return patches, tokens

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, M, K), (B, N, K), (B, N, K) -> (B, M, K), by heads."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GlobalTokenAttention(Attention):
    """The same for a map of any backbone: tokens of its own read all places, and all places read the tokens.

    tokens       G
    bottleneck   all channels divided by this are K, at least one
    """

    def __init__(self, channels: int, *, tokens: int = 8, bottleneck: int = 4, start: Start = "identity") -> None:
        super().__init__(channels, start)
        for option, value in (("tokens", tokens), ("bottleneck", bottleneck)):
            if value < 1:
                raise ValueError(f"global_tokens: {option} = {value}: at least 1")
        self.tokens = nn.Parameter(torch.empty(1, tokens, channels))
        nn.init.trunc_normal_(self.tokens, std=0.02)
        narrow = max(1, channels // bottleneck)
        self.mixer = GlobalTokens(channels, bottleneck=narrow, heads=1, gate=float(start == "paper"))

    def forward(self, x: Tensor) -> Tensor:
        patches, _ = self.mixer(x.flatten(2).transpose(1, 2), self.tokens.to(x.dtype).repeat(x.shape[0], 1, 1))
        written: Tensor = patches.transpose(1, 2).unflatten(2, x.shape[2:])
        return written

    def gate_parameters(self) -> list[nn.Parameter]:
        return [self.mixer.gate]
