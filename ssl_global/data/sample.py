"""The built-in sample: real photographs that scikit-image ships, cut into small crops. No download, no files of ours.

A crop's class is the photograph that it was cut from. Training crops come from the left 68 % of each photograph and
validation crops from the rest, so no pixel is in both. k-NN of raw pixels: see README.md.

For segmentation, crops on which shapes are drawn (disc, square, triangle), of a random colour over another photograph's
pixels, and their masks: 0 is what is left of the crop, 1 to 3 the shapes.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage
import webdataset
from PIL import Image, ImageDraw

from ssl_global.data.cache import cache_folder
from ssl_global.data.randomness import SAMPLE, SHAPE, stream
from ssl_global.errors import UserError

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg",
    "rocket.jpg", "text.png",
)  # fmt: skip
NUM_TRAIN, NUM_VAL = 3000, 900
PIXELS = 64  # side of a crop
TRAIN_SHARE = 0.68  # of a photograph's width
SIDES = (0.35, 0.9)  # of a crop, as a share of the region's shorter side
SHARDS = 4  # of training crops; validation has one
SEED = 0
VERSION = 2  # of all the above: another version is another folder
SHAPES = ("photograph", "disc", "square", "triangle")  # classes of the masks
NUM_SHAPES_TRAIN, NUM_SHAPES_VAL = 600, 120
SHAPE_RADII = (0.12, 0.3)  # as shares of the crop's side
MOST_SHAPES = 3  # on a crop
COLOUR_SHARE = 0.7  # of a shape's colour, over what it is painted on
SHAPES_VERSION = 1  # of the shapes


def built_in_sample(cache: Path | None = None) -> tuple[str, str]:
    """(training shards, validation shards) as patterns; written to the user's cache folder on first use, in seconds."""
    folder = (cache or cache_folder()) / f"sample-v{VERSION}"
    if not folder.exists():
        write(folder, fill_with_crops)
    return str(folder / "train" / "*.tar"), str(folder / "val" / "*.tar")


def built_in_shapes(cache: Path | None = None) -> dict[str, str]:
    """Folders of crops with shapes on them, and of their masks: {"data", "masks", "val", "val_masks"}."""
    folder = (cache or cache_folder()) / f"shapes-v{SHAPES_VERSION}"
    if not folder.exists():
        write(folder, fill_with_shapes)
    names = {"data": "train", "masks": "train-masks", "val": "val", "val_masks": "val-masks"}
    return {name: str(folder / part) for name, part in names.items()}


def write(folder: Path, fill: Callable[[Path, list[Image.Image]], None]) -> None:
    """All of it under a temporary name, then renamed; of two processes at once one wins, and both have the same."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".sample-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"{folder.parent}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    fill(temporary, [photograph(name) for name in PHOTOGRAPHS])
    try:
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.exists():
            raise


def fill_with_crops(folder: Path, photographs: list[Image.Image]) -> None:
    for part, count, num_shards in (("train", NUM_TRAIN, SHARDS), ("val", NUM_VAL, 1)):
        (folder / part).mkdir()
        names = [Path(name).stem for name in PHOTOGRAPHS]
        (folder / part / "classes.json").write_text(json.dumps(names))
        for shard in range(num_shards):
            write_shard(folder / part / f"{part}-{shard:06d}.tar", photographs, part, range(shard, count, num_shards))


def fill_with_shapes(folder: Path, photographs: list[Image.Image]) -> None:
    for part, count in (("train", NUM_SHAPES_TRAIN), ("val", NUM_SHAPES_VAL)):
        write_shapes(folder, photographs, part, count)


def photograph(name: str) -> Image.Image:
    """From the installed package's own files; nothing is downloaded."""
    file = Path(skimage.__file__).parent / "data" / name
    if not file.is_file():
        raise UserError(f"{file}: this scikit-image has no such photograph; 0.25 and 0.26 have")
    with Image.open(file) as image:
        return image.convert("RGB")


def write_shard(path: Path, photographs: list[Image.Image], part: str, crops: range) -> None:
    with path.open("wb") as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0)
        for number in crops:
            label = number % len(photographs)  # the classes take turns
            image = crop(photographs[label], part, number)
            writer.write({"__key__": f"{part}-{number:05d}", "jpg": image, "cls": str(label).encode()})
        writer.close()


def write_shapes(folder: Path, photographs: list[Image.Image], part: str, count: int) -> None:
    images, masks = folder / part, folder / f"{part}-masks"
    images.mkdir()
    masks.mkdir()
    for number in range(count):
        random = stream(SEED, SHAPE, ("train", "val").index(part), number)
        image = square(photographs[number % len(photographs)], part, random)
        mask = Image.new("L", image.size, 0)
        for _ in range(int(random.integers(1, MOST_SHAPES + 1))):
            texture = square(photographs[int(random.integers(len(photographs)))], part, random)
            colour = Image.new("RGB", image.size, tuple(random.integers(0, 256, 3).tolist()))
            filling = Image.blend(texture, colour, COLOUR_SHARE)
            kind = int(random.integers(1, len(SHAPES)))
            place = shape(kind, random)
            image.paste(filling, mask=place)
            mask.paste(kind, mask=place)
        image.save(images / f"{number:04d}.jpg", quality=92)
        mask.save(masks / f"{number:04d}.png")


def shape(kind: int, random: np.random.Generator) -> Image.Image:
    """White where it is, black elsewhere."""
    radius = PIXELS * random.uniform(*SHAPE_RADII)
    x, y = random.uniform(radius, PIXELS - radius, 2)
    drawn = Image.new("L", (PIXELS, PIXELS), 0)
    box = (x - radius, y - radius, x + radius, y + radius)
    if SHAPES[kind] == "disc":
        ImageDraw.Draw(drawn).ellipse(box, fill=255)
    elif SHAPES[kind] == "square":
        ImageDraw.Draw(drawn).rectangle(box, fill=255)
    else:
        corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
        ImageDraw.Draw(drawn).polygon(corners, fill=255)
    return drawn


def crop(image: Image.Image, part: str, number: int) -> bytes:
    """A random square of the part's region, as a JPEG."""
    encoded = io.BytesIO()
    square(image, part, stream(SEED, SAMPLE, ("train", "val").index(part), number)).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def square(image: Image.Image, part: str, random: np.random.Generator) -> Image.Image:
    border = round(image.width * TRAIN_SHARE)
    left, right = (0, border) if part == "train" else (border, image.width)
    side = round(min(right - left, image.height) * random.uniform(*SIDES))
    x = int(random.integers(left, right - side + 1))
    y = int(random.integers(0, image.height - side + 1))
    return image.crop((x, y, x + side, y + side)).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
