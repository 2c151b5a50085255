"""Decoding a JPEG smaller than it is: when, how near to the exact views, and through the whole loader."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from loaders import recipe_of, serve
from PIL import Image

from ssl_global.data import loader as loader_module
from ssl_global.data.decode import look
from ssl_global.data.sample import PHOTOGRAPHS, photograph
from ssl_global.data.source import open_source
from ssl_global.data.views import Drawn, cut, cut_shrunk, shrink_of
from ssl_global.recipe import Crops, Views

NOTHING = np.zeros((0, 0), np.float32)


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def room(count: int, pixels: int, channels: int = 3) -> torch.Tensor:
    return torch.zeros(count, pixels, pixels, channels, dtype=torch.uint8).permute(0, 3, 1, 2)


@pytest.mark.parametrize("by", [2, 4, 8])
def test_views_are_near_the_exact_ones(by: int) -> None:
    """Mean absolute difference: on average within 1/255, in nine of ten photographs within 2/255, never above 5."""
    differences = []
    for name in PHOTOGRAPHS:
        image = look(jpeg(photograph(name)), 3)
        height, width = image.size
        pixels = int(min(height, width) / (4 * by) / 1.05)
        side = int(4 * by * pixels)
        drawn = Drawn([(0, 0, height, width), (height - side, 1, side, side)], [False, True], NOTHING)
        assert shrink_of([(drawn, pixels)]) == by
        exact, ours = room(2, pixels), room(2, pixels)
        cut(image.pixels(), drawn, exact)
        cut_shrunk(image.shrunk(by), image.size, drawn, ours)
        differences += (exact.float() - ours.float()).abs().mean((1, 2, 3)).tolist()
    assert np.mean(differences) < 1
    assert np.percentile(differences, 90) < 2
    assert max(differences) < 5


@pytest.mark.parametrize(
    ("sides", "by"),
    [((448, 448), 1), ((895, 900), 1), ((900, 896), 2), ((1791, 3000), 2), ((1792, 3000), 4), ((9000, 9000), 8)],
)
def test_only_while_four_times_is_left_to_resize(sides: tuple[int, int], by: int) -> None:
    assert shrink_of([(Drawn([(0, 0, *sides)], [False], NOTHING), 112)]) == by


def test_the_smallest_box_decides() -> None:
    large, small = (Drawn([(0, 0, side, side)], [False], NOTHING) for side in (5000, 300))
    assert shrink_of([(large, 96)]) == 8
    assert shrink_of([(large, 96), (small, 96)]) == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1999, 1501), (1600, 1203)])
def test_a_large_photograph_through_the_loader(tmp_path, channels: int, size, monkeypatch) -> None:
    """Boxes keep their place where sides are odd; grey stays one channel."""
    photograph("coffee.png").resize(size, Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=92)
    views = Views(globals=Crops(count=2, pixels=64, area=(0.3, 1.0)), locals=Crops(count=2, pixels=32, area=(0.1, 0.2)))
    recipe = replace(recipe_of(1, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels), views=views)
    (ours,) = serve(open_source(str(tmp_path)), recipe, stop=1)
    monkeypatch.setattr(loader_module, "shrink_of", lambda groups: 1)
    (exact,) = serve(open_source(str(tmp_path)), recipe, stop=1)
    for a, b in zip(ours["crops"], exact["crops"], strict=True):
        assert a.shape == b.shape
        assert not torch.equal(a, b)  # it was decoded smaller
        assert (a.float() - b.float()).abs().mean() < 2
