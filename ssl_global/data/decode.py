"""From the bytes of an image file to its pixels: 8 bits a channel, upright, on white, or `BadImage` with the reason.

The formats are a fixed list, because Pillow would also run PostScript and other formats that nobody trains on.
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 128 * 2**20  # 11 585 x 11 585 (ours): satellite tiles pass, and it lies below Pillow's own refusal

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):  # noqa: N818 - no error of the program: such a sample is counted and replaced
    """A sample that cannot be used. The message is the reason alone: whoever read the bytes knows the name."""


def decode(data: bytes, channels: int) -> Tensor:
    """The image in `data`, uint8 (channels, H, W), 0..255; `channels` is 3 (colour) or 1 (grey).

    EXIF orientation is applied, transparency lies on white, 16-bit grey is scaled (65535 -> 255), an animation gives
    its first frame. Raises BadImage for all that cannot be read whole, has more than MAX_PIXELS, or whose numbers have
    no defined range (float and 32-bit images).
    """
    assert channels in (1, 3), channels
    try:
        # Where several threads decode, a filter may outlive its block: so it names Pillow and silences nothing else.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            return to_tensor(read(data, channels))
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"{len(data)} bytes that are no {', '.join(FORMATS)} image") from error
    except Exception as error:  # on damaged bytes Pillow's parsers raise whatever they stumble over
        raise BadImage(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def read(data: bytes, channels: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width} x {height} pixels, more than the {MAX_PIXELS} that are decoded")
        if channels == 1:
            image.draft("L", image.size)  # a JPEG then leaves its colours undecoded
        image.load()
        return on_white(upright(image), "RGB" if channels == 3 else "L")


def upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # the pixels are right even where the EXIF block is damaged
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def on_white(image: Image.Image, mode: str) -> Image.Image:
    """Any image as 8-bit `mode`, "RGB" or "L"."""
    if image.mode.startswith("I;16"):
        image = eight_bits(image)
    if image.mode in ("I", "F"):
        raise BadImage(f"{'float' if image.mode == 'F' else '32-bit'} numbers, whose range is not defined")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8: Pillow's own conversion would clip at 255."""
    values = np.array(image, dtype=np.uint32)
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
