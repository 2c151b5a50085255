"""Any plain ViT of timm as an encoder (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929).

The model is timm's own, so its attention is the fused one and its weights need no conversion. What is added is
`encode(images, hidden)`: hidden patches are dropped after the positions are added and never enter a block, as in MAE.

Class token, registers and pooling are the named model's; `pool` chooses what stands for the whole image.
"""

import difflib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import timm
import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder, Tokens, replace_tokens, visible_index
from ssl_global.encoders.positions import sincos_positions
from ssl_global.errors import wrong
from ssl_global.recipe import EncoderConfig, Recipe, in_range


@dataclass(frozen=True, kw_only=True)
class VitConfig(EncoderConfig):
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
        x = self.model.patch_embed(images)  # (B, rows, cols, D): the grid is still there
        grid = (x.shape[1], x.shape[2])
        if replaced is not None:
            assert token is not None
            x = replace_tokens(x, replaced, token)
        x = self.model._pos_embed(x)  # (B, prefix + rows * cols, D)
        num_prefix = self.model.num_prefix_tokens
        visible_BN = None if hidden is None else visible_index(hidden, num_hidden)
        if visible_BN is not None:
            patches = x[:, num_prefix:].gather(1, visible_BN[:, :, None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, :num_prefix], patches], dim=1)
        x = self.model.norm_pre(x)
        recompute = self.recompute and torch.is_grad_enabled()
        x = checkpoint_seq(self.model.blocks, x) if recompute else self.model.blocks(x)
        x = self.model.norm(x)
        places = None if visible_BN is None else visible_BN[:, :, None]
        return Tokens(summary=self.model.pool(x), patches=x[:, num_prefix:], grid=grid, places=places)

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
