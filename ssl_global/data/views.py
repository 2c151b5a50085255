"""The views of an image: what is drawn, what is cut on the CPU, and what is painted on the device.

    draw   all random numbers of a sample, from its own stream: the boxes, and a row of numbers for each crop's colours
    cut    decoded image -> uint8 crops, resized with antialias and flipped (a worker does this)
    paint  uint8 crops -> float views: colour jitter, grey, blur, solarize, normalise (batched, where the model is)

Boxes are drawn as Inception and torchvision do; the colours follow DINO's main_dino.py: jitter with its four operations
in random order, then grey, blur, solarize. Resizing is torch's bicubic on uint8: few bytes differ from PIL's, by 1.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_global.recipe import Crops

# The columns of a crop's row of colour numbers.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE = range(8)
NUM_NUMBERS = 8
NO_JITTER = -1  # in the column ORDER
ORDERS = list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))

SIGMAS = (0.1, 2.0)  # of the blur, in pixels: DINO, utils.py
BLUR_RADIUS = 6  # pixels: three times the largest sigma
ASPECTS = (3 / 4, 4 / 3)  # width / height of a box: torchvision's RandomResizedCrop
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601, as PIL


@dataclass(frozen=True)
class Drawn:
    """All that chance says of the crops of one kind of one image."""

    boxes: list[tuple[int, int, int, int]]  # top, left, height, width, in pixels of the image
    flips: list[bool]
    colours: np.ndarray  # float32 (count, NUM_NUMBERS)


def draw(crops: Crops, size: tuple[int, int], random: np.random.Generator) -> Drawn:
    """Boxes and colours for an image of `size` (height, width)."""
    boxes = [draw_box(size, crops.area, random) for _ in range(crops.count)]
    flips = [bool(random.random() < crops.flip) for _ in range(crops.count)]
    colours = [draw_colours(crops, view, random) for view in range(crops.count)]
    return Drawn(boxes, flips, np.array(colours, dtype=np.float32).reshape(crops.count, NUM_NUMBERS))


def draw_box(
    size: tuple[int, int], area: tuple[float, float], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box with a share of the area drawn evenly, an aspect drawn evenly in its logarithm, and a place drawn evenly.

    Ten tries to fit it into the image; then the largest box in the middle with the nearest allowed aspect.
    """
    height, width = size
    for _ in range(10):
        pixels = height * width * random.uniform(*area)
        aspect = math.exp(random.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ASPECTS[0]), ASPECTS[1])
    h, w = max(min(height, round(width / aspect)), 1), max(min(width, round(height * aspect)), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def draw_colours(crops: Crops, view: int, random: np.random.Generator) -> list[float]:
    """One row of colour numbers. Each number is drawn, used or not: one setting does not shift the rest."""

    def factor(spread: float) -> float:
        return random.uniform(1 - spread, 1 + spread)

    numbers = [
        factor(crops.brightness),
        factor(crops.contrast),
        factor(crops.saturation),
        random.uniform(-crops.hue, crops.hue),
    ]
    order = int(random.integers(len(ORDERS)))
    chances = random.random(4)
    sigma = random.uniform(*SIGMAS)
    return [
        *numbers,
        order if chances[0] < crops.jitter else NO_JITTER,
        float(chances[1] < crops.grey),
        sigma if chances[2] < crops.blur[view % len(crops.blur)] else 0.0,
        float(chances[3] < crops.solarize[view % len(crops.solarize)]),
    ]


def cut(image: Tensor, drawn: Drawn, pixels: int) -> Tensor:
    """uint8 (C, H, W) -> uint8 (count, C, pixels, pixels)."""
    views = []
    for (top, left, h, w), flip in zip(drawn.boxes, drawn.flips, strict=True):
        view = resize(image[:, top : top + h, left : left + w], (pixels, pixels))
        views.append(view.flip(-1) if flip else view)
    return torch.stack(views)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, *size): bicubic, with antialias."""
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]


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


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 or float in 0..1, (B, C, H, W) -> float32 with mean 0 and deviation 1 for the data these numbers are of."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def paint(crops: Tensor, colours: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Tensor]:
    """uint8 (B, count, C, H, W) on the device, colours (B, count, numbers) on the CPU -> count x (B, C, H, W).

    The colour numbers stay on the CPU: they choose which images an operation touches, and asking a device would wait.
    """
    num_images, count = crops.shape[:2]
    x = crops.transpose(0, 1).flatten(0, 1).float() / 255  # (count * B, C, H, W), view by view
    x = paint_colours(x, colours.transpose(0, 1).flatten(0, 1))
    return list(normalise(x, mean, std).view(count, num_images, *x.shape[1:]).unbind(0))


def paint_colours(x: Tensor, colours: Tensor) -> Tensor:
    """float (N, C, H, W) in 0..1 -> the same, jittered, greyed, blurred and solarized as the rows of `colours` say."""
    orders = colours[:, ORDER].long()
    for stage in range(4):
        for operation in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
            chosen = torch.tensor([o != NO_JITTER and ORDERS[o][stage] == operation for o in orders.tolist()])
            if operation in (SATURATION, HUE) and x.shape[1] != 3:
                continue  # grey images have neither
            x = on_chosen(x, chosen, JITTER[operation], colours[:, operation])
    if x.shape[1] == 3:
        x = on_chosen(x, colours[:, GREY] > 0, lambda y, _: grey(y).expand_as(y), colours[:, GREY])
    x = on_chosen(x, colours[:, SIGMA] > 0, blur, colours[:, SIGMA])
    return on_chosen(
        x, colours[:, SOLARIZE] > 0, lambda y, _: torch.where(y >= 128 / 255, 1 - y, y), colours[:, SOLARIZE]
    )


def on_chosen(x: Tensor, chosen: Tensor, operation, numbers: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Apply `operation(images, their numbers)` to the chosen images only."""
    index = chosen.nonzero()[:, 0]
    if not len(index):
        return x
    numbers = numbers[index].to(x.device, non_blocking=True)[:, None, None, None]
    index = index.to(x.device, non_blocking=True)
    return x.index_copy(0, index, operation(x[index], numbers).to(x.dtype))


def grey(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(GREY_WEIGHTS)[:, None, None]).sum(1, keepdim=True)


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
    place = (x.new_tensor([5.0, 3.0, 1.0])[:, None, None] + turned) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


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
