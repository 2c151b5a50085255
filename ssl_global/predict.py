"""What a fine-tuned model says of many images: a table of classes, or a mask and a picture of each.

    OUT/predicted_by.txt       a hash of the model: other answers are not mixed with these
    OUT/predictions.csv        image, class, probability, and the next best: a line each; of a model that was tuned on
                               any number of classes for each image: image, labels, probabilities, "cat|dog" and
                               "0.9312|0.7120", all of at least 0.5, the form of the labels.csv that it learnt from
    OUT/masks/NAME.png         class numbers, in a palette, of the image's size
    OUT/overlays/NAME.jpg      the same over the image

Started again, it goes on behind what is there: a line or a file is written whole or not at all.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ssl_global.data.decode import BadImage, decode
from ssl_global.data.masks import name_of
from ssl_global.data.progress import report as report_progress
from ssl_global.data.several import BETWEEN, MOST_CLASSES
from ssl_global.data.source import Source
from ssl_global.data.views import normalise, plain_view
from ssl_global.data.workers import in_order, num_workers, workers
from ssl_global.errors import UserError
from ssl_global.export import MULTI_LABEL, load
from ssl_global.finetuning.pictures import overlay, palette
from ssl_global.inference.sliding_window import SlidingWindow
from ssl_global.inference.tta import TTA, Activation
from ssl_global.recipe import Data

ANSWERED = 0.5  # probability from which one of several classes is an answer
NEXT_BEST = 4  # classes in a line besides the best (ours)
OVERLAP = 0.25  # of windows, as a share of their side (ours)


@dataclass(frozen=True)
class Model:
    """An export, and how its images have to be."""

    model: nn.Module  # images to logits
    classes: list[str]
    pixels: int
    data: Data
    segments: bool
    multi_label: bool
    said_by: str = ""  # a hash of its weights, and how it is asked: other answers are not mixed with these


@dataclass(frozen=True)
class Predicted:
    written: int  # now
    there: int  # from before
    bad: list[tuple[str, str]]  # (image, reason)


def open_model(folder: Path, device: torch.device, *, tta: bool) -> Model:
    """Raises UserError for what is no export, and for one that has no classes."""
    try:
        found = json.loads((folder / "config.json").read_text())
        spec: dict[str, Any] = found.get("segmenter", {})
        num_classes = found["num_classes"]
        if not 0 <= num_classes <= MOST_CLASSES:
            raise ValueError(f"num_classes = {num_classes}")
        classes = list(map(str, spec.get("classes") or found.get("label_names") or range(num_classes)))
        if len(classes) != num_classes:
            raise ValueError(f"num_classes = {num_classes}, and {len(classes)} names")
        multi_label = found.get("problem_type") == MULTI_LABEL
        own = found["pretrained_cfg"]
        channels, pixels, _ = own["input_size"]
        if not isinstance(pixels, int) or pixels < 1:
            raise ValueError(f"input_size = {own['input_size']}")
        data = Data(channels=channels, mean=tuple(map(float, own["mean"])), std=tuple(map(float, own["std"])))
        data.check()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: no export of a fine-tuned model: {error}") from error
    if not classes:
        raise UserError(f"{folder}: a backbone without classes; fine-tune it first (finetune.py)")
    try:
        model = load(folder).to(device)
    except Exception as error:  # of any kind, whatever somebody has written into the files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: cannot be loaded: {reason}") from error
    if spec:
        model = SlidingWindow(model, pixels, int(OVERLAP * pixels), margin=0)
    if tta:
        activation: Activation = "sigmoid" if multi_label else "softmax"
        model = TTA(model, scales=(0.75, 1.0, 1.25) if spec else (1.0,), activation=activation, stride=1)
    else:
        model = nn.Sequential(model, nn.Sigmoid() if multi_label else nn.Softmax(dim=1))
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    return Model(model, classes, pixels, data, bool(spec), multi_label, said_by=f"{weights}{' tta' if tta else ''}")


def predict(opened: Model, source: Source, out: Path, *, batch: int, device: torch.device) -> Predicted:
    """All images of the source that are not in `out` yet. Raises UserError if it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        refuse_other_answers(opened, out)
        write = to_masks(opened, source, out) if opened.segments else to_table(opened, source, out)
        with write as writer:
            left = [index for index in range(len(source)) if not writer.has(index)]
            bad: list[tuple[str, str]] = []
            with report_progress("predicted", len(left), visible=True) as done, torch.no_grad():
                for count, (indices, images) in enumerate(read(opened, source, left, batch, bad), 1):
                    if indices:
                        writer.write(indices, images, probabilities(opened, images, device))
                    done(min(count * batch, len(left)))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error
    return Predicted(len(left) - len(bad), len(source) - len(left), bad)


def refuse_other_answers(opened: Model, out: Path) -> None:
    """Notes whose answers are in OUT. Raises UserError if they are another model's, or of another way to ask it."""
    note = out / "predicted_by.txt"
    before = note.read_text() if note.is_file() else None
    if before not in (None, opened.said_by):
        raise UserError(
            f"--out {out}: holds what another model says, or this one with another --tta; give another --out"
        )
    note.write_text(opened.said_by)


def probabilities(opened: Model, images: list[Tensor], device: torch.device) -> list[Tensor]:
    """(K,) of each image, or (K, H, W)."""
    if opened.segments:
        return [opened.model(as_input(image[None], opened, device))[0].cpu() for image in images]
    return list(opened.model(as_input(torch.stack(images), opened, device)).cpu())


def as_input(images: Tensor, opened: Model, device: torch.device) -> Tensor:
    return normalise(images.to(device), *opened.data.normalisation)


def read(
    opened: Model, source: Source, left: list[int], batch: int, bad: list[tuple[str, str]]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Batches of images, decoded ahead; those that cannot be read are named in `bad`."""

    def decoded(index: int) -> Tensor | BadImage:
        try:
            image = decode(source.read(index), opened.data.channels, opened.data.max_pixels)
        except BadImage as error:
            return error
        return image if opened.segments else plain_view(image, opened.pixels)

    count = num_workers(opened.data, 1)
    with workers(opened.data, count, decoded) as submit:
        images = in_order(submit, left, ahead=2 * batch)
        for first in range(0, len(left), batch):
            some = [(index, next(images)) for index in left[first : first + batch]]
            bad += [(source.key(index), str(image)) for index, image in some if isinstance(image, BadImage)]
            good = [(index, image) for index, image in some if isinstance(image, Tensor)]
            yield [index for index, _ in good], [image for _, image in good]


# ------------------------------------------------------------------------------------------------------------- a table


class Table:
    def __init__(self, opened: Model, source: Source, file: Path) -> None:
        self.opened, self.source = opened, source
        before = file.read_bytes() if file.exists() else b""
        whole = before[: before.rfind(b"\n") + 1]  # the last line may have been cut off
        while whole.count(b'"') % 2:  # within a name that has several lines
            whole = whole[: whole.rfind(b"\n", 0, -1) + 1]
        if len(whole) < len(before):
            file.write_bytes(whole)
        text = io.StringIO(whole.decode(errors="surrogateescape"), newline="")
        self.there = {row[0] for row in itertools.islice(csv.reader(text), 1, None) if row}
        self.file = file.open("a", newline="", encoding="utf-8", errors="surrogateescape")  # a name may be no UTF-8
        self.rows = csv.writer(self.file, lineterminator="\n")
        if not whole:
            ranks = range(2, 2 + min(NEXT_BEST, len(opened.classes) - 1))
            best = ["image", "class", "probability", *(f"{w}_{r}" for r in ranks for w in ("class", "p"))]
            self.rows.writerow(["image", "labels", "probabilities"] if opened.multi_label else best)

    def has(self, index: int) -> bool:
        return self.source.key(index) in self.there

    def write(self, indices: list[int], images: list[Tensor], answers: list[Tensor]) -> None:
        for index, answer in zip(indices, answers, strict=True):
            if self.opened.multi_label:
                found = [k for k in answer.argsort(descending=True).tolist() if answer[k] >= ANSWERED]
                names, shares = [self.opened.classes[k] for k in found], [f"{answer[k]:.4f}" for k in found]
                self.rows.writerow([self.source.key(index), BETWEEN.join(names), BETWEEN.join(shares)])
                continue
            best = answer.topk(min(1 + NEXT_BEST, len(answer)))
            said = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            cells = [cell for p, k in said for cell in (self.opened.classes[k], f"{p:.4f}")]
            self.rows.writerow([self.source.key(index), *cells])
        self.file.flush()


@contextlib.contextmanager
def to_table(opened: Model, source: Source, out: Path) -> Iterator[Table]:
    table = Table(opened, source, out / "predictions.csv")
    try:
        yield table
    finally:
        table.file.close()


# -------------------------------------------------------------------------------------------------------------- masks


class Pictures:
    def __init__(self, opened: Model, source: Source, out: Path) -> None:
        self.source, self.out = source, out
        self.colours = palette(len(opened.classes))
        self.names = [file_name(source.key(index)) for index in range(len(source))]
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UserError(f"{source.path}: two images would be {twice}.png in {out}; give them one at a time")

    def has(self, index: int) -> bool:
        return all(path.exists() for path in self.paths(index))

    def paths(self, index: int) -> tuple[Path, Path]:
        name = self.names[index]
        return self.out / "masks" / f"{name}.png", self.out / "overlays" / f"{name}.jpg"

    def write(self, indices: list[int], images: list[Tensor], answers: list[Tensor]) -> None:
        for index, image, answer in zip(indices, images, answers, strict=True):
            mask_path, overlay_path = self.paths(index)
            mask = answer.argmax(0).to(torch.uint8).numpy()
            drawn = Image.fromarray(mask, "P")
            drawn.putpalette(self.colours.flatten().tolist())
            put(overlay(image, mask, self.colours), overlay_path)
            put(drawn, mask_path)


def file_name(key: str) -> str:
    """A key is no path: of a shard, its name stays, since two may have samples of one name."""
    shard, tar, _ = key.rpartition(".tar/")
    return (f"{shard}/{name_of(key)}" if tar else name_of(key)).replace("/", "_")


@contextlib.contextmanager
def to_masks(opened: Model, source: Source, out: Path) -> Iterator[Pictures]:
    for name in ("masks", "overlays"):
        (out / name).mkdir(exist_ok=True)
    yield Pictures(opened, source, out)


def put(image: Image.Image, path: Path) -> None:
    """Under another name first: a file that is there is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    image.save(temporary, {".png": "PNG", ".jpg": "JPEG"}[path.suffix])
    temporary.replace(path)
