"""The data pipelines of MAE and DINO as published: PIL images, torchvision's transforms, floats on the CPU.

MAE   He et al. 2022, appendix A.1: random resized crop (0.2 to 1, bicubic), flip, normalise
DINO  Caron et al. 2021, appendix: two global and eight local crops, jitter, grey, blur, solarize, after BYOL
"""

import random

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

NORMALISE = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def mae(image: Image.Image) -> torch.Tensor:
    return MAE(image)


def dino(image: Image.Image) -> list[torch.Tensor]:
    return [FIRST(image), SECOND(image), *(LOCAL(image) for _ in range(8))]


class Blur:
    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Solarize:
    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.probability else image


def crop(pixels: int, area: tuple[float, float]) -> T.RandomResizedCrop:
    return T.RandomResizedCrop(pixels, scale=area, interpolation=InterpolationMode.BICUBIC)


def dino_view(pixels: int, area: tuple[float, float], blur: float, solarize: float) -> T.Compose:
    colours = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), T.RandomGrayscale(p=0.2)]
    return T.Compose(
        [crop(pixels, area), T.RandomHorizontalFlip(), *colours, Blur(blur), Solarize(solarize), NORMALISE]
    )


MAE = T.Compose([crop(224, (0.2, 1.0)), T.RandomHorizontalFlip(), NORMALISE])
FIRST = dino_view(224, (0.4, 1.0), 1.0, 0.0)
SECOND = dino_view(224, (0.4, 1.0), 0.1, 0.2)
LOCAL = dino_view(96, (0.05, 0.4), 0.5, 0.0)
