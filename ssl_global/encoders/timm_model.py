"""Any model of timm as an encoder that begins untrained: ResNet, ConvNeXt, Swin, ViT and their kin.

    TimmConfig(name="resnet18")    TimmConfig(name="convnext_atto")    TimmConfig(name="swin_tiny_patch4_window7_224")

It hides nothing, so it is for methods that show whole views. Where timm can, the model takes images of any size. What
`forward_features` gives is brought to patches by rows, however the model lays it out (attention/layout.py).
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import Tensor

from ssl_global.attention.layout import ImageSize, layout_of
from ssl_global.encoders.encoder import Tokens
from ssl_global.encoders.pretrained import Pretrained, PretrainedConfig, said_by
from ssl_global.errors import UserError, wrong
from ssl_global.recipe import EncoderConfig, Recipe


@dataclass(frozen=True, kw_only=True)
class TimmConfig(EncoderConfig):
    name: str = "resnet18"  # any architecture of timm
    model_args: str = "{}"  # for timm.create_model, as JSON

    def check(self, recipe: Recipe) -> None:
        plain(self).check(recipe)
        for group, crops in recipe.views.groups().items():
            try:
                look(self, recipe.views.globals.pixels, crops.pixels, recipe.data.channels)
            except UserError:
                raise
            except Exception as error:  # of many kinds, as many as timm has models
                reason = f"{self.name} does not take them: {said_by(error)}"
                raise wrong(f"views.{group}.pixels", crops.pixels, reason) from error

    def hides(self, masking: str) -> int | None:
        return None

    def build(self, recipe: Recipe) -> "TimmModel":
        return TimmModel(plain(self), pixels=recipe.views.globals.pixels, channels=recipe.data.channels)


def plain(config: TimmConfig) -> PretrainedConfig:
    """Without weights."""
    return PretrainedConfig(name=config.name, model_args=config.model_args, drop_path=config.drop_path)


@lru_cache
def look(config: TimmConfig, built_for: int, pixels: int, channels: int) -> None:
    """One forward pass without memory or content. Raises what the model raises."""
    with torch.device("meta"), torch.no_grad():
        TimmModel(plain(config), pixels=built_for, channels=channels).eval()(torch.zeros(2, channels, pixels, pixels))


class TimmModel(Pretrained):
    """See `Encoder`. Its patches may be of another width than its summary (MobileNet): `patch_width`."""

    def __init__(self, config: PretrainedConfig, *, pixels: int, channels: int) -> None:
        super().__init__(of_any_size(config), pixels=pixels, channels=channels)

    @property
    def patch_width(self) -> int:
        return int(self.model.num_features)

    def encode(
        self,
        images: Tensor,
        hidden: Tensor | None = None,
        *,
        num_hidden: int | None = None,
        replaced: Tensor | None = None,
        token: Tensor | None = None,
    ) -> Tokens:
        assert hidden is None, "hides nothing"
        assert replaced is None, "replaces nothing"
        features = self.model.forward_features(images)
        summary = self.model.forward_head(features, pre_logits=True)
        layout = layout_of(self.model, "", features, images, ImageSize(images.shape[2], images.shape[3]))
        if layout is None:
            raise UserError(f"encoder.name = {self.architecture}: its {tuple(features.shape)} is no map of the image")
        x = layout.to_map(features)
        return Tokens(summary=summary, patches=x.flatten(2).transpose(1, 2), grid=(x.shape[2], x.shape[3]))


def of_any_size(config: PretrainedConfig) -> PretrainedConfig:
    """timm's ViTs and Swins take one size of images unless they are told otherwise; its CNNs need not be told."""
    arguments: dict[str, Any] = json.loads(config.model_args) | {"dynamic_img_size": True}
    try:
        with torch.device("meta"):
            timm.create_model(config.name, num_classes=0, **arguments)
    except TypeError:
        return config
    return replace(config, model_args=json.dumps(arguments))
