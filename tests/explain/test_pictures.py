"""What the pictures share: colours that rise evenly, overlays, sheets, and sizes."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab

from ssl_global.data.views import normalise
from ssl_global.errors import UserError
from ssl_global.explain import pictures as p

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_colours_rise_in_lightness_by_even_steps():
    lightness = rgb2lab(p.colours(torch.linspace(0, 1, 256)).numpy()[None] / 255)[0, :, 0]
    steps = np.diff(lightness[::16])
    assert lightness[0] < 20
    assert lightness[-1] > 85
    assert steps.min() > 0.6 * steps.mean()
    assert steps.max() < 1.4 * steps.mean()


def test_colours_are_matplotlibs_and_clipped():
    import matplotlib

    expected = matplotlib.colormaps["viridis"]([0.0, 0.5, 1.0], bytes=True)[:, :3]
    assert np.abs(p.colours(torch.tensor([-1.0, 0.5, 7.0])).numpy().astype(int) - expected).max() <= 1


def test_unnormalising_is_normalising_backwards():
    images = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(p.unnormalised(normalise(images, MEAN, STD), MEAN, STD), images)


def test_upsampling_is_bilinear_between_the_centres_of_places():
    small = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    found = p.upsample(small, (9, 20))
    for y in range(9):
        for x in range(20):
            row, col = (y + 0.5) * 3 / 9 - 0.5, (x + 0.5) * 4 / 20 - 0.5
            total = 0.0
            for i in range(3):
                for j in range(4):
                    near_row = max(0.0, 1 - abs(min(max(row, 0), 2) - i))
                    near_col = max(0.0, 1 - abs(min(max(col, 0), 3) - j))
                    total += float(small[i, j]) * near_row * near_col
            assert found[y, x].item() == pytest.approx(total, abs=1e-5)
    boxes = p.upsample(small, (6, 8), smooth=False)
    assert torch.equal(boxes, small.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_an_overlay_is_grey_image_and_colours_in_their_shares():
    image, values = noise(30, 20), torch.rand(2, 3)
    grey, colour = image.convert("L").convert("RGB"), p.map_picture(values, (20, 30), smooth=True)
    assert np.array_equal(p.overlay(image, values, 0), grey)
    assert np.array_equal(p.overlay(image, values, 1), colour)
    half = (np.asarray(grey).astype(float) + np.asarray(colour)) / 2
    assert np.abs(np.asarray(p.overlay(image, values, 0.5)) - half).max() <= 1
    with pytest.raises(UserError, match=r"strength = 1.5: in 0..1"):
        p.overlay(image, values, 1.5)


@pytest.mark.parametrize("size", [(640, 480), (97, 300), (10, 10)])
def test_an_input_is_the_whole_picture_in_multiples(size):
    picture = noise(*size)
    x = p.as_input(picture, shorter=64, multiple=16, mean=MEAN, std=STD)
    assert x.shape[0] == 1
    assert x.shape[2] % 16 == x.shape[3] % 16 == 0
    assert min(x.shape[2:]) == 64
    assert x.shape[3] / x.shape[2] == pytest.approx(size[0] / size[1], abs=0.13)
    same = p.as_input(noise(32, 48), shorter=32, multiple=16, mean=MEAN, std=STD)
    pixels = torch.from_numpy(np.array(noise(32, 48))).permute(2, 0, 1)[None]
    torch.testing.assert_close(p.unnormalised(same, MEAN, STD) * 255, pixels.float(), atol=1e-3, rtol=0)


def test_pictures_and_tensors_are_each_others():
    picture = noise(7, 5)
    assert np.array_equal(p.as_picture(p.as_tensor(picture)), picture)
    assert p.as_picture(torch.tensor([[[-1.0, 0.5, 2.0]]])).getpixel((2, 0)) == (255, 255, 255)


def test_a_faded_image_keeps_what_is_to_be_kept():
    image = noise(8, 8)
    kept = np.asarray(p.faded(image, torch.tensor([[True, False], [False, True]])))
    assert np.array_equal(kept[:4, :4], np.asarray(image)[:4, :4])
    assert (kept[:4, 4:] == 128).all()


def test_a_sheet_has_its_pictures_side_by_side():
    a, b = Image.new("RGB", (50, 100), "red"), Image.new("RGB", (30, 20), "blue")
    made = p.sheet([[(a, "one"), (b, "")], [(b, "a very long name that fits nowhere.jpg")]], side=40, head=["x", "y"])
    colours = np.asarray(made).reshape(-1, 3)
    assert (colours == (255, 0, 0)).all(1).sum() == 20 * 40
    assert (colours == (0, 0, 255)).all(1).sum() == 2 * 60 * 40
    assert (colours == p.INK).all(1).any()
    with pytest.raises(UserError, match="no pictures"):
        p.sheet([[]])


def test_a_long_name_loses_its_middle_and_fits():
    font = p.ImageFont.load_default(size=12)
    short = p.fitting("holidays-2024-long-name-00017.jpg", 90, font)
    assert font.getlength(short) <= 90
    assert short.startswith("hol")
    assert short.endswith(".jpg")
    assert "…" in short
    assert p.fitting("a\nb", 90, font) == "a?b"


def test_a_mark_is_at_its_point_and_the_image_stays():
    image = Image.new("RGB", (80, 60), "black")
    made = np.asarray(p.mark(image, (20, 30))).astype(int)
    rows, cols = np.nonzero(made.sum(2))
    assert abs(rows.mean() - 30) < 1
    assert abs(cols.mean() - 20) < 1
    assert np.asarray(image).sum() == 0
