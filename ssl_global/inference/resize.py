"""Images and maps to another size; sizes to multiples of a stride."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear, with the outer edges of both upon each other (align_corners=False).

    Of what becomes smaller no pixel is skipped (antialias). `x` itself if it has that size.
    """
    if x.shape[2:] == size:
        return x
    # antialias knows neither bfloat16 nor float16 on CPUs
    resized = F.interpolate(at_least_float32(x), size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized.to(x.dtype)


def multiple_of(stride: int, length: float) -> int:
    """The multiple nearest to `length`, of two the larger; at least one stride."""
    return max(1, int(length / stride + 0.5)) * stride


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def refuse_other_than_images(images: Tensor) -> None:
    if images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        given = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise ValueError(f"images = {given}: floating point (B, C, H, W) would be right, no size 0")
