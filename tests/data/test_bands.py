"""Images of any number of bands, 16 bits, and pixel limits."""

import io

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from loaders import recipe_of, serve
from PIL import Image

from ssl_global.data.decode import BadImage, decode
from ssl_global.data.loader import to_device
from ssl_global.data.source import open_source


def tiff(values: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


@given(
    bands=st.sampled_from([2, 4, 5, 13]),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    bits=st.sampled_from([8, 16]),
    planes=st.booleans(),
    compression=st.sampled_from([None, "zlib"]),
)
def test_bands_of_a_tiff_come_back(
    bands: int, height: int, width: int, bits: int, planes: bool, compression: str | None
) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (height, width, bands)).astype(f"uint{bits}")
    written = np.moveaxis(values, -1, 0) if planes else values
    data = tiff(
        written, planarconfig="separate" if planes else "contig", photometric="minisblack", compression=compression
    )
    pixels = decode(data, bands)
    expected = values if bits == 8 else np.round(values / 257)
    assert torch.equal(pixels, torch.from_numpy(expected.astype(np.uint8)).permute(2, 0, 1))


def test_four_bands_of_a_png_are_its_own() -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values, "RGBA").save(file, "PNG")
    assert torch.equal(decode(file.getvalue(), 4), torch.from_numpy(values).permute(2, 0, 1))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_another_number_of_bands_is_bad(channels: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG")
    with pytest.raises(BadImage, match=rf"3 bands \(RGB\), data\.channels is {channels}"):
        decode(file.getvalue(), channels)
    with pytest.raises(BadImage, match=f"3 bands, data.channels is {channels}"):
        decode(tiff(np.zeros((4, 4, 3), np.uint8)), channels)


@pytest.mark.parametrize("kind", ["float32", "uint32", "int16"])
def test_numbers_without_a_range_are_bad(kind: str) -> None:
    with pytest.raises(BadImage, match=f"{kind} numbers, whose range is not defined"):
        decode(tiff(np.zeros((4, 4, 5), kind), photometric="minisblack", planarconfig="contig"), 5)


def test_a_damaged_tiff_is_bad() -> None:
    data = tiff(np.zeros((40, 40, 5), np.uint8), photometric="minisblack", planarconfig="contig", compression="zlib")
    for cut in (8, 60, len(data) // 2, len(data) - 30):
        with pytest.raises(BadImage):
            decode(data[:cut], 5)


def test_the_largest_number_of_pixels_may_be_set() -> None:
    for data, channels in (
        (tiff(np.zeros((10, 12, 5), np.uint8), photometric="minisblack", planarconfig="contig"), 5),
        (jpeg(12, 10), 3),
    ):
        assert decode(data, channels, 120).shape == (channels, 10, 12)
        with pytest.raises(BadImage, match="12 x 10 pixels, more than the 119 that are decoded"):
            decode(data, channels, 119)


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "JPEG")
    return file.getvalue()


def test_ten_thousand_by_ten_thousand() -> None:
    file = io.BytesIO()
    Image.new("L", (10_000, 10_000), 77).save(file, "JPEG")
    assert decode(file.getvalue(), 1).shape == (1, 10_000, 10_000)


def test_many_bands_through_the_loader(tmp_path) -> None:
    """Thirteen 16-bit bands, as of a satellite, to painted views."""
    values = np.random.default_rng(0).integers(0, 2**16, (13, 60, 70)).astype(np.uint16)
    for number in range(4):
        (tmp_path / f"{number}.tif").write_bytes(tiff(values, photometric="minisblack", planarconfig="separate"))
    recipe = recipe_of(channels=13, mean=(0.5,) * 13, std=(0.25,) * 13)
    (batch,) = serve(open_source(str(tmp_path)), recipe, stop=1)
    assert batch["bad"] == []
    views = to_device(batch, recipe, torch.device("cpu"))["views"]
    assert [tuple(view.shape) for view in views] == [(4, 13, 32, 32)] * 2 + [(4, 13, 16, 16)] * 4
    assert all(view.isfinite().all() and view.std() > 0.1 for view in views)
