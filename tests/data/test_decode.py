"""Decoding: every kind of image that people have, against Pillow or against its own pixels, and all that is bad."""

import io
import pickle
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_global.data import decode as decode_module
from ssl_global.data.decode import MAX_PIXELS, UPRIGHT, BadImage, decode

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(0, 192, 4), np.arange(32, 160, 4)) * 2, -1)[..., :3].astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def expected(pixels: np.ndarray) -> torch.Tensor:
    pixels = np.atleast_3d(pixels)
    return torch.from_numpy(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()).permute(2, 0, 1)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_exactly(kind: str, options: dict[str, object]) -> None:
    assert torch.equal(decode(encoded(Image.fromarray(COLOUR), kind, **options), 3), expected(COLOUR))


def test_jpeg_is_what_pillow_reads() -> None:
    data = encoded(Image.fromarray(SMOOTH), "JPEG")
    assert torch.equal(decode(data, 3), expected(np.array(Image.open(io.BytesIO(data)))))


def test_grey_is_asked_of_the_jpeg_itself() -> None:
    data = encoded(Image.fromarray(SMOOTH), "JPEG")
    luma = Image.open(io.BytesIO(data))
    luma.draft("L", luma.size)
    assert torch.equal(decode(data, 1)[0], torch.from_numpy(np.array(luma)))
    through_colour = np.array(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    assert np.abs(decode(data, 1)[0].numpy().astype(int) - through_colour).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_keeps_its_values(channels: int) -> None:
    assert torch.equal(decode(encoded(Image.fromarray(GREY), "PNG"), channels), expected(GREY)[:channels])


@pytest.mark.parametrize("channels", [1, 3])
def test_one_pixel(channels: int) -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), "red"), "JPEG"), channels).shape == (channels, 1, 1)


def test_one_bit_is_black_and_white() -> None:
    pixels = np.where(GREY > 128, 255, 0).astype(np.uint8)
    assert torch.equal(decode(encoded(Image.fromarray(GREY > 128), "PNG"), 3), expected(pixels))


def test_palette() -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    assert torch.equal(decode(encoded(image, "PNG"), 3), expected(np.array(image.convert("RGB"))))


def test_cmyk_jpeg() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")
    pixels = decode(encoded(red, "JPEG"), 3)
    assert (pixels.float().mean((1, 2)) - torch.tensor([200.0, 30, 30])).abs().max() < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 256, 257, 32768, 65278, 65535]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(values), kind), 1).flatten().tolist() == [0, 1, 1, 128, 254, 255]


def test_transparent_16_bit_grey_is_white() -> None:
    data = encoded(Image.fromarray(np.array([[300, 40000]], dtype=np.uint16)), "PNG")
    head = 8 + 25  # signature and IHDR
    data = data[:head] + png_chunk(b"tRNS", struct.pack(">H", 300)) + data[head:]
    assert decode(data, 1).flatten().tolist() == [255, 156]


def test_transparency_lies_on_white() -> None:
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], dtype=np.uint8)
    assert decode(encoded(Image.fromarray(pixels), "PNG"), 3)[:, 0].T.tolist() == [[255] * 3, [10, 20, 30], [204] * 3]


def test_grey_with_transparency() -> None:
    pixels = np.array([[[10, 0], [10, 255]]], dtype=np.uint8)
    assert decode(encoded(Image.fromarray(pixels, "LA"), "PNG"), 1).flatten().tolist() == [255, 10]


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_transparent_palette_entry_is_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert decode(encoded(image, "PNG", transparency=transparency), 3)[:, 0].T.tolist() == [[255] * 3, [40, 50, 60]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", sorted({1, *UPRIGHT}))
def test_exif_orientation(kind: str, orientation: int) -> None:
    """The stored pixels, turned as the standard says: row 0 and column 0 are at the named sides of the picture."""
    turn: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: np.rot90(p, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(SMOOTH), kind, exif=exif)
    stored = SMOOTH if kind != "JPEG" else np.array(Image.open(io.BytesIO(data)))
    assert torch.equal(decode(data, 3), expected(turn[orientation](stored)))


def test_damaged_exif_leaves_the_pixels() -> None:
    data = encoded(Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 30)
    assert decode(data, 3).shape == (3, *SMOOTH.shape[:2])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, object] = {"save_all": True, "append_images": frames[1:]}
    if kind == "WEBP":
        options["lossless"] = True
    assert decode(encoded(frames[0], kind, **options), 3)[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_range_are_bad(mode: str) -> None:
    with pytest.raises(BadImage, match="range is not defined"):
        decode(encoded(Image.new(mode, (4, 4)), "TIFF"), 3)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_bad(data: bytes) -> None:
    with pytest.raises(BadImage, match=f"{len(data)} bytes that are no JPEG, PNG"):
        decode(data, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_is_bad(kind: str) -> None:
    data = encoded(Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2], 3)


def test_bomb_is_bad_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    side = int(MAX_PIXELS**0.5) + 1  # above what Pillow warns of, below what it refuses
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b""))
    monkeypatch.setattr(decode_module, "orientation", lambda image: pytest.fail("was decoded"))
    with pytest.raises(BadImage, match=f"{side} x {side} pixels, more than"):
        decode(bomb, 3)


def test_huge_bomb_is_bad() -> None:
    header = struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0)
    with pytest.raises(BadImage, match="exceeds limit"):
        decode(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b""), 3)


def test_bad_image_can_be_sent_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadImage("cut short")))
    assert isinstance(error, BadImage)
    assert str(error) == "cut short"


@given(st.data())
def test_damage_is_bad_image_or_an_image_and_nothing_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]))
    raw = bytearray(encoded(Image.fromarray(COLOUR), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(bytes(raw), 3)
    except BadImage:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3
