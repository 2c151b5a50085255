"""A ViT as first published with DINO and MAE: attention unfused, softmax(q k) v with the whole matrix in memory.

Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929. Its tensors have timm's names, so that weights can be shared.
Positions at another size are resampled as timm does (bicubic, antialiased); the papers' codes differ there by a hair.
"""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1)) * self.scale
        x = (attention.softmax(dim=-1) @ v).transpose(1, 2).reshape(images, tokens, width)
        out: Tensor = self.proj(x)
        return out


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        patches: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return patches


class Vit(nn.Module):
    """(B, C, H, W) -> (B, 1 + N, D): the class token, then the patches."""

    def __init__(self, *, pixels: int, patch: int, channels: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch, self.grid = patch, pixels // patch
        self.patch_embed = PatchEmbedding(width, patch, channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, height: int, width: int) -> Tensor:
        size = (height // self.patch, width // self.patch)
        if size == (self.grid, self.grid):
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, new_size=list(size), old_size=[self.grid, self.grid])

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)
        return self.run(x + self.positions(*images.shape[2:]))

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out
