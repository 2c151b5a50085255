"""What the pictures of this room share: colours for numbers, a map over its image, a sheet of pictures with captions.

Pictures are PIL's, RGB. Maps are float (rows, cols) or (B, rows, cols), where 0 is none and 1 is all. The colour map is
viridis, whose steps look equally large, in grey and to the colour-blind too (Smith and van der Walt 2015), from
matplotlib.
"""

from collections.abc import Sequence
from functools import cache

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_global.data.views import normalise, resize
from ssl_global.errors import UserError

COLOUR_MAP = "viridis"
PAPER, INK, EDGE = (255, 255, 255), (40, 40, 40), 8  # colours of a sheet, and pixels between its pictures (ours)
FULL_COLOUR = 0.999  # quantile of a map's weights (ours)
HIDDEN = 0.5  # the grey, in 0..1, of what is not shown


# ------------------------------------------------------------------------------------------------- tensors and pictures


def unnormalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Back from what a network is given to 0..1, float (B, C, H, W): `normalise` the other way round, not clipped."""
    return images * images.new_tensor(std)[:, None, None] + images.new_tensor(mean)[:, None, None]


def as_picture(image: Tensor) -> Image.Image:
    """Float (C, H, W) in 0..1, clipped, or uint8, as a picture: grey for one channel, the first three for others."""
    if image.ndim != 3:
        raise ValueError(f"{tuple(image.shape)}: one image, (C, H, W), would be right")
    if image.dtype != torch.uint8:
        image = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    image = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def as_tensor(picture: Image.Image, channels: int = 3) -> Tensor:
    """uint8 (channels, H, W): colour, or grey. Raises UserError for another number."""
    if channels not in (1, 3):
        raise UserError(f"images of {channels} channels: a picture has 3, or 1")
    pixels = torch.from_numpy(np.array(picture.convert("L" if channels == 1 else "RGB")))
    return pixels.view(*pixels.shape[:2], channels).permute(2, 0, 1)


def as_input(
    picture: Image.Image, *, shorter: int, multiple: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """A whole picture for a network, float (1, C, H, W), normalised: nothing is cut off, and the aspect is kept nearly.

    shorter   of its sides in pixels, about
    multiple  that both sides are made, by rounding: the patch, or the network's stride

    mean      of each channel, which are 3, or 1: then the picture is made grey

    Raises UserError for sizes below 1, and for other numbers of channels.
    """
    if shorter < 1 or multiple < 1:
        raise UserError(f"shorter = {shorter}, multiple = {multiple}: at least 1 pixel each")
    scale = shorter / min(picture.size)
    height, width = (max(1, round(side * scale / multiple)) * multiple for side in (picture.height, picture.width))
    return normalise(resize(as_tensor(picture, len(mean)), (height, width))[None], tuple(mean), tuple(std))


def upsample(maps: Tensor, size: tuple[int, int], *, smooth: bool = True) -> Tensor:
    """(rows, cols) or (B, rows, cols) -> (..., *size): bilinear, or each place as a box."""
    whole = maps[None] if maps.ndim == 2 else maps
    if whole.ndim != 3:
        raise ValueError(f"{tuple(maps.shape)}: maps are (rows, cols) or (B, rows, cols)")
    wide = whole[:, None].float()
    if smooth:
        resized = F.interpolate(wide, size, mode="bilinear", align_corners=False)[:, 0]
    else:
        resized = F.interpolate(wide, size, mode="nearest-exact")[:, 0]
    return resized[0] if maps.ndim == 2 else resized


# -------------------------------------------------------------------------------------------------------------- colours


@cache
def table_of_colours() -> np.ndarray:
    """float (256, 3) in 0..1, from none to all."""
    return matplotlib.colormaps[COLOUR_MAP](np.arange(256))[:, :3]


def colours(values: Tensor) -> Tensor:
    """(...) in 0..1, clipped -> uint8 (..., 3)."""
    numbers = (values.detach().float().cpu().clamp(0, 1) * 255).round().long()
    return torch.from_numpy((table_of_colours() * 255).round().astype(np.uint8))[numbers]


def most_of(values: Tensor) -> float:
    """What is full colour: of a large map not the largest weight, since one patch that takes all would leave the rest
    dark."""
    return max(1e-12, torch.quantile(values.float().flatten(), FULL_COLOUR).item())


def map_picture(values: Tensor, size: tuple[int, int] | None = None, *, smooth: bool = False) -> Image.Image:
    """(rows, cols) in 0..1 -> a picture, of (height, width) pixels if they are given."""
    values = values if size is None else upsample(values, size, smooth=smooth)
    return Image.fromarray(colours(values).numpy())


def overlay(image: Image.Image, values: Tensor, strength: float = 0.6) -> Image.Image:
    """A map over its image, in the image's size. The image is made grey first, so that all colour is the map's.

    values    (rows, cols) in 0..1
    strength  share of the map's colour, 0: the grey image alone, 1: the map alone

    Raises UserError for a strength outside of 0..1.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength = {strength}: in 0..1")
    grey = image.convert("L").convert("RGB")
    return Image.blend(grey, map_picture(values, (image.height, image.width), smooth=True), strength)


def faded(image: Image.Image, keep: Tensor, *, grey: float = HIDDEN) -> Image.Image:
    """The image where `keep` (bool (rows, cols)) is true, and grey elsewhere."""
    mask = upsample(keep.float().cpu(), (image.height, image.width), smooth=False) > 0.5
    blank = Image.new("RGB", image.size, (round(255 * grey),) * 3)
    return Image.composite(image, blank, Image.fromarray(mask.numpy()))


def mark(image: Image.Image, point: tuple[float, float]) -> Image.Image:
    """A copy with a ring around (x, y), in pixels: white with a black edge, to be seen on anything."""
    marked, (x, y) = image.copy(), point
    radius = max(3, round(min(image.size) / 40))
    draw = ImageDraw.Draw(marked)
    for width, shift, colour in ((5, 2, "black"), (2, 1, "white")):
        around = (x - radius - shift, y - radius - shift, x + radius + shift, y + radius + shift)
        draw.ellipse(around, outline=colour, width=width)
    return marked


# --------------------------------------------------------------------------------------------------------------- sheets


def sheet(
    rows: Sequence[Sequence[tuple[Image.Image, str]]], *, side: int = 192, head: Sequence[str] = ()
) -> Image.Image:
    """Rows of (picture, caption) on white: each picture is made `side` pixels high, its caption is below it.

    head  of the columns; none: no line for them

    A caption that is too long for its column is cut in its middle, since file names differ at both ends. Raises
    UserError if there is no picture.
    """
    if not any(rows):
        raise UserError("a sheet of no pictures: at least one would be right")
    font, heading = ImageFont.load_default(size=12), ImageFont.load_default(size=14)
    shown = [[(scaled(picture, side), caption) for picture, caption in row] for row in rows]
    num_columns = max(map(len, shown))
    widths = [max(row[i][0].width for row in shown if i < len(row)) for i in range(num_columns)]
    lines = [18 if any(caption for _, caption in row) else 0 for row in shown]
    top = EDGE + (22 if head else 0)
    height = top + sum(side + line + EDGE for line in lines)
    paper = Image.new("RGB", (EDGE + sum(width + EDGE for width in widths), height), PAPER)
    draw = ImageDraw.Draw(paper)
    lefts = [EDGE + sum(widths[:i]) + EDGE * i for i in range(num_columns)]
    for left, width, text in zip(lefts, widths, head, strict=False):
        draw.text((left + width / 2, EDGE + 13), fitting(text, width, heading), INK, heading, anchor="ms")
    for row, line in zip(shown, lines, strict=True):
        for (picture, caption), left, width in zip(row, lefts, widths, strict=False):
            paper.paste(picture, (left + (width - picture.width) // 2, top))
            draw.text((left + width / 2, top + side + 14), fitting(caption, width, font), INK, font, anchor="ms")
        top += side + line + EDGE
    return paper


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """`side` pixels high. What is enlarged keeps its pixels: they are what the network was given."""
    way = Image.Resampling.NEAREST if picture.height < side else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((max(1, round(picture.width * side / picture.height)), side), way)


def fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, without its middle if it is wider than that."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)  # a file's name may hold a line's end
    kept = len(text)
    short = text
    while font.getlength(short) > width and kept > 1:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return short
