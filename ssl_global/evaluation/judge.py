"""How good the backbone is by now: k-NN, probe and health, on images that it did not learn from."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ssl_global.data.source import Source
from ssl_global.encoders.encoder import Encoder
from ssl_global.evaluation.features import Features, extract, pixel_features, split
from ssl_global.evaluation.health import feature_std, rankme, verdicts
from ssl_global.evaluation.knn import knn
from ssl_global.evaluation.linear import linear
from ssl_global.recipe import Recipe

HEALTH_IMAGES = 4096  # where there are no labels: enough for the rank of any width that timm's ViTs have (ours)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Extractor(Protocol):
    """Features of a source: of all its images, or of `limit` evenly spread ones."""

    def __call__(self, source: Source, *, limit: int | None) -> Features: ...


class Judge:
    """Evaluates a method's backbone during a run.

    train  what the run learns from: the bank of the k-NN, if it has labels; None: it cannot be looked at twice
    val    what is asked about; None: the health figures are of the training images, and nothing is known of accuracy
    between  is called by all processes between two batches of images: the place to raise what ends an evaluation
    """

    def __init__(
        self,
        recipe: Recipe,
        train: Source | None,
        val: Source | None,
        device: torch.device,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.recipe = recipe
        self.train = train
        self.val = val
        self.device = device
        self.between = between
        self.noted: dict[str, float] = {}

    def baselines(self, encoder: Encoder) -> dict[str, float]:
        """What the untrained encoder and raw pixels reach: {"knn_untrained", "knn_pixels", "linear_untrained"}.

        Of a run that begins with weights: {"knn_start", "knn_pixels", "linear_start"}, without labels {"rankme_start"}.
        """
        began = "untrained" if self.recipe.encoder.weights is None else "start"
        if not self.has_labels() and began == "untrained":
            return {}
        judged = self.evaluate(encoder, final=True)
        self.noted = {}
        if not self.has_labels():
            return {f"rankme_{began}": judged["rankme"]} if judged else {}
        of_pixels = partial(
            pixel_features, data=self.recipe.data, batch=self.recipe.eval.batch, device=self.device,
            between=self.between,
        )  # fmt: skip
        figures = {f"{name}_{began}": judged[name] for name in ("knn", "linear") if name in judged}
        return figures | {"knn_pixels": self.accuracies(of_pixels, final=False)[0]["knn"]}

    def evaluate(self, encoder: Encoder, *, final: bool) -> dict[str, float]:
        """{"knn", "rankme", "feature_std"} of the encoder; "linear" too if `final` and the recipe says so."""
        if self.val is None and self.train is None:
            return {}
        training = encoder.training
        encoder.eval()
        features_of = self.extractor(encoder)
        if self.has_labels():
            judged, x = self.accuracies(features_of, final=final)
        else:
            seen = self.val or self.train
            assert seen is not None
            judged, x = {}, features_of(seen, limit=HEALTH_IMAGES).x
        encoder.train(training)
        judged |= {"rankme": rankme(x), "feature_std": feature_std(x)}
        self.note(judged | {"width": float(encoder.width)})
        return judged

    def accuracies(self, features_of: Extractor, *, final: bool) -> tuple[dict[str, float], Tensor]:
        """The figures that need labels, and the features (N, D) of the images asked about."""
        assert self.val is not None
        settings = self.recipe.eval
        parts = split(features_of, self.train, self.val, bank_images=settings.bank_images)
        figures = {"knn": knn(parts, neighbours=settings.knn_neighbours, temp=settings.knn_temp, device=self.device)}
        if final and settings.linear:
            figures["linear"] = linear(parts, device=self.device, seed=self.recipe.seed).top1
        return figures, parts.queries.x

    def extractor(self, encoder: Encoder) -> Extractor:
        dtype = PRECISIONS[self.recipe.train.precision]

        def embed(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                return encoder.encode(images).summary

        recipe = self.recipe
        return partial(
            extract,
            embed,
            data=recipe.data,
            pixels=encoder.pixels,
            batch=recipe.eval.batch,
            device=self.device,
            between=self.between,
        )

    def note(self, metrics: dict[str, float]) -> None:
        """Keep the newest figures for the verdicts."""
        self.noted |= metrics

    def verdicts(self) -> list[str]:
        """Warnings in plain words."""
        return verdicts(self.noted)

    def has_labels(self) -> bool:
        return self.val is not None and self.val.labels is not None
