"""Fine-tuning for a class at each pixel: a pretrained backbone's maps, a head, cross-entropy and Dice.

    loss = pixel_loss(main) + sum over the head's auxiliary outputs of its weight * pixel_loss
           + 0.4 * pixel_loss(an auxiliary head on the last map but one)          (PSPNet; if `auxiliary`)

Layers of the backbone learn at rates that fall towards the input, and modes are as for classes (classify.py).
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from torch import Tensor

from ssl_global.attention.attach import placed
from ssl_global.encoders.pretrained import PretrainedConfig, load_all_but, takes_size, weights_of
from ssl_global.errors import UserError, wrong
from ssl_global.finetuning import heads
from ssl_global.finetuning.heads.auxiliary import WEIGHT
from ssl_global.finetuning.layers import layer_scales, layered, of_maps
from ssl_global.finetuning.losses import pixel_loss
from ssl_global.finetuning.segmenter import Segmenter, SegmenterSpec
from ssl_global.methods.method import Batch, Method, ParameterGroup
from ssl_global.recipe import MethodConfig, not_longer_than_run
from ssl_global.schedules import Progress

if TYPE_CHECKING:
    from ssl_global.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(MethodConfig):
    """Fine-tune for a class at each pixel."""

    head: str = "upernet"  # a file of ssl_global/finetuning/heads; --head sets it
    width: int | None = None  # channels of the head and of a ViT's pyramid; None: the papers'
    auxiliary: bool = True  # another head on the last map but one, learnt from beside
    classes: tuple[str, ...] = ()  # their names; without, as many as the masks hold
    dice: float = 1.0  # weight of the Dice loss beside cross-entropy
    mode: Literal["full", "probe", "gradual"] = "full"  # what is trained: all, what is new, or that first and then all
    frozen_epochs: float = 0.0  # of gradual: how long the backbone waits
    layer_decay: float = 0.65  # a layer's rate is the next one's times this; 1: all the same
    gate_lr_times: float = 10.0  # gates of attention modules learn so much faster than the rest (ours)
    overlap: float = 0.25  # of the windows in which large images are judged, as a share of their side (ours)

    def check(self, recipe: "Recipe") -> None:
        if recipe.views.globals.count != 1 or recipe.views.locals.count:
            raise wrong(
                "views.globals.count", recipe.views.globals.count, "1, and no local views: one view is learnt from"
            )
        for name in ("augment", "erase"):
            if getattr(recipe.views.globals, name):
                raise wrong(
                    f"views.globals.{name}", getattr(recipe.views.globals, name), "none: masks would not follow"
                )
        try:
            heads.head_class(self.head)
        except ValueError as error:
            raise UserError(f"method.head: {error}") from error
        if not 0 < self.layer_decay <= 1:
            raise wrong("method.layer_decay", self.layer_decay, "above 0, at most 1")
        if self.gate_lr_times <= 0:
            raise wrong("method.gate_lr_times", self.gate_lr_times, "above 0")
        if self.dice < 0:
            raise wrong("method.dice", self.dice, "0 or more")
        if not 0 <= self.overlap < 1:
            raise wrong("method.overlap", self.overlap, "at least 0, below 1")
        if (self.mode == "gradual") != (self.frozen_epochs > 0):
            raise wrong("method.frozen_epochs", self.frozen_epochs, "above 0 for method.mode gradual, 0 for the others")

    def check_durations(self, epochs: float) -> None:
        not_longer_than_run("method.frozen_epochs", self.frozen_epochs, epochs)

    def build(self, recipe: "Recipe") -> "Segment":
        return Segment(self, recipe)


class Segment(Method):
    def __init__(self, config: SegmentConfig, recipe: "Recipe") -> None:
        super().__init__()
        self.config = config
        self.model = self.new_backbone(recipe)
        self.frozen = config.mode == "probe"
        if self.frozen:
            self.model.requires_grad_(False)
            for part in self.model.new_parts():
                part.requires_grad_(True)

    def new_backbone(self, recipe: "Recipe") -> Segmenter:
        assert isinstance(recipe.encoder, PretrainedConfig)
        return Segmenter(spec_of(self.config, recipe.encoder, recipe.views.globals.pixels, recipe.data.channels))

    def begin_from(self, weights: str) -> None:
        """The run's first step starts from these weights."""
        backbone = self.model.backbone
        found = weights_of(weights, features_only=True, **self.model.model_args)
        load_all_but(list(self.model.attachment.places.values()), backbone, found, weights)

    def begin_step(self, progress: Progress) -> None:
        self.frozen = self.config.mode == "probe" or progress.epoch < self.config.frozen_epochs
        self.model.train(not self.frozen)  # batch norms of a frozen backbone stay what they were
        for part in self.model.new_parts():
            part.train()

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        target = batch["mask"]
        assert target is not None
        main, beside, auxiliary = self.model.model.all_logits(batch["views"][0])

        def loss_of(logits: Tensor) -> Tensor:
            return pixel_loss(logits, target, dice=self.config.dice)

        loss = loss_of(main)
        for logits in beside:
            loss = loss + self.model.model.head.auxiliary_weight * loss_of(logits)
        for logits in auxiliary:
            loss = loss + WEIGHT * loss_of(logits)
        counted = target != 255
        right = ((main.argmax(1) == target) & counted).sum() / counted.sum().clamp_min(1)
        return {"loss": loss, "train_pixel_accuracy": right}

    def gradients_done(self, progress: Progress) -> None:
        if self.frozen:
            new = {id(parameter) for part in self.model.new_parts() for parameter in part.parameters()}
            for parameter in self.model.parameters():
                if id(parameter) not in new:
                    parameter.grad = None

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


def spec_of(config: SegmentConfig, encoder: PretrainedConfig, pixels: int, channels: int) -> SegmenterSpec:
    arguments: dict[str, Any] = json.loads(encoder.model_args) | {"in_chans": channels}
    for name in ("global_pool", "fc_norm"):  # of a classifier
        arguments.pop(name, None)
    if takes_size(encoder.name, arguments):
        arguments["img_size"] = pixels
        arguments |= any_size(encoder.name)
    with torch.device("meta"):
        plain = timm.create_model(encoder.name, num_classes=0, **arguments)
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


def any_size(name: str) -> dict[str, Any]:
    """What makes timm's model take images of other sizes than it was built for, where it can."""
    options: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})
    for option in options:
        try:
            with torch.device("meta"):
                timm.create_model(name, num_classes=0, **option)
        except TypeError:
            continue
        return option
    return {}
