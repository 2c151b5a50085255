"""From the bytes of an image file to its pixels: 8 bits a channel, upright, on white, or `BadImage` with the reason.

In two steps, because a sample's boxes are drawn in between: `look` reads the header and knows the size, `pixels` does
the work. Three ways lead to the same pixels:

    plain JPEG     torchcodec's libjpeg-turbo (torchvision.io's successor): bit for bit Pillow's pixels, a fifth faster
    all else       Pillow; the formats are a fixed list, because it would also run PostScript and others
    other numbers  of channels than 1 (grey) and 3 (colour): the file's own bands, TIFF through tifffile

A large JPEG can be decoded at 1/2, 1/4 or 1/8 of its size (`shrunk`), from the low frequencies of its blocks: less
work, nearly the same picture once it is made smaller still. See views.py for when that is done and how near it is.
"""

import contextlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchcodec.decoders import decode_jpeg

from ssl_global.recipe import MAX_PIXELS, MOST_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

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
TURNED_ASIDE = (5, 6, 7, 8)  # orientations whose width is the picture's height


class BadImage(Exception):  # noqa: N818 - no error of the program: such a sample is counted and replaced
    """A sample that cannot be used. The message is the reason alone: whoever read the bytes knows the name."""


class Encoded(ABC):
    """An image whose header has been read: its size is known, its pixels not yet."""

    size: tuple[int, int]  # (height, width), upright
    can_shrink = False

    @abstractmethod
    def pixels(self) -> Tensor:
        """uint8 (channels, H, W), 0..255. Raises BadImage for what cannot be read whole."""

    def shrunk(self, by: int) -> Image.Image:
        """The image at 1/`by` of its size, 2, 4 or 8, sides rounded up; only where `can_shrink`."""
        raise NotImplementedError


def decode(data: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The image in `data`, uint8 (channels, H, W), 0..255.

    channels    3 (colour), 1 (grey), or another number: as many bands must the file have
    max_pixels  more of them are refused before they are decoded

    EXIF orientation is applied, transparency lies on white, 16-bit numbers are scaled (65535 -> 255), an animation
    gives its first frame. Raises BadImage for all that cannot be read whole, has more than `max_pixels`, or whose
    numbers have no defined range (float and 32-bit images).
    """
    return look(data, channels, max_pixels).pixels()


def look(data: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> Encoded:
    """Reads the header: as `decode`, up to the pixels."""
    with only_bad_images():
        if channels in (1, 3) and (frame := plain_jpeg(data)):
            image: Encoded = PlainJpeg(data, frame, channels)
        elif channels not in (1, 3) and data[:4] in TIFF_BEGINNINGS:
            image = TiffBands(data, channels)
        else:
            image = ByPillow(data, channels, max_pixels)
    refuse_larger(image.size, max_pixels)
    return image


def refuse_larger(size: tuple[int, int], max_pixels: int) -> None:
    height, width = size
    if height * width > max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than the {max_pixels} that are decoded")


@contextlib.contextmanager
def only_bad_images() -> Iterator[None]:
    """On damaged bytes parsers raise whatever they stumble over."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}".splitlines()[0]) from error


# ---------------------------------------------------------------------------------------------------------- plain JPEG


EXIF_OR_XMP = 0xE1
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all Huffman coded
BEFORE_FRAME = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))  # tables, comments, what applications add


class Frame(NamedTuple):
    height: int
    width: int


class PlainJpeg(Encoded):
    """Grey or colour, upright, 8 bits: what nearly every photograph is."""

    can_shrink = True

    def __init__(self, data: bytes, frame: Frame, channels: int) -> None:
        self.data = data
        self.size = (frame.height, frame.width)
        self.channels = channels

    def pixels(self) -> Tensor:
        # Given bytes, it would silence all warnings for a moment, which is no good in threads.
        data = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        try:
            pixels = decode_jpeg(data, mode="RGB" if self.channels == 3 else "GRAY")
            assert isinstance(pixels, Tensor)
            return pixels
        except RuntimeError:  # Pillow may be more lenient, and has better words
            with only_bad_images():
                return ByPillow(self.data, self.channels, MOST_PIXELS).pixels()

    def shrunk(self, by: int) -> Image.Image:
        height, width = self.size
        mode = "RGB" if self.channels == 3 else "L"
        with only_bad_images(), Image.open(io.BytesIO(self.data), formats=("JPEG",)) as image:
            image.draft(mode, (width // by, height // by))
            image.load()
            return image if image.mode == mode else image.convert(mode)


def plain_jpeg(data: bytes) -> Frame | None:
    """The size of a JPEG of one or three 8-bit channels that needs no turning; None for Pillow to look at."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == 0xFF:  # a fill byte
            at += 1
        elif kind in FRAMES:
            bits, height, width, channels = data[at + 4], *dimensions(data, at), data[at + 9 : at + 10]
            usual = bits == 8 and height and width and channels in (b"\1", b"\3")
            return Frame(height, width) if usual else None
        elif kind == EXIF_OR_XMP and may_turn(data[at + 4 : at + 2 + length]):
            return None
        elif kind in BEFORE_FRAME:
            at += 2 + length
        else:
            return None
    return None


def dimensions(data: bytes, at: int) -> tuple[int, int]:
    return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")


def may_turn(application_segment: bytes) -> bool:
    """Whether this EXIF or XMP block asks for a turn, as Pillow understands it."""
    if not application_segment.startswith(b"Exif\0\0"):
        return b"Orientation" in application_segment
    exif = Image.Exif()
    try:
        exif.load(application_segment)
        return exif.get(EXIF_ORIENTATION) in UPRIGHT
    except Exception:  # the pixels are right even where the EXIF block is damaged
        return False


# -------------------------------------------------------------------------------------------------------------- Pillow


class ByPillow(Encoded):
    """Everything else that people have."""

    def __init__(self, data: bytes, channels: int, max_pixels: int) -> None:
        self.channels = channels
        try:
            with quiet():
                self.image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise BadImage(f"{len(data)} bytes that are no {', '.join(FORMATS)} image") from error
        width, height = self.image.size
        refuse_larger((height, width), max_pixels)  # first: to know a PNG's orientation, all of it is read
        with quiet():
            self.orientation = None if self.image.format == "TIFF" else orientation(self.image)  # Pillow turns a TIFF
        self.size = (width, height) if self.orientation in TURNED_ASIDE else (height, width)

    def pixels(self) -> Tensor:
        with only_bad_images(), quiet(), self.image as file:
            if self.channels == 1:
                file.draft("L", file.size)  # a JPEG then leaves its colours undecoded
            file.load()
            image = file.transpose(UPRIGHT[self.orientation]) if self.orientation in UPRIGHT else file
            if self.channels not in (1, 3):
                return own_bands(image, self.channels)
            return to_tensor(on_white(image, "RGB" if self.channels == 3 else "L"))


class quiet(warnings.catch_warnings):  # noqa: N801 - used as a statement
    """Pillow's warnings of odd files are not for the user."""

    def __enter__(self) -> None:
        super().__enter__()
        # Where several threads decode, a filter may outlive its block: so it names Pillow and silences nothing else.
        warnings.filterwarnings("ignore", module=r"PIL\.")


def orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except Exception:
        return None


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
    return Image.fromarray(scaled_to_8_bits(values))


def scaled_to_8_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def own_bands(image: Image.Image, channels: int) -> Tensor:
    bands = len(image.getbands())
    if bands != channels or image.mode in ("P", "PA"):
        raise BadImage(f"{bands} bands ({image.mode}), data.channels is {channels}")
    return to_tensor(image)


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W), the channels of a pixel beside each other in memory: the resizing is twice as fast so."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------- many bands


TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # of either byte order, and of more than 4 GB


class TiffBands(Encoded):
    """A TIFF of any number of 8- or 16-bit bands, in either order: (H, W, C) or (C, H, W)."""

    def __init__(self, data: bytes, channels: int) -> None:
        self.page = tifffile.TiffFile(io.BytesIO(data)).pages.first
        self.size = (int(self.page.imagelength), int(self.page.imagewidth))
        if self.page.samplesperpixel != channels:
            raise BadImage(f"{self.page.samplesperpixel} bands, data.channels is {channels}")
        if self.page.dtype not in (np.uint8, np.uint16):
            raise BadImage(f"{self.page.dtype} numbers, whose range is not defined")

    def pixels(self) -> Tensor:
        with only_bad_images():
            values = self.page.asarray()
        values = scaled_to_8_bits(values) if values.dtype == np.uint16 else values
        if self.page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            values = np.moveaxis(values.reshape(-1, *self.size), 0, -1)
        return torch.from_numpy(np.ascontiguousarray(values.reshape(*self.size, -1))).permute(2, 0, 1)
