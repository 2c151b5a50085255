"""Gram anchoring: patches stay as alike to each other as an earlier teacher had them.

Siméoni et al. 2025, DINOv3, https://arxiv.org/abs/2508.10104, section 4.2. Features themselves may change, only their
cosines within an image are held, so the anchor is against the slow decay of dense features in long runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_loss(student_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """Mean squared difference, 0 to 4, of the cosines of all pairs of an image's patches.

    student_BND, teacher_BND   features, not normalised; their widths may differ, the places are the same

    Returns a float32 scalar; float64 for float64. Slowly:

        total = 0
        for each image b and patches i, j of it:
            total += (cosine(student[b, i], student[b, j]) - cosine(teacher[b, i], teacher[b, j]))^2
        return total / (B * N * N)
    """
    with torch.autocast(student_BND.device.type, enabled=False):
        student_BNN, teacher_BNN = cosines(student_BND), cosines(teacher_BND)
        return (student_BNN - teacher_BNN).square().mean()


def cosines(x_BND: Tensor) -> Tensor:
    x_BND = F.normalize(x_BND.to(torch.promote_types(x_BND.dtype, torch.float32)), dim=-1)
    return x_BND @ x_BND.transpose(1, 2)


def resized(x_BND: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Features of a grid, row by row, brought to another: (B, N, D) -> (B, M, D). Bicubic as DINOv3's, antialiased."""
    if grid == to:
        return x_BND
    maps = x_BND.float().transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size=to, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
