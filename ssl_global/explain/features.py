"""What patch features see alike: their main directions as colours, likeness to a point, neighbours, a plane of images.

    colours     the main components of patch features as red, green, blue, one basis for a whole set of images, after
                the background is split off by the first component (Oquab et al. 2023, "DINOv2",
                https://arxiv.org/abs/2304.07193, figure 1)
    similarity  cosine of one place's feature with all places' (Caron et al. 2021 look at attention in this way)
    neighbours  images whose summaries are most alike, by cosine
    plane       a set's summaries in two dimensions, by their two main components, or by UMAP (McInnes et al. 2018,
                https://arxiv.org/abs/1802.03426) where umap-learn is installed

Not as in DINOv2's figure: which side of the first component is the foreground is not chosen by eye, but is the one that
is less at the images' edges; colours are stretched to the 1st and 99th of 100 values, not to the extremes. Components
have a sign by their largest entry, so the same features always have the same colours.

    B  images     rows, cols  of a map     D  width of the features     N  places of all images, or images
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ssl_global.errors import UserError
from ssl_global.explain.pictures import sheet

STRETCH = (0.01, 0.99)  # shares of the places below the darkest and the brightest colour (ours)
FEWEST = 4  # places that a basis of three components needs

# Of equal lightness, so that all can be read on white and on black: contrast above 3 with both (tested).
CLASS_COLOURS = (
    "#3b7dd8", "#d9622b", "#2a9461", "#c2539b", "#8d7a12", "#7b68d6", "#c9504f", "#1f8fa3", "#6c8a2b", "#a56a3c",
)  # fmt: skip
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")  # once the colours are used up
GREY = "#808080"  # of words, on white and on black
MOST_NAMED = 40  # classes in a legend (ours)


# -------------------------------------------------------------------------------------------------------------- colours


@dataclass(frozen=True)
class Basis:
    """Directions in the space of features, on the CPU, float64. What is on the foreground's side is above 0."""

    mean: Tensor  # (D,) of all places
    split: Tensor  # (D,) the first component, towards the foreground
    threshold: float  # of what is along `split`
    centre: Tensor  # (D,) of the foreground
    directions: Tensor  # (3, D), by how much they tell of the foreground
    low: Tensor  # (3,) what is black along each
    high: Tensor  # (3,) what is full along each

    def foreground(self, features: Tensor) -> Tensor:
        """(B, rows, cols, D) -> bool (B, rows, cols)."""
        return (features.cpu().double() - self.mean) @ self.split > self.threshold

    def colours(self, features: Tensor) -> Tensor:
        """(B, rows, cols, D) -> float (B, rows, cols, 3) in 0..1, background too."""
        along = (features.cpu().double() - self.centre) @ self.directions.T
        return ((along - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1).float()


def fit_basis(features: Sequence[Tensor], *, split: bool = True, threshold: float = 0.0) -> Basis:
    """One basis for all these maps, each (B, rows, cols, D), of any number of rows and columns.

    split      whether the colours are of the foreground's features alone; else of all
    threshold  of the first component, measured from the mean: 0 is DINOv2's

    Raises UserError if the features are all alike, or if fewer than four places are foreground.
    """
    flat_ND = torch.cat([one.cpu().double().flatten(0, -2) for one in features])
    mean, components, variances = main_components(flat_ND)
    first = components[0] * towards_the_middle(features, mean, components[0])
    chosen_ND = flat_ND[(flat_ND - mean) @ first > threshold] if split else flat_ND
    if len(chosen_ND) < FEWEST or variances[0] <= 0:
        reason = f"at least {FEWEST} are needed; another threshold, or split=False, would be right"
        raise UserError(f"threshold = {threshold}: {len(chosen_ND)} of {len(flat_ND)} places are foreground; {reason}")
    centre, directions, _ = main_components(chosen_ND)
    if len(directions) < 3:
        raise UserError(f"features of {flat_ND.shape[1]} channels: three colours need three")
    along = (chosen_ND - centre) @ directions[:3].T
    low, high = (torch.from_numpy(np.quantile(along.numpy(), share, axis=0)) for share in STRETCH)
    return Basis(mean, first, threshold, centre, directions[:3], low, high)


def main_components(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), components (D, D) by falling variance, and the variances (D,), all float64.

    Slowly: the right singular vectors of x - mean. Each has the sign that makes its largest entry positive.
    """
    mean = x_ND.mean(0)
    centred = x_ND - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(x_ND) - 1))
    components = vectors.T.flip(0)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return mean, components * largest.sign(), variances.flip(0).clamp_min(0)


def towards_the_middle(features: Sequence[Tensor], mean: Tensor, component: Tensor) -> float:
    """1 or -1: the sign with which the component is less at the edges of the maps than within them."""
    edges, inner = [], []
    for maps in features:
        along = (maps.cpu().double() - mean) @ component
        edge = torch.ones(along.shape[1:], dtype=torch.bool)
        edge[1:-1, 1:-1] = False
        edges.append(along[:, edge].flatten())
        inner.append(along[:, ~edge].flatten())
    if not sum(map(len, inner)):  # maps of two rows or columns
        return 1.0
    return 1.0 if torch.cat(inner).mean() >= torch.cat(edges).mean() else -1.0


def colour_picture(
    colours: Tensor, size: tuple[int, int], *, foreground: Tensor | None = None, smooth: bool = False
) -> Image.Image:
    """(rows, cols, 3) in 0..1 -> a picture of (height, width), dark grey where `foreground` (rows, cols) is false."""
    dark = torch.tensor(0.1)
    shown = colours if foreground is None else torch.where(foreground[..., None], colours, dark)
    small = Image.fromarray((shown * 255).round().to(torch.uint8).numpy())
    way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return small.resize((size[1], size[0]), way)


# ----------------------------------------------------------------------------------------------------------- similarity


def place_of(point: tuple[float, float], size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The row and column of a map of `grid` in which a point (x, y) of an image of `size` (height, width) lies.

    Raises UserError for a point outside of the image.
    """
    (x, y), (height, width), (rows, cols) = point, size, grid
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"point = {x:g}, {y:g}: outside of the image, which is {width} x {height} pixels")
    return int(y * rows / height), int(x * cols / width)


def similarity(features: Tensor, place: tuple[int, int], *, image: int = 0) -> Tensor:
    """Cosine, in -1..1, of one place's feature with every place's of all images: (B, rows, cols).

    features  (B, rows, cols, D)
    place     row and column in the map of that image

    Raises UserError for a place or an image that there is not.
    """
    num_images, rows, cols, _ = features.shape
    if not 0 <= image < num_images:
        raise UserError(f"image = {image}: 0 to {num_images - 1} would be right")
    if not (0 <= place[0] < rows and 0 <= place[1] < cols):
        raise UserError(f"place = {place}: the map has {rows} rows and {cols} columns, counted from 0")
    unit = F.normalize(features.float(), dim=-1)
    return unit @ unit[image, place[0], place[1]]


# ----------------------------------------------------------------------------------------------------------- neighbours


def neighbours(queries_MD: Tensor, bank_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most alike of the bank for each query, the most alike first: indices (M, k) and cosines (M, k).

    Of equally alike ones the first in the bank comes first. Raises UserError if the bank has fewer than k.
    """
    if not 1 <= k <= len(bank_ND):
        raise UserError(f"k = {k}: 1 to {len(bank_ND)}, the number of images to choose from")
    cosines = F.normalize(queries_MD.float(), dim=1) @ F.normalize(bank_ND.float(), dim=1).T
    ordered = cosines.sort(dim=1, descending=True, stable=True)
    return ordered.indices[:, :k], ordered.values[:, :k]


def neighbours_sheet(
    features_ND: Tensor,
    picture: Callable[[int], Image.Image],
    names: Sequence[str],
    queries: Sequence[int],
    k: int = 6,
    *,
    side: int = 128,
) -> Image.Image:
    """A row for each query: itself, then its k neighbours among the other images, with file names and cosines.

    features_ND  summaries of all images
    picture      an image by its number
    names        of all images
    queries      numbers of those to show

    Raises UserError for a query that there is not, or fewer than k others.
    """
    if outside := [query for query in queries if not 0 <= query < len(features_ND)]:
        raise UserError(f"query {outside[0]}: 0 to {len(features_ND) - 1} would be right")
    if not 1 <= k < len(features_ND):
        raise UserError(f"k = {k}: 1 to {len(features_ND) - 1}, the number of other images")
    indices, cosines = neighbours(features_ND[list(queries)], features_ND, k + 1)
    rows = []
    for query, found, alike in zip(queries, indices.tolist(), cosines.tolist(), strict=True):
        # Where another image has the very same feature, the query itself may be further down, or left out.
        others = [(i, cosine) for i, cosine in zip(found, alike, strict=True) if i != query][:k]
        shown = [(square(picture(i)), f"{cosine:.2f} {os.path.basename(names[i])}") for i, cosine in others]
        rows.append([(square(picture(query)), os.path.basename(names[query])), *shown])
    return sheet(rows, side=side, head=["image", "nearest", *[""] * (k - 1)])


def square(picture: Image.Image) -> Image.Image:
    """Its middle."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


# ---------------------------------------------------------------------------------------------------------------- plane


def in_the_plane(features_ND: Tensor, method: Literal["pca", "umap"] = "pca", *, seed: int = 0) -> Tensor:
    """(N, 2): their place along the two main components of all, or UMAP's, of cosines, with this seed.

    Raises UserError for fewer than three images, and if umap is asked for and umap-learn is not installed.
    """
    if len(features_ND) < 3:
        raise UserError(f"{len(features_ND)} images: a plane needs at least 3")
    if method == "pca":
        x_ND = features_ND.cpu().double()
        mean, components, _ = main_components(x_ND)
        return ((x_ND - mean) @ components[:2].T).float()
    if method != "umap":
        raise UserError(f"method = {method}: pca or umap")
    try:
        from umap import UMAP
    except ImportError as error:
        raise UserError("umap needs the package umap-learn; pip install umap-learn, or method pca") from error
    found = UMAP(metric="cosine", n_neighbors=min(15, len(features_ND) - 1), random_state=seed, n_jobs=1)
    return torch.from_numpy(np.asarray(found.fit_transform(features_ND.float().cpu().numpy()), dtype=np.float32))


def plane_picture(
    points_N2: Tensor, labels: Sequence[int] | Tensor | None = None, classes: Sequence[str] = (), *, title: str = ""
) -> Image.Image:
    """A dot for each image, coloured by its class, with a legend: RGBA, transparent, to be read on white and on black.

    labels   a class for each, -1: none; None: all alike
    classes  their names; without them their numbers

    More than 40 classes have no legend.
    """
    numbers = [-1] * len(points_N2) if labels is None else [int(label) for label in labels]
    if len(numbers) != len(points_N2):
        raise UserError(f"{len(numbers)} labels for {len(points_N2)} images: one for each would be right")
    figure = Figure(figsize=(7.5, 6), dpi=150, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    present = sorted(set(numbers))
    for label in present:
        chosen = points_N2[[i for i, number in enumerate(numbers) if number == label]].numpy()
        name = "no class" if label < 0 else classes[label] if label < len(classes) else str(label)
        colour = GREY if label < 0 else CLASS_COLOURS[label % len(CLASS_COLOURS)]
        shape = SHAPES[label // len(CLASS_COLOURS) % len(SHAPES)] if label >= 0 else "."
        size = max(6, min(40, 12000 / max(1, len(points_N2))))
        axes.scatter(chosen[:, 0], chosen[:, 1], s=size, c=colour, marker=shape, alpha=0.85, linewidths=0, label=name)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", "datalim")
    axes.set_title(title, color=GREY, fontsize=11)
    axes.spines[:].set_color(GREY)
    if 1 < len(present) <= MOST_NAMED:
        figure.legend(loc="outside right upper", frameon=False, labelcolor=GREY, fontsize=9, markerscale=1.5)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba()).copy())
