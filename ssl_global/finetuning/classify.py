"""Fine-tuning for classes: a pretrained backbone, attention modules if they are wanted, and a linear classifier.

The settings are MAE's for fine-tuning (He et al. 2021, appendix A.1, facebookresearch/mae FINETUNE.md): layer-wise
decay of the learning rate, mixup or cutmix, label smoothing. timm's own parts do it (param_groups_layer_decay, Mixup).

    x'   = mix of two images, their targets in the same shares   (mixup, Zhang et al. 2018; cutmix, Yun et al. 2019)
    loss = mean over images of - sum over classes of target * log softmax(logits)

Where an image may have any number of classes, each is a question of its own (timm's BinaryCrossEntropy, weights apart):

    t    = target * (1 - smoothing) + smoothing / K
    loss = mean over images and classes of - weight * (t * log sigmoid(logit) + (1 - t) * log sigmoid(-logit))

Here a batch is mixed in pairs of neighbours, (0, 1), (2, 3)..., each pair by its own seed: so the run is the same on
any number of processes, which mixing a process's batch with its reverse, as usual, is not.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from ssl_global.data.randomness import seeded
from ssl_global.encoders.pretrained import Pretrained
from ssl_global.errors import wrong
from ssl_global.finetuning.layers import layered
from ssl_global.finetuning.tuned import Tuned, TunedConfig
from ssl_global.methods.layers import layer_scales
from ssl_global.methods.method import Batch, ParameterGroup
from ssl_global.methods.teacher import follow, move_teacher
from ssl_global.recipe import in_range
from ssl_global.schedules import Progress

if TYPE_CHECKING:
    from ssl_global.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(TunedConfig):
    """Fine-tune for classes."""

    smoothing: float = 0.1  # of the targets
    mixup: float = 0.8  # alpha; 0: never
    cutmix: float = 1.0  # alpha; 0: never
    average: float = 0.0  # momentum of a moving average of all weights, which is judged and exported; 0: none
    balance: bool = False  # weigh classes by the inverse of their images
    class_weights: tuple[float, ...] = ()  # mean 1 over the images, from the data, if `balance`
    multi_label: bool = False  # an image may have any number of classes: so if the data says it (data/several.py)

    def check(self, recipe: "Recipe") -> None:
        super().check(recipe)
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise wrong(f"method.{name}", getattr(self, name), "0 or more")
        if not 0 <= self.smoothing < 1:
            raise wrong("method.smoothing", self.smoothing, "at least 0, below 1")
        in_range("method.average", self.average, 0, 1)

    def images_together(self) -> int:
        return 2 if self.mixes else 1

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def build(self, recipe: "Recipe") -> "Classify":
        return Classify(self, recipe)


class Classify(Tuned):
    config: ClassifyConfig

    def __init__(self, config: ClassifyConfig, recipe: "Recipe") -> None:
        super().__init__(config, classifier(config, recipe))
        self.num_classes = len(config.classes)
        self.average = copy.deepcopy(self.model) if config.average else None
        if self.average is not None:
            follow(self.average, self.model)
        of_one = {"label_smoothing": config.smoothing, "num_classes": self.num_classes}
        of_the_pair = {"label_smoothing": 0.0, "num_classes": 2}  # in which shares: sets of classes are mixed by them
        self.mixup = Mixup(config.mixup, config.cutmix, **(of_the_pair if config.multi_label else of_one))
        weights = torch.tensor(config.class_weights or [1.0] * self.num_classes)
        self.class_weights: Tensor
        self.register_buffer("class_weights", weights, persistent=False)

    def new_backbone(self, recipe: "Recipe", what: str | None = None) -> Pretrained:
        return classifier(self.config, recipe)

    def begin_from(self, weights: str) -> None:
        """The run's first step starts from these weights."""
        self.model.begin_from(weights)
        if self.average is not None:
            follow(self.average, self.model)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images, targets = self.mix(batch["views"][0], batch["label"], batch["seeds"])
        logits = self.model.model(images).float()
        if self.config.multi_label:
            losses = F.binary_cross_entropy_with_logits(logits, targets, self.class_weights, reduction="none")
            return {"loss": losses.mean()}
        losses = -(targets * self.class_weights * F.log_softmax(logits, dim=1)).sum(1)
        right = logits.argmax(1) == targets.argmax(1)
        return {"loss": losses.mean(), "train_top1": right.float().mean()}

    def mix(self, images: Tensor, label: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Pairs of neighbours, each by its first's seed.

        images (B, C, H, W) and label int (B,), or uint8 (B, K) of 0 and 1 -> images, targets (B, K)
        """
        if not self.config.mixes:
            return images, self.targets(label)
        images, targets = images.clone(), []
        for first in range(0, len(images), 2):
            with seeded(seeds[first]):
                pair = slice(first, first + 2)
                if self.config.multi_label:
                    _, shares = self.mixup(images[pair], torch.arange(2, device=label.device))
                    target = shares.to(images.dtype) @ self.targets(label[pair])
                else:
                    _, target = self.mixup(images[pair], label[pair])  # the images in place
                targets.append(target)
        return images, torch.cat(targets)

    def targets(self, label: Tensor) -> Tensor:
        """(B, K) of labels, or of sets of them, of unmixed images."""
        smoothing = self.config.smoothing
        if self.config.multi_label:
            return label.float() * (1 - smoothing) + smoothing / self.num_classes
        smooth: Tensor = mixup_target(label, self.num_classes, smoothing=smoothing)
        return smooth

    def after_step(self, progress: Progress) -> None:
        if self.average is not None:
            move_teacher(self.average, self.model, self.config.average)
            for ours, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
                ours.copy_(theirs)

    def parameter_groups(self) -> list[ParameterGroup]:
        scales = layer_scales(self.model.model, self.config.layer_decay)
        return layered(self.model.model, self.model.attachment, scales, self.config.gate_lr_times)

    def backbones(self) -> dict[str, Any]:
        return ({"average": self.average} if self.average is not None else {}) | {"model": self.model}


def classifier(config: ClassifyConfig, recipe: "Recipe") -> Pretrained:
    encoder = recipe.encoder.build(recipe)
    assert isinstance(encoder, Pretrained)
    encoder.tell_apart(config.classes, multi_label=config.multi_label)
    return encoder
