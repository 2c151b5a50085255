"""Swin with global tokens in the plain form: at the end of each stage, full attention among tokens and all patches.

The published idea written down as it reads and made to run: the tokens are put in front of all patches of the stage,
everything attends to everything at the stage's width, the result is added to what was there (normalised first, as in
Swin's blocks), and a linear layer makes the tokens as wide as the next stage. Its cost grows with the square of the
number of patches. The attention is fused: without it the weights of the first stage alone would not fit at 896 pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn


class FullAttentionSwin(nn.Module):
    """`body`, a Swin of timm, and G global tokens: (B, 3, H, W) -> logits (B, classes), by the mean of the patches."""

    def __init__(self, body: SwinTransformer, *, num_tokens: int) -> None:
        super().__init__()
        self.body = body
        widths = [info["num_chs"] for info in body.feature_info]
        stages: list[Any] = list(body.layers)
        heads = [stage.blocks[0].attn.num_heads for stage in stages]
        self.tokens = nn.Parameter(torch.zeros(1, num_tokens, widths[0]))
        self.attentions = nn.ModuleList(FullAttention(*sizes) for sizes in zip(widths, heads, strict=True))
        befores = [widths[0], *widths[:-1]]
        self.widen = nn.ModuleList(nn.Linear(before, width) for before, width in zip(befores, widths, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        x = self.body.patch_embed(images)
        tokens = self.tokens.expand(len(x), -1, -1)
        for stage, widen, attention in zip(self.body.layers, self.widen, self.attentions, strict=True):
            x = stage(x)
            both = torch.cat([widen(tokens), x.flatten(1, 2)], dim=1)
            both = both + attention(both)
            tokens, patches = both.split([tokens.shape[1], both.shape[1] - tokens.shape[1]], dim=1)
            x = patches.unflatten(1, x.shape[1:3])
        logits: Tensor = self.body.forward_head(self.body.norm(x))
        return logits


class FullAttention(nn.Module):
    """Multi-head attention of everything to everything, (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended
