"""How good a fine-tuned classifier is by now: on labelled images that it did not learn from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssl_global.data.source import Source
from ssl_global.evaluation.features import extract
from ssl_global.evaluation.judge import PRECISIONS
from ssl_global.finetuning.metrics import Classified
from ssl_global.recipe import Recipe

SAID = ("top1", "top5", "mean_class_accuracy", "ece", "nll")


class ClassJudge:
    """See training.loop.Figures. The last evaluation's details stay in `last`, for tables and pictures."""

    def __init__(
        self, recipe: Recipe, train: Source | None, val: Source, device: torch.device, between: Callable[[], None]
    ) -> None:
        self.recipe, self.val, self.device, self.between = recipe, val, device, between
        self.last: Classified | None = None

    def baselines(self, encoder: Any) -> dict[str, float]:
        """{"majority"}: how often the most frequent class would be right."""
        assert self.val.labels is not None
        counts = torch.bincount(torch.from_numpy(self.val.labels))
        return {"majority": (counts.max() / counts.sum()).item()}

    def evaluate(self, encoder: Any, *, final: bool) -> dict[str, float]:
        training = encoder.training
        logits = extract(
            self.forward(encoder.eval()), self.val, data=self.recipe.data, pixels=encoder.pixels,
            batch=self.recipe.eval.batch, device=self.device, between=self.between,
        )  # fmt: skip
        encoder.train(training)
        assert logits.labels is not None
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
