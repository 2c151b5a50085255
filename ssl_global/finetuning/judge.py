"""How good a fine-tuned model is by now: on labelled images that it did not learn from."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssl_global.data.decode import BadImage, decode
from ssl_global.data.masks import IGNORED, Masks
from ssl_global.data.source import Source
from ssl_global.data.views import normalise
from ssl_global.errors import UserError
from ssl_global.evaluation.features import extract, own_share, share_of_this_process
from ssl_global.evaluation.judge import PRECISIONS
from ssl_global.finetuning.metrics import Classified, Labelled, Segmented
from ssl_global.finetuning.pictures import Shown
from ssl_global.inference.sliding_window import SlidingWindow
from ssl_global.recipe import Recipe

SHOWN = 8  # images whose masks are kept as pictures (ours)
SAID = ("top1", "top5", "mean_class_accuracy", "ece", "nll")


class ClassJudge:
    """See training.loop.Figures. The last evaluation's details stay in `last`, for tables and pictures."""

    def __init__(
        self, recipe: Recipe, train: Source | None, val: Source, device: torch.device, between: Callable[[], None]
    ) -> None:
        self.recipe, self.val, self.device, self.between = recipe, val, device, between
        self.last: Classified | Labelled | None = None

    def baselines(self, encoder: Any) -> dict[str, float]:
        """{"majority"}: how often the most frequent class would be right. {"map_chance"}: what map would be by chance,
        the mean of the classes' shares of the images."""
        if self.val.sets is not None:
            images = np.bincount(self.val.sets.members)
            return {"map_chance": float(images[images > 0].mean() / len(self.val))}
        assert self.val.labels is not None
        counts = torch.bincount(torch.from_numpy(self.val.labels))
        return {"majority": (counts.max() / counts.sum()).item()}

    def evaluate(self, encoder: Any, *, final: bool) -> dict[str, float]:
        training = encoder.training
        sets = self.val.sets
        seen = self.val if sets is None else numbered(self.val)
        logits = extract(
            self.forward(encoder.eval()), seen, data=self.recipe.data, pixels=encoder.pixels,
            batch=self.recipe.eval.batch, device=self.device, between=self.between,
        )  # fmt: skip
        encoder.train(training)
        if not logits.x.isfinite().all():
            raise UserError(
                "the model's answers are not finite: lower optim.lr_per_256_images, or train in fp32 or bf16"
            )
        assert logits.labels is not None
        if sets is not None:
            self.last = Labelled(num_classes=encoder.num_classes)
            targets = [sets.target(index, encoder.num_classes) for index in logits.labels.tolist()]
            self.last.update(logits.x, torch.from_numpy(np.stack(targets)))
            return self.last.figures()
        self.last = Classified(num_classes=encoder.num_classes)
        self.last.update(logits.x, logits.labels)
        figures = self.last.figures()
        return {name: figures[name] for name in SAID}

    def forward(self, encoder: Any) -> Callable[[Tensor], Tensor]:
        dtype = PRECISIONS[self.recipe.train.precision]

        def logits(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                answers: Tensor = encoder.model(images)
                return answers

        return logits

    def verdicts(self) -> list[str]:
        return []

    def note(self, metrics: dict[str, float]) -> None:
        """Nothing is warned of."""


def numbered(source: Source) -> Source:
    """The same images, each with its own number as its label: so it is known which could be read."""
    same = copy.copy(source)
    same.labels = np.arange(len(source))
    return same


class MaskJudge:
    """See training.loop.Figures. Each image as it is, in windows of the size that was trained on where it is larger."""

    def __init__(
        self,
        recipe: Recipe,
        val: Source,
        masks: Masks,
        device: torch.device,
        between: Callable[[], None],
        overlap: float,
    ) -> None:
        self.recipe, self.val, self.masks, self.device = recipe, val, masks, device
        self.between, self.overlap = between, overlap
        self.last: Segmented | None = None
        self.shown: list[Shown] = []

    def baselines(self, encoder: Any) -> dict[str, float]:
        """{"miou_untrained"}: of the head before its first step."""
        return {"miou_untrained": self.evaluate(encoder, final=False)["miou"]}

    def evaluate(self, encoder: Any, *, final: bool) -> dict[str, float]:
        training = encoder.training
        encoder.eval()
        window = encoder.pixels
        model = SlidingWindow(encoder.model, window, int(self.overlap * window), margin=0)
        self.last = Segmented(num_classes=encoder.num_classes, ignore_index=IGNORED, device="cpu")
        self.shown = []
        dtype = PRECISIONS[self.recipe.train.precision]
        data = self.recipe.data
        once = own_share(len(self.val))
        for turn, index in enumerate(share_of_this_process(np.arange(len(self.val)))):
            self.between()  # as often on every process
            if turn >= once:  # another counts it
                continue
            try:
                image = decode(self.val.read(int(index)), data.channels, data.max_pixels)
                mask = self.masks.read(int(index))
            except BadImage:
                continue  # as in training: what cannot be read is not judged
            images = normalise(image[None].to(self.device), *data.normalisation)
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            self.last.update(logits.float().cpu(), torch.from_numpy(mask)[None])
            if len(self.shown) < SHOWN:
                self.shown.append(Shown(image, mask, logits[0].argmax(0).to(torch.uint8).cpu().numpy()))
        if dist.is_initialized():
            sums = self.last.sums.to(self.device)
            dist.all_reduce(sums)
            self.last.sums = sums.cpu()
        encoder.train(training)
        figures = self.last.figures()
        return {name: figures[name] for name in ("miou", "pixel_accuracy", "mean_class_accuracy")}

    def verdicts(self) -> list[str]:
        return []

    def note(self, metrics: dict[str, float]) -> None:
        """Nothing is warned of."""
