"""One image before it is packed: is it whole, what is it, and how does it become smaller."""

import io
import warnings
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ssl_global.data.decode import FORMATS, BadImage, decode

QUALITY = 92  # of JPEG (ours)
GREY = frozenset(("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I", "F"))  # Pillow's modes
MAX_JPEG_SIDE = 65500  # libjpeg's JPEG_MAX_DIMENSION
TIFF_BANDS = 277  # the tag SamplesPerPixel


class Examined(NamedTuple):
    """An image as it will be packed."""

    data: bytes
    format: str
    mode: str  # as Pillow names it, or "13 bands"
    height: int  # upright
    width: int
    moments: np.ndarray | None  # (2, 3): mean of each channel in 0..1, and of its square; None if it has no colours


class Header(NamedTuple):
    format: str
    mode: str
    all_bands: bool  # whether Pillow sees all that the file has


def examine(data: bytes, resize: int | None, quality: int | None) -> Examined:
    """Decodes an image and shrinks it if it is to be. Raises BadImage."""
    header = read_header(data)
    if header is None:
        return examine_bands(data)
    pixels = decode(data, 1 if header.mode in GREY else 3)
    if header.all_bands and (size := new_size(pixels, resize, quality)):
        image = as_pillow(pixels)
        data = as_jpeg(image, size, quality or QUALITY)
        header, pixels = Header("JPEG", image.mode, True), decode(data, 3)
    height, width = pixels.shape[1:]
    return Examined(data, header.format, header.mode, height, width, moments(pixels))


def read_header(data: bytes) -> Header | None:
    """None if Pillow does not know it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd files
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # A TIFF of red, green, blue and infrared is RGB to Pillow.
                extra = isinstance(image, TiffImageFile) and image.tag_v2.get(TIFF_BANDS, 1) > len(image.getbands())
                # An MPO is a camera's JPEG with a preview behind it.
                return Header("JPEG" if image.format == "MPO" else str(image.format), image.mode, not extra)
    except Exception:  # on damaged bytes parsers raise whatever they stumble over; decode has the words for it
        return None


def examine_bands(data: bytes) -> Examined:
    """What is neither grey nor colour, such as a satellite's TIFF of 13 bands, is packed as it is."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            bands = int(file.pages.first.samplesperpixel)
    except Exception:
        bands = 3
    pixels = decode(data, bands)
    if bands in (1, 3):
        raise BadImage("its header cannot be read")
    height, width = pixels.shape[1:]
    return Examined(data, "TIFF", f"{bands} bands", height, width, None)


def new_size(pixels: Tensor, resize: int | None, quality: int | None) -> tuple[int, int] | None:
    """(width, height) of the JPEG that it becomes; None if it stays as it is."""
    height, width = pixels.shape[1:]
    shorter = min(height, width)
    if resize is not None and shorter > resize:
        width, height = (round(side * resize / shorter) for side in (width, height))
    elif resize is not None or quality is None:
        return None
    return (width, height) if max(width, height) <= MAX_JPEG_SIDE else None


def as_pillow(pixels: Tensor) -> Image.Image:
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def as_jpeg(image: Image.Image, size: tuple[int, int], quality: int) -> bytes:
    """With colours at full resolution (4:4:4): they were halved once in the camera, and views enlarge small parts."""
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:4:4")
    return file.getvalue()


def moments(pixels: Tensor) -> np.ndarray:
    """(2, 3): from how often each value occurs, so the sums are exact."""
    counts = np.array(as_pillow(pixels).histogram(), dtype=np.int64).reshape(-1, 256)
    values = np.arange(256)
    sums = np.stack([counts @ values, counts @ values**2])
    return np.broadcast_to(sums / (counts[0].sum() * np.array([[255], [255**2]])), (2, 3))
