"""What a fine-tuned model was judged by, to look at.

OUT/classes.json      a row for each class
OUT/confusion.png     who is taken for whom
OUT/predictions.png   of a segmenter: some images, their masks, and what it says
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ssl_global.finetuning.metrics import Classified, Labelled, Segmented

CELL, MOST_NAMED = 18, 40  # pixels of a cell, and classes up to which they have names (ours)
LOW, HIGH = np.array([247, 249, 252]), np.array([16, 60, 130])  # colours of none and of all
OVERLAY = 0.5  # share of a mask's colour over its image (ours)
HEIGHT, GAP = 160, 6  # pixels of a picture in a sheet, and between two (ours)


@dataclass(frozen=True)
class Shown:
    """An image that a segmenter was judged with."""

    image: Tensor  # uint8 (C, H, W)
    mask: np.ndarray  # uint8 (H, W), 255 does not count
    said: np.ndarray  # the same, of the model


def keep(judged: Classified | Labelled | Segmented | None, classes: Sequence[str], out: Path) -> None:
    """Writes classes.json, a row for each class, and confusion.png."""
    if judged is None:
        return
    rows = [{k: None if v != v else v for k, v in row.items()} for row in judged.table(classes)]  # JSON has no NaN
    (out / "classes.json").write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    if isinstance(judged, Labelled):  # nothing is taken for another
        return
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
    names = [f"{drawable(name)[:24]} {int(count)}" for name, count in zip(classes, counts.sum(1), strict=True)]
    left = 8 + int(max(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(name) for name in names))
    picture = Image.new("RGB", (left + cells.shape[1] + 8, cells.shape[0] + left + 8), "white")
    picture.paste(Image.fromarray(cells), (left, 0))
    for number, name in enumerate(names):
        row = Image.new("RGB", (left, cell), "white")
        ImageDraw.Draw(row).text((left - 4, cell // 2), name, fill="black", anchor="rm")
        picture.paste(row, (0, number * cell))
        picture.paste(row.rotate(90, expand=True), (left + number * cell, cells.shape[0]))
    return picture


# -------------------------------------------------------------------------------------------------------------- masks


def predictions_picture(shown: Sequence[Shown], classes: Sequence[str]) -> Image.Image:
    """A row for each: the image, its mask over it, what the model says over it; below, the classes' colours."""
    colours = palette(len(classes))
    rows = [
        [of_height(overlay(one.image, mask, colours)) for mask in (np.zeros_like(one.mask), one.mask, one.said)]
        for one in shown
    ]
    width = max(sum(picture.width + GAP for picture in row) for row in rows) - GAP
    key = legend(classes, colours, width)
    sheet = Image.new("RGB", (width, len(rows) * (HEIGHT + GAP) + key.height), "white")
    for number, row in enumerate(rows):
        left = 0
        for picture in row:
            sheet.paste(picture, (left, number * (HEIGHT + GAP)))
            left += picture.width + GAP
    sheet.paste(key, (0, len(rows) * (HEIGHT + GAP)))
    return sheet


def overlay(image: Tensor, mask: np.ndarray, colours: np.ndarray) -> Image.Image:
    """uint8 (C, H, W) with its classes' colours over it. Class 0, the ground, and what does not count stay bare."""
    colour = image[:1].expand(3, -1, -1) if image.shape[0] < 3 else image[:3]
    known = mask < len(colours)
    share = OVERLAY * (known & (mask > 0))[..., None]
    blended = (1 - share) * colour.permute(1, 2, 0).numpy() + share * colours[np.where(known, mask, 0)]
    return Image.fromarray(blended.astype(np.uint8))


def of_height(picture: Image.Image) -> Image.Image:
    return picture.resize((max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT))


def legend(classes: Sequence[str], colours: np.ndarray, width: int) -> Image.Image:
    """As many of the classes' names as a few lines hold, each behind its colour."""
    cells, left, top = [], 0, 0
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    for name, colour in list(zip(map(drawable, classes), colours, strict=True))[1:MOST_NAMED]:
        length = CELL + int(draw.textlength(name)) + 2 * GAP
        if left and left + length > width:
            left, top = 0, top + CELL
        cells.append((name, tuple(colour.tolist()), left, top))
        left += length
    key = Image.new("RGB", (width, top + CELL), "white")
    draw = ImageDraw.Draw(key)
    for name, colour, left, top in cells:
        draw.rectangle((left, top + 3, left + CELL - 6, top + CELL - 4), fill=colour)
        draw.text((left + CELL, top + CELL // 2), name, fill="black", anchor="lm")
    return key


def drawable(name: str) -> str:
    """A class may be called anything: line feeds and what is no Unicode cannot be drawn in a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def palette(num_classes: int) -> np.ndarray:
    """uint8 (K, 3): black, then colours as far from each other as their number lets them be."""
    hues = (np.arange(num_classes) * 0.61803398875) % 1  # the golden ratio spreads any number of them
    sectors = np.stack([np.abs(hues * 6 - 3) - 1, 2 - np.abs(hues * 6 - 2), 2 - np.abs(hues * 6 - 4)], axis=1)
    colours = (sectors.clip(0, 1) * 255).astype(np.uint8)
    colours[0] = 0
    return colours
