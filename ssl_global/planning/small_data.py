"""What to change in a paper's recipe for fewer images than ImageNet has, each change with its source.

Sources, as they stood in November 2026:

    lightly-train    lightly-ai/lightly-train src/lightly_train/_methods/dino/dino.py@0520258: its `auto` values
    Imagenette       galilai-group/stable-pretraining benchmarks/imagenet10/RESULTS.md@11bedae: 9469 images, ViT-S/16,
                     200 epochs at 128 or 256 images a step, one A100: DINO k-NN 83.8, MAE 72.1
    ImageNet-100     vturrisi/solo-learn scripts/pretrain/imagenet-100/{dino_vit,mae}.yaml@07f8c3b: 126 689 images,
                     400 epochs at 2 x 128 images a step

A rule holds for a field that the recipe's method has, and never goes beyond the recipe: what is smaller already stays.
None of it is measured here, and none of it is for fine-tuning.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from ssl_global.encoders.pretrained import PretrainedConfig
from ssl_global.recipe import Recipe, flatten
from ssl_global.training.plan import images_together

FEW, IMAGENET = 20_000, 1_281_167  # images between which lightly-train's values rise, in a straight line
SMALL = 200_000  # images (ours): up to here what was done with ImageNet-100 is followed
PROTOTYPES = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16_384), (500_000, 32_768))
EPOCHS = ((FEW, 200, "Imagenette"), (SMALL, 400, "ImageNet-100"))
BATCH = 256
EVALUATIONS = 10  # of a run, at least (ours)


@dataclass(frozen=True)
class Choice:
    """A field that is better set otherwise for so few images."""

    field: str  # "method.prototypes"
    recipe: Any  # its value there
    value: Any
    why: str


def adapted(recipe: Recipe, images: int, gpus: int) -> tuple[Recipe, list[Choice]]:
    """The recipe for so many images, and what was changed. Given all of ImageNet, nothing is."""
    made: list[Choice] = []
    if images >= IMAGENET:
        return recipe, made
    for rule in (
        of_method,
        partial(of_length, gpus=gpus),
        of_warm_ups,
        of_looks,
    ):  # each sees what those before it have chosen
        have = flatten(recipe)
        choices = [Choice(name, have[name], value, why) for name, value, why in rule(recipe, images)]
        choices = [choice for choice in choices if choice.value != choice.recipe]
        recipe = changed(recipe, {choice.field: choice.value for choice in choices})
        made += choices
    return recipe, made


Proposed = Iterator[tuple[str, Any, str]]


def of_method(recipe: Recipe, images: int) -> Proposed:
    """Few images fill few prototypes, and a teacher that is not sharp, or slow to follow, collapses on them."""
    has = {field.name: getattr(recipe.method, field.name) for field in fields(recipe.method)}
    if "prototypes" in has:
        bucket = next((number for limit, number in PROTOTYPES if images <= limit), has["prototypes"])
        yield "method.prototypes", min(has["prototypes"], bucket), "lightly-train's step for so many images"
    if "teacher_temp" in has:
        last = round(between(images, FEW, IMAGENET, 0.02, 0.07), 2)
        first = min(last, round(between(last, 0.02, 0.07, 0.02, 0.04), 2))
        now = has["teacher_temp"]
        temps = (min(now[0], first), min(now[1], last)) if isinstance(now, tuple) else min(now, last)
        yield "method.teacher_temp", temps, "lightly-train: sharper, against collapse to one answer for all"
    if "teacher_momentum" in has:
        first = min(has["teacher_momentum"][0], round(between(images, FEW, IMAGENET, 0.99, 0.996), 3))
        yield "method.teacher_momentum", (first, has["teacher_momentum"][1]), "lightly-train: 0.996 is for ImageNet"


def of_length(recipe: Recipe, images: int, *, gpus: int) -> Proposed:
    """A short epoch must be repeated more often, and a step must not be a large part of it."""
    if isinstance(recipe.encoder, PretrainedConfig):
        return
    source = next(((epochs, name) for limit, epochs, name in EPOCHS if images <= limit), None)
    if source is None:
        return
    epochs, name = source
    if recipe.train.epochs is not None:
        yield "train.epochs", max(recipe.train.epochs, epochs), f"{epochs} at least, as {name} was learnt"
    together = gpus * images_together(recipe)
    batch = min(recipe.train.global_batch, max(BATCH // together, 1) * together)
    yield "train.global_batch", batch, f"about {BATCH} at most, as {name} was learnt"


def of_warm_ups(recipe: Recipe, images: int) -> Proposed:
    train = recipe.train
    epochs = train.epochs or (train.steps or 0) * train.global_batch / images
    yield "optim.warmup_epochs", min(recipe.optim.warmup_epochs, 0.1 * epochs), "lightly-train: at most a tenth"
    name = "teacher_temp_warmup_epochs"
    if (now := getattr(recipe.method, name, None)) is not None:
        yield f"method.{name}", min(now, 0.3 * epochs), "lightly-train: at most three tenths"


def of_looks(recipe: Recipe, images: int) -> Proposed:
    """A step is never far from the next evaluation, however short the run is."""
    steps = recipe.train.steps or (recipe.train.epochs or 0) * images / recipe.train.global_batch
    often = max(math.ceil(steps / EVALUATIONS), 1)
    yield "eval.every", min(recipe.eval.every, often), f"ours: {EVALUATIONS} times in the run"
    if recipe.explain.every is not None:
        yield "explain.every", min(recipe.explain.every, often), "ours: with each evaluation"


def between(at: float, low: float, high: float, first: float, last: float) -> float:
    """A straight line from `first` at `low` to `last` at `high`; flat outside."""
    share = min(max((at - low) / (high - low), 0.0), 1.0)
    return first + share * (last - first)


def changed(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with fields of its parts set: {"train.epochs": 200}."""
    for path, value in values.items():
        part, _, name = path.partition(".")
        recipe = replace(recipe, **{part: replace(getattr(recipe, part), **{name: value})})
    return recipe
