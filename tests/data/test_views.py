"""Views against torchvision and PIL with the randomness fixed, and the randomness against its distribution."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import RandomResizedCrop

from ssl_global.data import views
from ssl_global.data.randomness import stream
from ssl_global.data.sample import photograph
from ssl_global.data.views import (
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    NO_JITTER,
    NUM_DRAWN,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    cut,
    draw,
    draw_box,
    normalise,
    paint,
    paint_colours,
    plain_view,
)  # fmt: skip
from ssl_global.recipe import Crops

DINO = Crops(count=2, pixels=32, area=(0.4, 1.0), jitter=0.8, grey=0.2, blur=(1.0, 0.1), solarize=(0.0, 0.2))
PHOTO = photograph("astronaut.png").crop((100, 0, 228, 96))
PIXELS = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)


def row(**numbers) -> torch.Tensor:
    """A row of colour numbers that does nothing but what is asked for."""
    neutral = {BRIGHTNESS: 1, CONTRAST: 1, SATURATION: 1, HUE: 0, ORDER: NO_JITTER, GREY: 0, SIGMA: 0, SOLARIZE: 0}
    named = neutral | {getattr(views, name.upper()): value for name, value in numbers.items()}
    return torch.tensor([[float(named[column]) for column in range(len(named))]])


def painted(**numbers) -> torch.Tensor:
    return coloured(PIXELS[None].float() / 255, row(**numbers))[0]


def coloured(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    paint_colours(out, rows)
    return out


def crops_of(image: torch.Tensor, drawn, pixels: int) -> torch.Tensor:
    """What cut writes, into memory that is full of something else."""
    shape = (len(drawn.boxes), pixels, pixels, image.shape[0])
    out = torch.full(shape, 77, dtype=torch.uint8).permute(0, 3, 1, 2)
    cut(image, drawn, out)
    return out


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.3])
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("brightness", tv.adjust_brightness),
        ("contrast", tv.adjust_contrast),
        ("saturation", tv.adjust_saturation),
        ("hue", lambda x, factor: tv.adjust_hue(x, factor - 1)),
    ],
)
def test_each_jitter_is_torchvisions(name, reference, factor):
    value = factor - 1 if name == "hue" else factor
    ours = painted(order=0, **{name: value})
    torch.testing.assert_close(ours, reference(PIXELS.float() / 255, factor), rtol=0, atol=2e-3)


def test_grey_and_solarize_are_pils():
    as_float = lambda image: torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255  # noqa: E731
    torch.testing.assert_close(painted(grey=1), as_float(PHOTO.convert("L")), rtol=0, atol=1 / 255)
    torch.testing.assert_close(painted(solarize=1), as_float(ImageOps.solarize(PHOTO, 128)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian_and_near_pils(sigma):
    taps = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
    taps /= taps.sum()
    padded = np.pad(np.array(PHOTO, dtype=np.float64) / 255, ((6, 6), (6, 6), (0, 0)), mode="edge")
    down = np.apply_along_axis(np.convolve, 0, padded, taps, mode="valid")
    both = np.apply_along_axis(np.convolve, 1, down, taps, mode="valid")
    ours = painted(sigma=sigma)
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), both, atol=1e-5)
    pil = np.array(PHOTO.filter(ImageFilter.GaussianBlur(sigma))) / 255
    assert np.abs(ours.permute(1, 2, 0).numpy() - pil).mean() < 2 / 255


@pytest.mark.parametrize("order", range(0, 24, 5))
def test_a_whole_chain_in_any_order_is_near_pils(order):
    """Four operations in any order, then blur and solarize, on PIL images that are rounded after each."""
    factors = {BRIGHTNESS: 0.8, CONTRAST: 1.3, SATURATION: 0.9}
    image = PHOTO
    for operation in ORDERS[order]:
        if operation == HUE:
            h, s, v = image.convert("HSV").split()
            h = Image.fromarray((np.array(h).astype(int) + round(0.07 * 255)).astype(np.uint8))
            image = Image.merge("HSV", (h, s, v)).convert("RGB")
        else:
            kind = {BRIGHTNESS: "Brightness", CONTRAST: "Contrast", SATURATION: "Color"}[operation]
            image = getattr(ImageEnhance, kind)(image).enhance(factors[operation])
    image = image.filter(ImageFilter.GaussianBlur(1.2))
    ours = painted(order=order, brightness=0.8, contrast=1.3, saturation=0.9, hue=0.07, sigma=1.2)
    assert np.abs(ours.permute(1, 2, 0).numpy() * 255 - np.array(image)).mean() < 2


def test_only_the_chosen_images_are_touched_each_with_its_own_numbers():
    x = PIXELS[None].float().div(255).repeat(4, 1, 1, 1)
    rows = torch.cat([row(), row(order=3, brightness=0.5), row(order=9, hue=0.1), row(sigma=2.0)])
    together = coloured(x, rows)
    assert torch.equal(together[0], x[0])
    for number in (1, 2, 3):
        torch.testing.assert_close(together[number], coloured(x[:1], rows[number : number + 1])[0])
        assert not torch.equal(together[number], x[number])


def test_paint_gives_views_in_order_and_normalises():
    crops = torch.stack([torch.full((2, 3, 8, 8), value, dtype=torch.uint8) for value in (0, 255)])
    crops[:, 1] = 51
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.2, 0.1)
    first, second = paint(crops, row()[None].repeat(2, 2, 1), mean, std)
    torch.testing.assert_close(first[:, :, 0, 0], torch.tensor([[-1.0, -2, -3], [1, 3, 7]]))
    torch.testing.assert_close(second[:, :, 0, 0], torch.tensor([[-0.6, -1, -1]] * 2))
    assert torch.equal(normalise(crops[0], mean, std)[0], first[0])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_grey_images_and_many_bands_pass_through_everything(channels):
    x = torch.rand(2, channels, 20, 20)
    out = coloured(x, torch.cat([row(order=5, brightness=0.7, contrast=1.2, hue=0.1, grey=1, sigma=1)] * 2))
    assert out.shape == x.shape
    assert out.isfinite().all()


@given(height=st.integers(1, 300), width=st.integers(1, 300), low=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_boxes_lie_inside_any_image(height, width, low, seed):
    top, left, h, w = draw_box((height, width), (low, 1.0), stream(0, 0, seed).random(NUM_DRAWN).tolist())
    assert h >= 1
    assert w >= 1
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


@pytest.mark.parametrize("area", [(0.2, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("size", [(375, 500), (333, 90)])
def test_boxes_are_distributed_as_torchvisions(area, size):
    """Two-sample Kolmogorov-Smirnov over area, aspect and place; 1.63 is the 1 % bound."""
    count = 3000
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3]) for _ in range(count)], float)
    ours = np.array([draw_box(size, area, stream(0, 9, n).random(NUM_DRAWN).tolist()) for n in range(count)], float)
    for figure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = np.sort(figure(ours)), np.sort(figure(theirs))
        both = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max() / count
        assert distance < 1.63 * math.sqrt(2 / count)


def test_probabilities_are_as_set():
    """4000 images; each share within five deviations; blur and solarize by view."""
    rows = np.stack([draw(DINO, (64, 64), stream(1, 2, 0, number)).colours for number in range(4000)])
    flips = np.array([draw(DINO, (64, 64), stream(1, 2, 0, number)).flips for number in range(4000)])

    def share(values, expected):
        assert abs(np.mean(values) - expected) <= 5 * math.sqrt(expected * (1 - expected) / np.size(values)) + 1e-9

    share(flips, 0.5)
    share(rows[:, :, ORDER] != NO_JITTER, 0.8)
    share(rows[:, :, GREY], 0.2)
    share(rows[:, 0, SIGMA] > 0, 1.0)
    share(rows[:, 1, SIGMA] > 0, 0.1)
    share(rows[:, 0, SOLARIZE], 0.0)
    share(rows[:, 1, SOLARIZE], 0.2)
    assert set(rows[:, :, ORDER].flatten().astype(int)) == {NO_JITTER, *range(24)}
    for column, low, high in ((BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.6, 1.4), (SATURATION, 0.8, 1.2), (HUE, -0.1, 0.1)):
        values = rows[:, :, column]
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    sigmas = rows[:, 0, SIGMA]
    assert 0.1 <= sigmas.min() < 0.12
    assert 1.98 < sigmas.max() <= 2.0


def test_cut_is_torchvisions_resized_crop():
    drawn = draw(DINO, (96, 128), stream(3, 2))
    ours = crops_of(PIXELS, drawn, 32)
    for view, (top, left, h, w), flip in zip(ours, drawn.boxes, drawn.flips, strict=True):
        expected = tv.resized_crop(
            PIXELS, top, left, h, w, [32, 32], interpolation=tv.InterpolationMode.BICUBIC, antialias=True
        )
        assert torch.equal(view, expected.flip(-1) if flip else expected)
    assert ours.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "grass", "text"])
def test_crops_are_pils(name):
    """Box, antialiased bicubic, flip, as PIL does them: on average within 1/255, at hard edges the two round apart."""
    photo = photograph(f"{name}.png")
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    drawn = draw(Crops(count=6, pixels=64, area=(0.05, 1.0)), (photo.height, photo.width), stream(7, 2))
    for ours, (top, left, h, w), flip in zip(crops_of(image, drawn, 64), drawn.boxes, drawn.flips, strict=True):
        pils = photo.crop((left, top, left + w, top + h)).resize((64, 64), Image.Resampling.BICUBIC)
        pils = np.array(ImageOps.mirror(pils) if flip else pils).astype(float)
        assert np.abs(ours.permute(1, 2, 0).numpy() - pils).mean() < 1


@given(height=st.integers(1, 80), width=st.integers(1, 80), pixels=st.integers(2, 40))
def test_the_plain_view_of_any_image(height, width, pixels):
    assert plain_view(torch.zeros(3, height, width, dtype=torch.uint8), pixels).shape == (3, pixels, pixels)


def test_the_plain_view_is_the_middle():
    """224 of 256, as the papers evaluate: torchvision's Resize and CenterCrop."""
    expected = tv.center_crop(tv.resize(PIXELS, [256], interpolation=tv.InterpolationMode.BICUBIC), [224])
    difference = (plain_view(PIXELS, 224).float() - expected.float()).abs()
    assert difference.mean() < 1


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 5000)], ids=str)
def test_the_plain_view_of_a_thin_image_is_small_work(size, monkeypatch):
    """It is its middle's plain view, and nothing much larger than that is ever made."""
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = []
    resize = views.resize
    monkeypatch.setattr(views, "resize", lambda image, size: (made.append(size), resize(image, size))[1])
    view = plain_view(image, 224)
    assert max(max(size) for size in made) <= 4 * 256
    short, half = min(size), max(size) // 2
    around = slice(half - 50 * short, half + 50 * short)
    near = image[:, :, around] if size[0] < size[1] else image[:, around]
    assert torch.equal(view, plain_view(near, 224))
