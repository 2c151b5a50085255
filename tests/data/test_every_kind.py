"""Every mode that Pillow writes, in colour and in grey, against Pillow's own conversion; and cuts at many places."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_global.data.decode import BadImage, decode

ROWS, COLUMNS = np.mgrid[0:48, 0:64]
PICTURE = Image.fromarray(np.stack([COLUMNS * 4, ROWS * 5, (ROWS + COLUMNS) * 2], -1).astype(np.uint8))
WRITTEN = [
    *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    *((mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")),
    *((mode, "JPEG") for mode in ("1", "L", "RGB", "CMYK", "YCbCr")),
    *((mode, "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")),
    *((mode, "GIF") for mode in ("1", "L", "P")),
    *((mode, "WEBP") for mode in ("RGB", "RGBA")),
]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("mode", "kind"), WRITTEN)
def test_opaque_images_are_what_pillow_makes_of_them(mode: str, kind: str, channels: int) -> None:
    data = encoded(PICTURE.convert(mode), kind)
    pillows = np.array(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
    pixels = decode(data, channels)
    assert pixels.dtype == torch.uint8
    assert pixels.permute(1, 2, 0).is_contiguous()  # a pixel's channels lie side by side
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - pillows.reshape(48, 64, channels))
    rounded_twice = channels == 1 and (kind == "JPEG" or mode in ("P", "CMYK", "YCbCr", "RGBA", "LA"))
    assert difference.max() <= (2 if rounded_twice else 0)


def test_the_second_picture_of_a_phones_jpeg_is_left_aside() -> None:
    both = encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)])
    assert torch.equal(decode(both, 3), decode(encoded(PICTURE, "JPEG"), 3))


def test_16_bit_tiff_of_either_byte_order() -> None:
    values = np.array([[0, 257, 32768, 65535]])
    for order in ("<u2", ">u2"):
        data = encoded(Image.fromarray(values.astype(order)), "TIFF")
        assert data[:2] == (b"II" if order == "<u2" else b"MM")
        assert decode(data, 3)[:, 0].tolist() == [[0, 1, 128, 255]] * 3


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.7, 0.9, 0.99, "two bytes"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_cut_short_anywhere_is_bad(share: float | str, progressive: bool, channels: int) -> None:
    data = encoded(PICTURE, "JPEG", progressive=progressive)
    with pytest.raises(BadImage):
        decode(data[:-2] if isinstance(share, str) else data[: int(share * len(data))], channels)


def test_a_gif_that_claims_a_huge_canvas_is_bad() -> None:
    data = bytearray(encoded(PICTURE.quantize(8), "GIF"))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    with pytest.raises(BadImage, match="pixels"):
        decode(bytes(data), 3)
