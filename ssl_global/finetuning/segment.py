"""Fine-tuning for a class at each pixel: a pretrained backbone's maps, a head, cross-entropy and Dice.

    loss = pixel_loss(main) + sum over the head's auxiliary outputs of its weight * pixel_loss
           + 0.4 * pixel_loss(an auxiliary head on the last map but one)          (PSPNet; if `auxiliary`)

Layers of the backbone learn at rates that fall towards the input (layers.py); tuned.py has the modes.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor

from ssl_global.attention.attach import placed
from ssl_global.data.masks import IGNORED
from ssl_global.encoders.pretrained import PretrainedConfig, load_all_but, said_by, takes_size, weights_of
from ssl_global.errors import UserError, wrong
from ssl_global.finetuning import heads
from ssl_global.finetuning.heads.auxiliary import WEIGHT
from ssl_global.finetuning.layers import layered, of_maps, plain_name
from ssl_global.finetuning.losses import pixel_loss
from ssl_global.finetuning.segmenter import Segmenter, SegmenterSpec
from ssl_global.finetuning.tuned import Tuned, TunedConfig
from ssl_global.methods.layers import layer_scales
from ssl_global.methods.method import Batch, ParameterGroup
from ssl_global.schedules import Progress

if TYPE_CHECKING:
    from ssl_global.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(TunedConfig):
    """Fine-tune for a class at each pixel."""

    head: str = "upernet"  # a file of ssl_global/finetuning/heads; --head sets it
    width: int | None = None  # channels of the head and of a ViT's pyramid; None: the papers'
    auxiliary: bool = True  # another head on the last map but one, learnt from beside
    output_stride: int | None = 8  # of the last map, where a head looks at it alone and convolutions can be dilated
    dice: float = 1.0  # weight of the Dice loss beside cross-entropy
    overlap: float = 0.25  # of the windows in which large images are judged, as a share of their side (ours)

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        for name in ("augment", "erase"):
            if getattr(recipe.views.globals, name):
                raise wrong(
                    f"views.globals.{name}", getattr(recipe.views.globals, name), "none: masks would not follow"
                )
        if recipe.data.images_per_class is not None:
            raise wrong("data.images_per_class", recipe.data.images_per_class, "None: an image's mask has many classes")
        try:
            heads.head_class(self.head)
        except ValueError as error:
            raise UserError(f"method.head: {error}") from error
        if self.output_stride not in (None, 8, 16, 32):
            raise wrong("method.output_stride", self.output_stride, "8 (PSPNet and its kin), 16, 32, or None")
        if self.dice < 0:
            raise wrong("method.dice", self.dice, "0 or more")
        if not 0 <= self.overlap < 1:
            raise wrong("method.overlap", self.overlap, "at least 0, below 1")

    def build(self, recipe: "Recipe") -> "Segment":
        return Segment(self, recipe)


class Segment(Tuned):
    config: SegmentConfig

    def __init__(self, config: SegmentConfig, recipe: "Recipe") -> None:
        super().__init__(config, segmenter(config, recipe))

    def new_backbone(self, recipe: "Recipe", what: str | None = None) -> Segmenter:
        return segmenter(self.config, recipe)

    def begin_from(self, weights: str) -> None:
        """The run's first step starts from these weights."""
        backbone = self.model.backbone
        found = weights_of(weights, features_only=True, **self.model.model_args)
        # An export with attention has the names of the whole model.
        found |= {key: found[plain] for key in backbone.state_dict() if (plain := plain_name(key)) in found}
        load_all_but(list(self.model.attachment.places.values()), backbone, found, weights)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        target = batch["mask"]
        assert target is not None
        main, beside, auxiliary = self.model.model.all_logits(batch["views"][0])

        def loss_of(logits: Tensor) -> Tensor:
            return pixel_loss(logits, target, ignore_index=IGNORED, dice=self.config.dice)

        loss = loss_of(main)
        for logits in beside:
            loss = loss + self.model.model.head.auxiliary_weight * loss_of(logits)
        for logits in auxiliary:
            loss = loss + WEIGHT * loss_of(logits)
        counted = target != IGNORED
        right = ((main.argmax(1) == target) & counted).sum() / counted.sum().clamp_min(1)
        return {"loss": loss, "train_pixel_accuracy": right}

    def parameter_groups(self) -> list[ParameterGroup]:
        with torch.device("meta"):
            plain = timm.create_model(self.model.architecture, num_classes=0, **self.model.model_args)
        scales = layer_scales(plain, self.config.layer_decay)
        backbone, prefix = self.model.backbone, "model.features.backbone."
        names = [name for name, _ in backbone.named_parameters()]
        mapped = {f"{prefix}{name}": scale for name, scale in of_maps(scales, names).items()}
        return layered(self.model, self.model.attachment, mapped, self.config.gate_lr_times)

    def backbones(self) -> dict[str, Any]:
        return {"model": self.model}


def segmenter(config: SegmentConfig, recipe: "Recipe") -> Segmenter:
    assert isinstance(recipe.encoder, PretrainedConfig)
    return Segmenter(spec_of(config, recipe.encoder, recipe.views.globals.pixels, recipe.data.channels))


def spec_of(config: SegmentConfig, encoder: PretrainedConfig, pixels: int, channels: int) -> SegmenterSpec:
    arguments: dict[str, Any] = json.loads(encoder.model_args) | {"in_chans": channels}
    for name in ("global_pool", "fc_norm"):  # of a classifier
        arguments.pop(name, None)
    try:
        if takes_size(encoder.name, arguments):
            arguments["img_size"] = pixels
            arguments |= accepted(encoder.name, {"dynamic_img_size": True}, {"strict_img_size": False})
        if config.output_stride is not None and not heads.head_class(config.head).joins_scales:
            arguments |= accepted(encoder.name, {"output_stride": config.output_stride})
        with torch.device("meta"):
            plain = timm.create_model(encoder.name, num_classes=0, **arguments)
    except Exception as error:  # of many kinds, whatever the arguments say
        raise UserError(f"encoder.name = {encoder.name}: cannot be built so: {said_by(error)}") from error
    try:
        chosen = placed(plain, encoder.attention)
    except ValueError as error:
        raise UserError(f"encoder.attention = {encoder.attention}: {error}") from error
    attention = {place: (one, {}) if isinstance(one, str) else one for place, one in chosen.items()}
    return SegmenterSpec(
        architecture=encoder.name, model_args=arguments, classes=config.classes, channels=channels, pixels=pixels,
        head=config.head, auxiliary=config.auxiliary, width=config.width, drop_path=encoder.drop_path,
        attention=attention,
    )  # fmt: skip


def accepted(name: str, *options: dict[str, Any]) -> dict[str, Any]:
    """The first of the options that timm's model can be built with; none of them: {}."""
    for option in options:
        try:
            with torch.device("meta"):
                timm.create_model(name, num_classes=0, **option)
        except (TypeError, NotImplementedError, AssertionError, ValueError):
            continue
        return option
    return {}
