"""Masks beside images: a class for each pixel, as the numbers of a PNG's pixels (grey or palette); 255 does not count.

An image's mask has its name: photos/a/7.jpg and masks/a/7.png, or 0007 in both of two rows of shards. Masks are looked
at once, all of them, before a run begins: so what is wrong is known by name before any time is spent, and the number of
classes too.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_global.data.decode import BadImage, look, only_bad_images
from ssl_global.data.progress import report as report_progress
from ssl_global.data.source import Source, open_source
from ssl_global.data.views import Drawn
from ssl_global.data.workers import num_cores
from ssl_global.errors import UserError
from ssl_global.recipe import Data

IGNORED = 255
MODES = ("L", "P", "1", "I;16", "I")  # whose pixels are numbers


class Masks:
    """The masks of a source's images, by the images' numbers. Raises UserError if one has none."""

    def __init__(self, path: str, images: Source) -> None:
        self.path, self.images = path, images
        self.source = open_source(path)
        by_name: dict[str, int] = {}
        for index in range(len(self.source)):
            name = name_of(self.source.key(index))
            if name in by_name:
                raise UserError(
                    f"--masks {path}: {self.source.key(by_name[name])} and {self.source.key(index)}: one name"
                )
            by_name[name] = index
        self.index: list[int] = []
        for image in range(len(images)):
            name = name_of(images.key(image))
            if name not in by_name:
                raise UserError(f"--masks {path}: no mask {name} for the image {images.key(image)}")
            self.index.append(by_name[name])

    def parts(self) -> dict[str, str]:
        """As a source's: by which other masks are told apart."""
        return {f"masks {name}": digest for name, digest in self.source.parts().items()}

    def read(self, image: int) -> np.ndarray:
        """uint8 (H, W). Raises BadImage for what is no mask."""
        return decode_mask(self.source.read(self.index[image]))

    def place(self, image: int) -> str:
        return self.source.key(self.index[image])

    def check(self, data: Data, *, num_classes: int | None, visible: bool) -> int:
        """Looks at all of them: whether each is as large as its image, and holds classes that there are.

        num_classes  None: as many as the largest number says

        Returns the number of classes. Raises UserError that names the first mask that is wrong.
        """
        found = 0
        with (
            report_progress("masks looked at", len(self.index), what="masks", visible=visible) as done,
            ThreadPoolExecutor(num_cores()) as pool,
        ):
            for image, facts in enumerate(pool.map(self.facts, range(len(self.index)), [data] * len(self.index))):
                self.refuse(image, facts, num_classes)
                found = max(found, facts.largest + 1)
                done(image + 1)
        return num_classes or found

    def facts(self, image: int, data: Data) -> "Facts":
        try:
            mask = self.read(image)
        except BadImage as error:
            raise UserError(f"{self.place(image)}: {error}") from error
        size = (mask.shape[0], mask.shape[1])
        try:
            of_image = look(self.images.read(image), data.channels, data.max_pixels).size
        except BadImage:
            of_image = size  # counted and replaced in the run, as any bad image
        counted = mask[mask != IGNORED]
        return Facts(size, of_image, int(counted.max()) if counted.size else 0)

    def refuse(self, image: int, facts: "Facts", num_classes: int | None) -> None:
        if facts.size != facts.of_image:
            (h, w), (height, width) = facts.size, facts.of_image
            raise UserError(
                f"{self.place(image)}: {w} x {h} pixels, and its image {self.images.key(image)} has {width} x {height}"
            )
        if num_classes is not None and facts.largest >= num_classes:
            raise UserError(
                f"{self.place(image)}: holds the class {facts.largest}; there are {num_classes}, numbered from 0, and "
                f"{IGNORED} for what does not count"
            )


class Facts(NamedTuple):
    size: tuple[int, int]  # rows and columns of the mask
    of_image: tuple[int, int]
    largest: int  # class


def name_of(key: str) -> str:
    """A sample's name, without its shard and its suffix. In a shard it ends at its first dot, as webdataset has it."""
    _, shard, sample = key.rpartition(".tar/")
    folder, slash, name = sample.rpartition("/")
    bare = name.partition(".")[0] if shard else name.rpartition(".")[0]
    return f"{folder}{slash}{bare or name}"


def decode_mask(data: bytes) -> np.ndarray:
    with only_bad_images(), Image.open(io.BytesIO(data), formats=("PNG", "TIFF", "BMP", "GIF")) as image:
        if image.mode not in MODES:
            raise BadImage(
                f"pixels of the kind {image.mode}: class numbers in one channel, grey or palette, would be right"
            )
        numbers = np.array(image)
    if numbers.max(initial=0) > IGNORED or numbers.min(initial=0) < 0:
        raise BadImage(
            f"holds the number {numbers.max()}: classes are 0 to {IGNORED - 1}, and {IGNORED} does not count"
        )
    return numbers.astype(np.uint8)


def cut_mask(mask: np.ndarray, drawn: Drawn, out: Tensor) -> None:
    """uint8 (H, W) -> the crops that its image has, into uint8 (count, 1, pixels, pixels): the nearest pixels."""
    whole = torch.from_numpy(mask)[None, None]
    for view, (top, left, h, w), flip in zip(out, drawn.boxes, drawn.flips, strict=True):
        crop = F.interpolate(whole[:, :, top : top + h, left : left + w], out.shape[-2:], mode="nearest-exact")[0]
        view.copy_(crop.flip(-1) if flip else crop)
