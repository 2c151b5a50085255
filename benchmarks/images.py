"""Files to measure with: photographs as JPEG, and shards of a million tiny samples."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_global.data.sample import PHOTOGRAPHS, photograph

COLOUR = [
    name for name in PHOTOGRAPHS if Path(name).stem in {"astronaut", "chelsea", "coffee", "motorcycle_left", "rocket"}
]
SIZE = (500, 375)  # near ImageNet's usual
QUALITY = 90


def write_photographs(folder: Path, count: int) -> None:
    """`count` crops of scikit-image's colour photographs, 500 x 375, as JPEG."""
    random = np.random.default_rng(0)
    images = [photograph(name) for name in COLOUR]
    for number in range(count):
        image = images[number % len(images)]
        scale = random.uniform(1.0, 1.6)
        width = min(image.width, round(SIZE[0] / scale))
        height = min(image.height, round(width * SIZE[1] / SIZE[0]))
        left, top = (int(random.integers(0, free + 1)) for free in (image.width - width, image.height - height))
        crop = image.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        crop.save(folder / f"{number:05d}.jpg", quality=QUALITY)


def write_tiny_shards(folder: Path, samples: int, per_shard: int) -> None:
    """Shards of 16 x 16 JPEGs of one block each: about a gigabyte for a million."""
    random = np.random.default_rng(0)
    images = [tiny(random) for _ in range(64)]
    for shard, first in enumerate(range(0, samples, per_shard)):
        with (folder / f"tiny-{shard:06d}.tar").open("wb") as file:
            for number in range(first, min(first + per_shard, samples)):
                image = images[number % len(images)]
                file.write(header(f"{number:09d}.jpg", len(image)) + image + bytes(-len(image) % 512))
            file.write(bytes(1024))


def tiny(random: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8)).save(file, "JPEG", quality=60)
    return file.getvalue()


def header(name: str, size: int) -> bytes:
    """Of a ustar member; tarfile's own would take ten times as long."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:136] = b"0000644\x000000000\x000000000\x00" + f"{size:011o}\0".encode()
    block[136:156] = b"00000000000\0" + b" " * 8
    block[156:157] = b"0"
    block[257:265] = b"ustar\x0000"
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)
