"""Any plain ViT of timm as an encoder (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929).

The model is timm's own, so its attention is the fused one and its weights need no conversion. What is added is
`encode(images, hidden)`: hidden patches never enter a block, as in MAE, and are not embedded either: of a whole image
timm's convolution is used, of visible patches the same products as one matrix product.

Class token, registers and pooling are the named model's; `pool` chooses what stands for the whole image.
"""

import difflib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder, Tokens, replace_tokens, visible_index
from ssl_global.encoders.hiding import fit
from ssl_global.encoders.positions import sincos_positions
from ssl_global.errors import wrong
from ssl_global.recipe import PretrainableConfig, Recipe, in_range


@dataclass(frozen=True, kw_only=True)
class VitConfig(PretrainableConfig):
    """A timm ViT by name; what is None is as the name says."""

    name: str = "vit_small_patch16_224"  # any vit_* of timm that is a plain VisionTransformer
    patch: int | None = None  # side of a patch, in pixels
    width: int | None = None  # of a token
    depth: int | None = None  # blocks
    heads: int | None = None  # of attention, in each block
    registers: int | None = None  # extra tokens without a place (Darcet et al. 2023)
    pool: Literal["token", "avg"] = "token"  # the image's summary: the class token, or the mean of the patches
    positions: Literal["learned", "sincos"] = "learned"  # sincos: fixed, not trained

    def check(self, recipe: Recipe) -> None:
        self.check_beginning()
        named = named_model(self.name)
        for field in ("patch", "width", "depth", "heads"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise wrong(f"encoder.{field}", value, "at least 1, or None for the named model's own")
        if self.registers is not None and self.registers < 0:
            raise wrong("encoder.registers", self.registers, "0 or more")
        in_range("encoder.drop_path", self.drop_path, 0, 0.999)
        width = self.width or named.embed_dim
        heads = self.heads or named_heads(named)
        if width % heads:
            fit = [n for n in range(1, width + 1) if width % n == 0]
            nearest = min(fit, key=lambda n: (abs(n - heads), n))
            raise wrong("encoder.heads", heads, f"does not divide the width, {width}; {nearest} would")
        if self.positions == "sincos" and width % 4:
            raise wrong("encoder.width", width, "sine-cosine positions need a multiple of 4")
        if self.pool == "token" and named.cls_token is None:
            raise wrong("encoder.pool", self.pool, f"{self.name} has no class token; use avg")
        patch = self.patch or named.patch_embed.patch_size[0]
        for group, crops in recipe.views.groups().items():
            if crops.pixels % patch:
                down = crops.pixels // patch * patch
                fit = [n for n in (down, down + patch) if n]
                right = " or ".join(map(str, fit))
                raise wrong(
                    f"views.{group}.pixels", crops.pixels, f"not a multiple of the patch, {patch}; {right} would be"
                )

    def hides(self, masking: str) -> int | None:
        return self.patch or named_model(self.name).patch_embed.patch_size[0]

    def build(self, recipe: Recipe) -> "Vit":
        return Vit(self, pixels=recipe.views.globals.pixels, channels=recipe.data.channels)


@lru_cache
def named_model(name: str) -> VisionTransformer:
    """The model of that name without weights or memory, to ask its sizes. Raises UserError for one that is not ours."""
    if not name.startswith("vit_") or not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models("vit_*"), n=3)
        raise wrong("encoder.name", name, f"not a vit_* of timm; the nearest are {', '.join(nearest) or 'none'}")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    if type(model) is not VisionTransformer:
        raise wrong(
            "encoder.name", name, f"a {type(model).__name__}; this encoder is for timm's plain VisionTransformer"
        )
    if type(model.patch_embed) is not PatchEmbed:
        raise wrong(
            "encoder.name", name, "a ViT on another network, which would see hidden patches; TimmConfig is for it"
        )
    return model


def named_heads(model: VisionTransformer) -> int:
    heads = model.get_submodule("blocks.0.attn").num_heads
    assert isinstance(heads, int)
    return heads


class Vit(Encoder):
    """See `Encoder`. Built for square images of `pixels`; at other sizes the positions are resampled."""

    def __init__(self, config: VitConfig, *, pixels: int, channels: int) -> None:
        super().__init__()
        changed = {
            "patch_size": config.patch,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "reg_tokens": config.registers,
        }
        self.architecture = config.name
        self.model_args: dict[str, Any] = {name: value for name, value in changed.items() if value is not None} | {
            "img_size": pixels,
            "in_chans": channels,
            "global_pool": config.pool,
            "fc_norm": False,  # normalise, then pool: the patches that a decoder reads are normalised too
            "dynamic_img_size": True,
            "dynamic_img_pad": True,
        }
        model = timm.create_model(config.name, num_classes=0, drop_path_rate=config.drop_path, **self.model_args)
        assert isinstance(model, VisionTransformer)
        self.model: VisionTransformer = model
        self.pixels, self.channels = pixels, channels
        self.width = self.first_width = self.model.embed_dim
        self.patch = self.model.patch_embed.patch_size[0]
        self.num_globals = self.model.num_prefix_tokens
        self.recompute = False
        if config.positions == "sincos":
            fix_positions(self.model)

    def encode(
        self,
        images: Tensor,
        hidden: Tensor | None = None,
        *,
        num_hidden: int | None = None,
        replaced: Tensor | None = None,
        token: Tensor | None = None,
    ) -> Tokens:
        grid = (-(-images.shape[2] // self.patch), -(-images.shape[3] // self.patch))
        visible_BN = None if hidden is None else visible_index(hidden, num_hidden)
        if visible_BN is None:
            x = self.model.patch_embed(images)  # (B, rows, cols, D)
            if replaced is not None:
                assert token is not None
                x = replace_tokens(x, replaced, token)
            x = self.model._pos_embed(x)  # (B, prefix + rows * cols, D)
        else:
            patches = self.embed(images, visible_BN, grid)
            if replaced is not None:
                assert token is not None
                is_replaced = replaced.flatten(1).gather(1, visible_BN)
                patches = torch.where(is_replaced[:, :, None], token.to(patches.dtype), patches)
            x = self.place(patches, visible_BN, grid)
        x = self.model.norm_pre(x)
        recompute = self.recompute and torch.is_grad_enabled()
        x = checkpoint_seq(self.model.blocks, x) if recompute else self.model.blocks(x)
        x = self.model.norm(x)
        places = None if visible_BN is None else visible_BN[:, :, None]
        tokens, patches = x.tensor_split([self.num_globals], dim=1)
        return Tokens(summary=self.model.pool(x), patches=patches, grid=grid, places=places, globals=tokens)

    def embed(self, images: Tensor, visible_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the patch embedding makes of the visible patches, and of no others: (B, N, D)."""
        embedding, side = self.model.patch_embed, self.patch
        whole = fit(images, grid[0] * side, grid[1] * side)
        patches = rearrange(whole, "b c (r p) (s q) -> b (r s) (c p q)", p=side, q=side)
        visible = patches.gather(1, visible_BN[:, :, None].expand(-1, -1, patches.shape[2]))
        embedded: Tensor = embedding.norm(F.linear(visible, embedding.proj.weight.flatten(1), embedding.proj.bias))
        return embedded

    def place(self, patches: Tensor, visible_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """With their positions, behind the tokens that have no place."""
        nothing = self.model.patch_embed.proj.weight.new_zeros(1, *grid, self.width)
        prefix, positions = self.model._pos_embed(nothing).tensor_split([self.num_globals], dim=1)
        return torch.cat([prefix.expand(len(patches), -1, -1), patches + F.embedding(visible_BN, positions[0])], dim=1)

    def may_be_new(self, name: str) -> bool:
        return name == "reg_token"

    def recompute_activations(self) -> None:
        self.recompute = True


def fix_positions(model: VisionTransformer) -> None:
    """Sine-cosine positions in place of learned ones; tokens without a place get none (zeros)."""
    assert isinstance(model.pos_embed, nn.Parameter)
    positions = sincos_positions(model.patch_embed.grid_size, model.embed_dim)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, -len(positions) :] = positions
    model.pos_embed.requires_grad_(False)
