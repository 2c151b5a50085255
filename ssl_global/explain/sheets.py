"""The pictures of a backbone that the page and a run's trackers share: sheets with a row for each image.

Each function takes what is looked at (`Shown`) and gives a sheet. All raise UserError, in words, for a backbone of
which there is no such picture (a ResNet has no attention).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ssl_global.data.decode import BadImage, decode
from ssl_global.data.source import Source
from ssl_global.data.views import normalise, plain_view, resize
from ssl_global.errors import UserError
from ssl_global.explain.features import colour_picture, fit_basis, similarity
from ssl_global.explain.gradcam import grad_cam
from ssl_global.explain.maps import looking_at_patches
from ssl_global.explain.pictures import as_picture, mark, most_of, overlay, sheet
from ssl_global.explain.places import patch_features
from ssl_global.explain.rollout import rollout
from ssl_global.recipe import Data

MOST_HEADS = 6  # columns of heads, the first ones (ours)
MOST_LAYERS = 12  # columns of layers, evenly spread (ours)

Cell = tuple[Image.Image, str]


@dataclass(frozen=True)
class Shown:
    """An image that is looked at: as a picture, and as the network takes it, (1, C, H, W) normalised, on its device."""

    name: str
    picture: Image.Image
    x: Tensor


def evenly(total: int, count: int) -> list[int]:
    """`count` of the numbers 0 to total - 1, or all if there are fewer, evenly spread from the first to the last."""
    return sorted(set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()))


def squares(source: Source, numbers: Sequence[int], *, data: Data, pixels: int, device: torch.device) -> list[Shown]:
    """The middle squares of these images, as evaluation sees them. What cannot be read is left out."""
    return shown_of(source, numbers, data, device, lambda image: plain_view(image, pixels))


def wholes(
    source: Source, numbers: Sequence[int], *, data: Data, pixels: int, multiple: int, device: torch.device
) -> list[Shown]:
    """These images whole, the shorter side about `pixels`, sides rounded to multiples of `multiple`."""

    def fitted(image: Tensor) -> Tensor:
        scale = pixels / min(image.shape[1:])
        height, width = (max(1, round(side * scale / multiple)) * multiple for side in image.shape[1:])
        return resize(image, (height, width))

    return shown_of(source, numbers, data, device, fitted)


def shown_of(
    source: Source, numbers: Sequence[int], data: Data, device: torch.device, fitted: Callable[[Tensor], Tensor]
) -> list[Shown]:
    found = []
    for number in numbers:
        try:
            image = fitted(decode(source.read(number), data.channels, data.max_pixels))
        except BadImage:
            continue
        x = normalise(image[None].to(device), *data.normalisation)
        found.append(Shown(source.key(number), as_picture(image), x))
    return found


# --------------------------------------------------------------------------------------------------------------- sheets


def attention_sheet(model: nn.Module, shown: Sequence[Shown], *, side: int = 128) -> Image.Image:
    """The image, its rollout if there is one, and what the last layer's heads look at."""
    rows, flows = [], []
    for one in shown:
        heads = looking_at_patches(model, one.x)[-1].picture()[0].cpu()
        flow = rollout_or_none(model, one)
        flows.append(flow is not None)
        maps = [heads.mean(0), *heads[:MOST_HEADS]]
        cells = [(one.picture, ""), *([(over(one, flow), "")] if flow is not None else [])]
        rows.append([*cells, *((over(one, values), "") for values in maps)])
    head = ["image", *(["rollout"] if all(flows) else []), "all heads", *(f"head {n}" for n in range(len(maps) - 1))]
    return sheet(rows, side=side, head=head)


def layers_sheet(model: nn.Module, shown: Sequence[Shown], *, side: int = 96) -> Image.Image:
    """What each layer looks at, all heads together, from the first to the last."""
    rows = []
    for one in shown:
        cells: list[Cell] = [(one.picture, "")]
        layers = looking_at_patches(model, one.x)
        for number in evenly(len(layers), MOST_LAYERS):
            cells.append((over(one, layers[number].picture()[0].mean(0).cpu()), str(number)))
        rows.append(cells)
    return sheet(rows, side=side, head=["image", "first layer", *[""] * (len(rows[0]) - 3), "last"])


def colours_sheet(model: nn.Module, shown: Sequence[Shown], *, side: int = 128) -> Image.Image:
    """Main components of the patch features as colours, one basis for all images: of the foreground, and of all."""
    features = [patch_features(model, one.x) for one in shown]
    whole = fit_basis(features, split=False)
    try:
        split = fit_basis(features)
    except UserError:  # too little foreground
        split = None
    rows = []
    for one, feature in zip(shown, features, strict=True):
        size = (one.picture.height, one.picture.width)
        cells = [(one.picture, ""), (colour_picture(whole.colours(feature)[0], size), "")]
        if split is not None:
            foreground = split.foreground(feature)[0]
            cells.append((colour_picture(split.colours(feature)[0], size, foreground=foreground), ""))
        rows.append(cells)
    return sheet(rows, side=side, head=["image", "all patches", *(["foreground"] if split is not None else [])])


def likeness_sheet(model: nn.Module, shown: Sequence[Shown], *, side: int = 128) -> Image.Image:
    """How alike each patch is to the one in the image's middle."""
    rows = []
    for one in shown:
        feature = patch_features(model, one.x)
        _, rows_, cols, _ = feature.shape
        place = (rows_ // 2, cols // 2)
        alike = similarity(feature, place)[0].cpu().clamp_min(0)
        point = ((place[1] + 0.5) * one.picture.width / cols, (place[0] + 0.5) * one.picture.height / rows_)
        rows.append([(mark(one.picture, point), ""), (overlay(one.picture, alike), "")])
    return sheet(rows, side=side, head=["image", "like the ring"])


def grad_cam_sheet(model: nn.Module, shown: Sequence[Shown], classes: Sequence[str], *, side: int = 128) -> Image.Image:
    """Which places speak for the class that is most likely."""
    rows = []
    for one in shown:
        found = grad_cam(model, one.x, names=classes)
        number = int(found.classes[0])
        said = classes[number] if number < len(classes) else str(number)
        rows.append([(one.picture, ""), (overlay(one.picture, found.maps[0]), said)])
    return sheet(rows, side=side, head=["image", "speaks for"])


# ------------------------------------------------------------------------------------------------------------- the maps


def over(one: Shown, values: Tensor) -> Image.Image:
    """A map of weights over its image: about the largest is full colour."""
    return overlay(one.picture, (values / most_of(values)).clamp(0, 1))


def rollout_or_none(model: nn.Module, one: Shown) -> Tensor | None:
    try:
        return rollout(model, one.x)[0].cpu()
    except UserError:
        return None
