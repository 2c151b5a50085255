"""The views of an image: what is drawn, what is cut on the CPU, and what is painted on the device.

    draw     all random numbers of a sample, from its own stream: the boxes, and a row of numbers for each crop's
             colours; this needs the image's size only, so it comes before the image is decoded
    cut      decoded image -> uint8 crops, resized with antialias and flipped, into a buffer that is used again
    augment  for recipes that learn from labels: timm's RandAugment of the uint8 crops, from the sample's own seed
    paint    uint8 crops -> float views: colour jitter, grey, blur, solarize, normalise (batched, where the model is)
    erase    for recipes that learn from labels: timm's random erasing of the float views, from the sample's own seed

Boxes are drawn as Inception and torchvision do; the colours follow DINO's main_dino.py: jitter with its four operations
in random order, then grey, blur, solarize. Resizing is torch's bicubic on uint8: few bytes differ from PIL's, by 1.

A JPEG whose boxes are all much larger than their views is decoded at 1/2, 1/4 or 1/8 (`shrink_of`): only while at least
a factor of 4 is left to the antialiased resize. The views of photographs then differ from the exact ones by 0.8/255 on
average, by 1.7/255 in the 95th of 100 (with a factor of 2: 1.4 and 3.0).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ssl_global.data.randomness import seeded
from ssl_global.recipe import Crops

# Of timm: a box of a random place, size and shape, filled with noise, drawn on the CPU so that any device has the same.
ERASE = {"mode": "pixel", "device": "cpu"}

# The columns of a crop's row of colour numbers.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE = range(8)
NUM_NUMBERS = 8
NO_JITTER = -1  # in the column ORDER
ORDERS = list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))

SIGMAS = (0.1, 2.0)  # of the blur, in pixels: DINO, utils.py
BLUR_RADIUS = 6  # pixels: three times the largest sigma
ASPECTS = (3 / 4, 4 / 3)  # width / height of a box: torchvision's RandomResizedCrop
LOG_ASPECTS = (math.log(ASPECTS[0]), math.log(ASPECTS[1]))
TRIES = 10  # to fit a box into the image: torchvision's RandomResizedCrop
LEFT_TO_RESIZE = 4  # when a JPEG is decoded smaller (ours): the head says how near that is
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601, as PIL

# What a crop draws, evenly in 0..1: area and aspect of each try, place (2), flip, colours (10).
FLIP = 2 * TRIES + 2
NUM_DRAWN = FLIP + 1 + 10

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels of the image


@dataclass(frozen=True)
class Drawn:
    """All that chance says of the crops of one kind of one image."""

    boxes: list[Box]
    flips: list[bool]
    colours: np.ndarray  # float32 (count, NUM_NUMBERS)


def draw(crops: Crops, size: tuple[int, int], random: np.random.Generator) -> Drawn:
    """Boxes and colours for an image of `size` (height, width)."""
    # Each number is drawn, used or not: one setting, or an image's size, does not shift the rest.
    rows = random.random((crops.count, NUM_DRAWN)).tolist()
    return Drawn(
        boxes=[draw_box(size, crops.area, row) for row in rows],
        flips=[row[FLIP] < crops.flip for row in rows],
        colours=np.array([draw_colours(crops, view, row[FLIP + 1 :]) for view, row in enumerate(rows)], np.float32),
    )


def draw_box(size: tuple[int, int], area: tuple[float, float], numbers: Sequence[float]) -> Box:
    """A box with a share of the area drawn evenly, an aspect drawn evenly in its logarithm, and a place drawn evenly.

    Ten tries to fit it into the image; then the largest box in the middle with the nearest allowed aspect.
    """
    height, width = size
    for one in range(0, 2 * TRIES, 2):
        pixels = height * width * between(*area, numbers[one])
        aspect = math.exp(between(*LOG_ASPECTS, numbers[one + 1]))
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            down, right = numbers[2 * TRIES : 2 * TRIES + 2]
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    aspect = min(max(width / height, ASPECTS[0]), ASPECTS[1])
    h, w = max(min(height, round(width / aspect)), 1), max(min(width, round(height * aspect)), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def between(low: float, high: float, number: float) -> float:
    return low + (high - low) * number


def draw_colours(crops: Crops, view: int, numbers: Sequence[float]) -> list[float]:
    """Ten numbers in 0..1 -> a crop's row of NUM_NUMBERS."""
    brightness, contrast, saturation, hue, order, sigma, *chances = numbers
    if_jittered, if_grey, if_blurred, if_solarized = chances
    return [
        1 + crops.brightness * (2 * brightness - 1),
        1 + crops.contrast * (2 * contrast - 1),
        1 + crops.saturation * (2 * saturation - 1),
        crops.hue * (2 * hue - 1),
        int(order * len(ORDERS)) if if_jittered < crops.jitter else NO_JITTER,
        if_grey < crops.grey,
        between(*SIGMAS, sigma) if if_blurred < crops.blur[view % len(crops.blur)] else 0,
        if_solarized < crops.solarize[view % len(crops.solarize)],
    ]


# ---------------------------------------------------------------------------------------------------------- on the CPU


def cut(image: Tensor, drawn: Drawn, out: Tensor) -> None:
    """uint8 (C, H, W) -> its crops, into uint8 (count, C, pixels, pixels)."""
    size = (out.shape[2], out.shape[3])
    for view, (top, left, h, w), flip in zip(out, drawn.boxes, drawn.flips, strict=True):
        crop = resize(image[:, top : top + h, left : left + w], size)
        view.copy_(crop.flip(-1) if flip else crop)


def augment(crops: Tensor, operations: str, mean: tuple[float, ...], seed: int) -> None:
    """uint8 (count, C, H, W) of one image, in place: timm's RandAugment of each. What it uncovers gets the data's mean.

    operations  as `Crops.augment`
    """
    grey_or_colour = tuple(round(255 * value) for value in mean)
    transform = rand_augment_transform(
        operations, {"img_mean": grey_or_colour, "interpolation": Image.Resampling.BICUBIC}
    )
    with seeded(seed):
        for crop in crops:
            changed = torch.from_numpy(np.array(transform(Image.fromarray(crop.permute(1, 2, 0).numpy()))))
            crop.copy_(changed.permute(2, 0, 1))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, *size): bicubic, with antialias."""
    # The vector code reads pixels in a row, channels side by side; of anything else torch makes a slower copy itself.
    rows = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(rows, size, mode="bicubic", antialias=True)[0]


def shrink_of(groups: Iterable[tuple[Drawn, int]]) -> int:
    """How much smaller a JPEG may be decoded, 1, 2, 4 or 8, for views of (drawn, pixels)."""
    least = min(min(h, w) / pixels for drawn, pixels in groups for _, _, h, w in drawn.boxes)
    return next((by for by in (8, 4, 2) if least >= LEFT_TO_RESIZE * by), 1)


def cut_shrunk(image: Image.Image, size: tuple[int, int], drawn: Drawn, out: Tensor) -> None:
    """As `cut`, from an image of `size` (height, width) that was decoded smaller. Boxes then begin between pixels."""
    pixels = (out.shape[3], out.shape[2])
    down, right = image.height / size[0], image.width / size[1]
    for view, (top, left, h, w), flip in zip(out, drawn.boxes, drawn.flips, strict=True):
        box = (left * right, top * down, min((left + w) * right, image.width), min((top + h) * down, image.height))
        crop = torch.from_numpy(np.array(image.resize(pixels, Image.Resampling.BICUBIC, box)))
        crop = crop[None] if crop.ndim == 2 else crop.permute(2, 0, 1)
        view.copy_(crop.flip(-1) if flip else crop)


def plain_view(image: Tensor, pixels: int) -> Tensor:
    """What evaluation looks at: shorter side to pixels / 0.875, then the square in the middle (papers: 256, 224)."""
    short = min(image.shape[1:])
    # Of a very thin image only the middle is looked at: resizing all of 1 x 20000 would take gigabytes.
    image = middle(image, min(image.shape[1], 4 * short), min(image.shape[2], 4 * short))
    _, height, width = image.shape
    scale = round(pixels / 0.875) / short
    h, w = max(round(height * scale), pixels), max(round(width * scale), pixels)
    return middle(resize(image, (h, w)), pixels, pixels)


def middle(image: Tensor, height: int, width: int) -> Tensor:
    """(C, H, W) -> (C, height, width), cut from its middle."""
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


# ------------------------------------------------------------------------------------------------------- on the device


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 or float in 0..1, (B, C, H, W) -> float32 with mean 0 and deviation 1 for the data these numbers are of."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return (images - channels(mean, images)) / channels(std, images)


def channels(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """(C, 1, 1), as the images are, without a wait for their device."""
    return torch.tensor(numbers, dtype=like.dtype)[:, None, None].to(like.device, non_blocking=True)


def paint(crops: Tensor, colours: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Tensor]:
    """uint8 (B, count, C, H, W) on the device, colours (B, count, numbers) on the CPU -> count x (B, C, H, W).

    The colour numbers stay on the CPU: they choose which images an operation touches, and asking a device would wait.
    """
    num_images, count = crops.shape[:2]
    x = crops.transpose(0, 1).flatten(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    paint_colours(x.div_(255), colours.transpose(0, 1).flatten(0, 1))  # (count * B, C, H, W), view by view
    x.sub_(channels(mean, x)).div_(channels(std, x))
    return list(x.view(count, num_images, *x.shape[1:]).unbind(0))


def erase(x: Tensor, probability: float, seeds: list[int]) -> None:
    """float (B, C, H, W), normalised, in place: each image by its own seed."""
    eraser = RandomErasing(probability, **ERASE)
    for image, seed in zip(x, seeds, strict=True):
        with seeded(seed):
            eraser(image)


def paint_colours(x: Tensor, colours: Tensor) -> None:
    """float (N, C, H, W) in 0..1, in place: jittered, greyed, blurred and solarized as the rows of `colours` say."""
    coloured = x.shape[1] == 3  # others have no saturation, hue or grey
    orders = colours[:, ORDER].long()
    for stage in range(4):
        for operation in (BRIGHTNESS, CONTRAST, SATURATION, HUE) if coloured else (BRIGHTNESS, CONTRAST):
            chosen = torch.tensor([o != NO_JITTER and ORDERS[o][stage] == operation for o in orders.tolist()])
            on_chosen(x, chosen, JITTER[operation], colours[:, operation])
    if coloured:
        on_chosen(x, colours[:, GREY] > 0, lambda y, _: grey(y).expand_as(y), colours[:, GREY])
    on_chosen(x, colours[:, SIGMA] > 0, blur, colours[:, SIGMA])
    on_chosen(x, colours[:, SOLARIZE] > 0, solarize, colours[:, SOLARIZE])


def on_chosen(x: Tensor, chosen: Tensor, operation: Callable[[Tensor, Tensor], Tensor], numbers: Tensor) -> None:
    """Replace the chosen images by `operation(images, their numbers)`."""
    index = chosen.nonzero()[:, 0]
    if not len(index):
        return
    numbers = numbers[index].to(x.device, non_blocking=True)[:, None, None, None]
    index = index.to(x.device, non_blocking=True)
    x.index_copy_(0, index, operation(x[index], numbers).to(x.dtype))


def grey(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1, H, W)."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * channels(GREY_WEIGHTS, x)).sum(1, keepdim=True)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    return (mean + (x - mean) * factor).clamp(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    luma = grey(x)
    return (luma + (x - luma) * factor).clamp(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a share of the circle; value and saturation (of HSV) stay."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    r, g, b = x.unbind(1)
    safe = chroma[:, 0].clamp_min(1e-12)
    sixths = torch.where(
        r == value[:, 0], (g - b) / safe, torch.where(g == value[:, 0], 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    turned = (sixths[:, None] + 6 * turn) % 6
    # Each channel falls from the value by the chroma times a trapezium of the hue, a third of the circle apart.
    place = (channels((5.0, 3.0, 1.0), x) + turned) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def solarize(x: Tensor, _: Tensor) -> Tensor:
    return torch.where(x >= 128 / 255, 1 - x, x)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, each image with its own sigma (in pixels); the border repeats its last pixel."""
    num_images, channels, height, width = x.shape
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
    kernels = torch.exp(-0.5 * (taps / sigma[:, 0, 0]) ** 2)  # (N, taps)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    planes = F.pad(x, (BLUR_RADIUS,) * 4, mode="replicate").view(1, num_images * channels, height + 12, width + 12)
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=num_images * channels)
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=num_images * channels)
    return planes.view_as(x)


JITTER = {BRIGHTNESS: brightness, CONTRAST: contrast, SATURATION: saturation, HUE: hue}
