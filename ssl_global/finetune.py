"""The second job: from a backbone to a model that classifies. How it goes is in training/job.py.

accelerate launch finetune.py --backbone runs/dino/export --data photos/ --val val/ --attention non_local
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from accelerate import Accelerator

from ssl_global import command_line
from ssl_global.command_line import Command, option
from ssl_global.data.masks import Masks
from ssl_global.data.sample import built_in_shapes
from ssl_global.data.source import Source, open_source
from ssl_global.data.stream import Stream
from ssl_global.encoders.pretrained import PretrainedConfig, of_backbone
from ssl_global.errors import UserError, wrong
from ssl_global.export import export
from ssl_global.finetuning.classify import Classify, ClassifyConfig
from ssl_global.finetuning.judge import ClassJudge, MaskJudge
from ssl_global.finetuning.pictures import keep as keep_figures
from ssl_global.finetuning.pictures import predictions_picture
from ssl_global.finetuning.segment import Segment, SegmentConfig
from ssl_global.methods.method import Method
from ssl_global.recipe import Recipe
from ssl_global.training.job import Job, do

MOST_CLASSES = 2**20  # ours: of numbered labels without names
MOST_OF_SETS = 2**13  # ours: each class is judged by a curve of 256 KB


@dataclass(frozen=True, kw_only=True)
class Finetune(Command):
    """Fine-tune a backbone on images with labels, or with masks.

    Without --data it runs the recipe's demo() on a built-in sample of photographs, with --task segment segment_demo();
    with it, recipe() or segment(), the papers' settings. A recipe given as a .py file is a program: it is run.
    """

    backbone: str | None = None  # an export's or a run's folder, or a timm name: with its .tag pretrained
    task: Literal["classify", "segment"] = "classify"  # a class for each image, or for each pixel
    head: str | None = None  # of --task segment: linear, fcn, ppm, aspp, danet, ccnet, upernet
    masks: str | None = None  # of --task segment: PNG files of class numbers named as --data's images, or shards
    val_masks: str | None = None  # the same for --val
    attention: tuple[str, ...] = ()  # modules to put in: non_local, PLACE=MODULE, 'PLACE=MODULE(option=value)'

    program: ClassVar[str] = "finetune.py"
    usual_recipe: ClassVar[str | None] = "finetune"

    @classmethod
    def function(cls, argv: list[str]) -> str:
        demo = option(argv, "--data") is None
        if option(argv, "--task") == "segment":
            return "segment_demo" if demo else "segment"
        return "demo" if demo else "recipe"

    def filled_in(self) -> Self:
        settings = self.settings
        encoder, method = settings.encoder, settings.method
        kind = {"classify": ClassifyConfig, "segment": SegmentConfig}[self.task]
        if not isinstance(encoder, PretrainedConfig):
            raise UserError(f"--recipe {self.recipe}: a recipe for pretrain.py; finetune would be right")
        if not isinstance(method, kind):
            raise UserError(f"--task {self.task}: the recipe {self.recipe} is for another task")
        if self.attention:
            encoder = replace(encoder, attention=self.attention)
        if self.backbone is not None:
            encoder = of_backbone(encoder, self.backbone)
        if isinstance(method, SegmentConfig):
            if self.head is not None:
                method = replace(method, head=self.head)
            paths = (self.data, self.masks, self.val, self.val_masks)
            if None in paths and any(paths):
                raise UserError("--task segment needs --data, --masks, --val and --val-masks")
        elif given := [name for name in ("head", "masks", "val_masks") if getattr(self, name) is not None]:
            raise UserError(f"--{given[0].replace('_', '-')} is of --task segment")
        elif self.data is not None and self.val is None:
            raise UserError("--val is missing: labelled images to judge on, a folder with class folders, or shards")
        return replace(self, settings=replace(settings, encoder=encoder, method=method))


def main(argv: Sequence[str] | None = None) -> None:
    command_line.main(Finetune, finetune, argv)


def finetune(command: Finetune, overridden: dict[str, object]) -> None:
    do(segment_job(command) if command.task == "segment" else CLASSIFY, command, overridden)


# ------------------------------------------------------------------------------------------------------------- classes


def settle(recipe: Recipe, train: Source | Stream, val: Source | None) -> Recipe:
    """The classes are the data's."""
    method = recipe.method
    assert isinstance(method, ClassifyConfig)
    assert isinstance(train, Source), "the settings refuse a stream"
    assert val is not None
    multi_label = train.sets is not None
    if method.multi_label and not multi_label:
        raise wrong("method.multi_label", True, f"--data {train.path} says one class for each image")
    classes = classes_of_sets(train, val) if multi_label else classes_of(train)
    if not multi_label:
        refuse_other_classes(classes, train, val)
    weights: tuple[float, ...] = ()
    if method.balance:
        labels = train.labels if train.sets is None else train.sets.members
        assert labels is not None
        counts = np.bincount(labels, minlength=len(classes))
        weights = tuple((len(labels) / (len(classes) * np.maximum(counts, 1))).tolist())
    return replace(recipe, method=replace(method, classes=classes, class_weights=weights, multi_label=multi_label))


def classes_of_sets(train: Source, val: Source) -> tuple[str, ...]:
    """Names of the classes of which an image has any number. The labels of `val`, which may lack some of them, get the
    numbers that they have in `train`. Raises UserError for no class at all, and for others than there are in `train`.
    """
    if not train.classes:
        raise UserError(f"--data {train.path}: no image has any class: nothing to tell apart")
    if len(train.classes) > MOST_OF_SETS:
        raise UserError(f"--data {train.path}: {len(train.classes)} classes; {MOST_OF_SETS} at most, of sets")
    if twice := [name for name in train.classes if train.classes.count(name) > 1]:
        raise UserError(f"--data {train.path}: two classes are called {twice[0]!r}")
    if val.sets is None:
        raise UserError(f"--val {val.path}: says no sets of classes, as {train.path} does (labels.csv)")
    number = {name: k for k, name in enumerate(train.classes)}
    if besides := sorted(set(val.classes or ()) - number.keys()):
        raise UserError(f"--val {val.path}: other classes than {train.path}: has {', '.join(besides[:3])}")
    if not val.classes:
        raise UserError(f"--val {val.path}: no image has any class: nothing to judge by")
    val.sets, val.classes = val.sets.renumbered([number[name] for name in val.classes]), train.classes
    return tuple(train.classes)


def classes_of(source: Source) -> tuple[str, ...]:
    """Names of the classes, or their numbers. Raises UserError for images without labels, and for one class only."""
    if source.labels is None:
        raise UserError(
            f"--data {source.path}: no labels; a folder of class folders would be right, or labelled shards"
        )
    if not 0 <= source.labels.min() <= source.labels.max() < MOST_CLASSES:
        raise UserError(f"--data {source.path}: holds the label {source.labels.max()}; classes are numbered from 0")
    classes = tuple(source.classes or map(str, range(int(source.labels.max()) + 1)))
    if len(np.unique(source.labels)) < 2:
        raise UserError(f"--data {source.path}: one class only, {classes[source.labels[0]]!r}: nothing to tell apart")
    return classes


def refuse_other_classes(classes: tuple[str, ...], train: Source, val: Source) -> None:
    if val.labels is None:
        raise UserError(f"--val {val.path}: no labels to judge with")
    if train.classes and val.classes and tuple(val.classes) != classes:
        lacking, besides = sorted(set(classes) - set(val.classes)), sorted(set(val.classes) - set(classes))
        said = [f"{word} {', '.join(names[:3])}" for word, names in (("lacks", lacking), ("has", besides)) if names]
        how = " and ".join(said) or "the same ones in another order"
        raise UserError(f"--val {val.path}: other classes than {train.path}: {how}")
    if val.labels.min() < 0 or val.labels.max() >= len(classes):
        raise UserError(
            f"--val {val.path}: holds the label {val.labels.max()}; {train.path} has {len(classes)} classes"
        )


def begin(method: Method, recipe: Recipe) -> list[str]:
    assert isinstance(method, Classify | Segment)
    assert isinstance(recipe.encoder, PretrainedConfig)
    if recipe.encoder.weights is not None:
        method.begin_from(recipe.encoder.weights)
    return []


def say_baselines(figures: dict[str, float]) -> str:
    if "map_chance" in figures:
        return f"before training: by chance the mean average precision would be {figures['map_chance']:.3f}\n"
    return f"before training: the most frequent class would be right {figures['majority']:.3f} of the time\n"


def say_summary(figures: dict[str, Any]) -> list[str]:
    done = f"done: {figures['steps']} steps, {figures['images']} images in {figures['seconds']:.0f} s of training"
    if "map" in figures:
        precision = f"mean average precision {figures['map']:.3f}, by chance {figures['map_chance']:.3f}"
        f1 = f"F1 {figures['f1_micro']:.3f} of all answers, {figures['f1_macro']:.3f} by class"
        return [done, f"{precision}; {f1}", f"export {figures['export']}"]
    right = (
        f"top-1 {figures['top1']:.3f}, top-5 {figures['top5']:.3f}, the most frequent class {figures['majority']:.3f}"
    )
    return [done, f"{right}; calibration error {figures['ece']:.3f}", f"export {figures['export']}"]


def keep(judge: Any, encoder: Any, out: Path) -> None:
    keep_figures(judge.last, encoder.classes, out)


CLASSIFY = Job(
    settle=settle, begin=begin, judge=ClassJudge, export=export, figures=("top1", "top5", "ece"),
    say_baselines=say_baselines, say_summary=say_summary, keep=keep,
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- pixels


class Segmentation:
    """The parts of the job that know the masks."""

    def __init__(self, command: Finetune) -> None:
        self.command = command
        self.masks: Masks | None = None
        self.val_masks: Masks | None = None

    def open(self, command: Command, accelerator: Accelerator) -> tuple[Source | Stream, Source | None]:
        if command.data is None:
            with accelerator.local_main_process_first():  # it writes the sample, the others find it
                paths = built_in_shapes()
        else:
            paths = {name: str(getattr(self.command, name)) for name in ("data", "masks", "val", "val_masks")}
        train, val = open_source(paths["data"]), open_source(paths["val"])
        self.masks, self.val_masks = Masks(paths["masks"], train), Masks(paths["val_masks"], val)
        return train, val

    def settle(self, recipe: Recipe, train: Source | Stream, val: Source | None) -> Recipe:
        """The classes are the masks'."""
        method = recipe.method
        assert isinstance(method, SegmentConfig)
        assert self.masks is not None
        assert self.val_masks is not None
        visible = os.environ.get("RANK", "0") == "0"
        count = self.masks.check(recipe.data, num_classes=len(method.classes) or None, visible=visible)
        self.val_masks.check(recipe.data, num_classes=count, visible=visible)
        if count < 2:
            raise UserError(f"--masks {self.masks.path}: one class only: nothing to tell apart")
        return replace(recipe, method=replace(method, classes=method.classes or tuple(map(str, range(count)))))

    def judge(
        self, recipe: Recipe, train: Source | None, val: Source, device: torch.device, between: Callable[[], None]
    ) -> MaskJudge:
        assert isinstance(recipe.method, SegmentConfig)
        assert self.val_masks is not None
        return MaskJudge(recipe, val, self.val_masks, device, between, recipe.method.overlap)


def say_untrained(figures: dict[str, float]) -> str:
    return f"before training: mIoU {figures['miou_untrained']:.3f}\n"


def say_segmented(figures: dict[str, Any]) -> list[str]:
    done = f"done: {figures['steps']} steps, {figures['images']} images in {figures['seconds']:.0f} s of training"
    miou = f"mIoU {figures['miou']:.3f} (before training {figures['miou_untrained']:.3f})"
    return [done, f"{miou}, pixels right {figures['pixel_accuracy']:.3f}", f"export {figures['export']}"]


def keep_segmented(judge: Any, encoder: Any, out: Path) -> None:
    keep(judge, encoder, out)
    if judge.shown:
        predictions_picture(judge.shown, encoder.classes).save(out / "predictions.png")


def segment_job(command: Finetune) -> Job:
    parts = Segmentation(command)
    return Job(
        settle=parts.settle, begin=begin, judge=parts.judge, export=export, figures=("miou", "pixel_accuracy"),
        say_baselines=say_untrained, say_summary=say_segmented, open=parts.open, masks=lambda: parts.masks,
        keep=keep_segmented,
    )  # fmt: skip


if __name__ == "__main__":
    main()
