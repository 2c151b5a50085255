"""What a fine-tuned model was judged by, to look at: who is taken for whom, and the rows of each class."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ssl_global.finetuning.metrics import Classified, Segmented

CELL, MOST_NAMED = 18, 40  # pixels of a cell, and classes up to which they have names (ours)
LOW, HIGH = np.array([247, 249, 252]), np.array([16, 60, 130])  # colours of none and of all


def keep(judged: Classified | Segmented | None, classes: Sequence[str], out: Path) -> None:
    """Writes classes.json, a row for each class, and confusion.png."""
    if judged is None:
        return
    rows = [{k: None if v != v else v for k, v in row.items()} for row in judged.table(classes)]  # JSON has no NaN
    (out / "classes.json").write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    try:
        confusion = judged.confusion
    except ValueError:  # too many classes for a matrix
        return
    confusion_picture(confusion, classes).save(out / "confusion.png")


def confusion_picture(confusion: Tensor, classes: Sequence[str]) -> Image.Image:
    """A row for each class: which share of it was taken for which; counts are behind the names."""
    counts = confusion.double().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = len(classes) <= MOST_NAMED
    cell = CELL if named else max(1, 800 // len(classes))
    cells = np.kron(LOW + shares[..., None] * (HIGH - LOW), np.ones((cell, cell, 1))).astype(np.uint8)
    if not named:
        return Image.fromarray(cells)
    names = [f"{name[:24]} {int(count)}" for name, count in zip(classes, counts.sum(1), strict=True)]
    left = 8 + int(max(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(name) for name in names))
    picture = Image.new("RGB", (left + cells.shape[1] + 8, cells.shape[0] + left + 8), "white")
    picture.paste(Image.fromarray(cells), (left, 0))
    for number, name in enumerate(names):
        row = Image.new("RGB", (left, cell), "white")
        ImageDraw.Draw(row).text((left - 4, cell // 2), name, fill="black", anchor="rm")
        picture.paste(row, (0, number * cell))
        picture.paste(row.rotate(90, expand=True), (left + number * cell, cells.shape[0]))
    return picture
