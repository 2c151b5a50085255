"""Taking hidden patches out of images before a pyramid sees them: what is left is a smaller image, or small ones.

Letters, in this file only:

    B  images     C  channels     R, S  rows and columns of cells, 2 x 2 patches each     U  visible patches
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssl_global.encoders.encoder import visible_index


def push_together(images: Tensor, hidden: Tensor, side: int, num_hidden: int | None = None) -> tuple[Tensor, Tensor]:
    """The visible patch of each cell of 2 x 2, side by side: a quarter of the image (Li et al. 2022, section 3.2).

    images  (B, C, H, W), of which hidden's patches are `side` pixels wide and high; padded where a cell reaches out
    hidden  bool (B, rows, cols), one visible in each cell

    Returns (B, C, R * side, S * side), and int64 (B, R, S): which of the grid's patches each is, row by row. Raises
    ValueError for a cell with none or several (only when num_hidden is not given: a check costs a wait for the device).
    """
    rows, cols = hidden.shape[1:]
    odd = (0, cols % 2, 0, rows % 2)
    cells = rearrange(F.pad(hidden, odd, value=True), "b (r u) (s v) -> b r s (u v)", u=2, v=2)
    if num_hidden is None and not torch.all(cells.sum(-1) == 3):
        raise ValueError("uniform masking leaves one patch visible in each cell of 2 x 2")
    which = cells.to(torch.uint8).argmin(-1)  # (B, R, S)
    images = fit(images, (rows + rows % 2) * side, (cols + cols % 2) * side)
    patches = rearrange(images, "b c (r u p) (s v q) -> b r s (u v) (c p q)", u=2, v=2, p=side, q=side)
    taken = patches.gather(3, which[..., None, None].expand(-1, -1, -1, 1, patches.shape[-1]))
    compact = rearrange(taken, "b r s 1 (c p q) -> b c (r p) (s q)", p=side, q=side)
    row = 2 * torch.arange(which.shape[1], device=which.device)[:, None] + which // 2
    col = 2 * torch.arange(which.shape[2], device=which.device) + which % 2
    return compact, row * cols + col


def take_units(images: Tensor, hidden: Tensor, side: int, num_hidden: int | None = None) -> tuple[Tensor, Tensor]:
    """The visible patches, each an image by itself (Ryali et al. 2023, section 3).

    Returns (B, U, C, side, side), and int64 (B, U): which of the grid's patches each is, row by row. Raises ValueError
    as `visible_index` does.
    """
    index = visible_index(hidden, num_hidden)
    images = fit(images, hidden.shape[1] * side, hidden.shape[2] * side)
    patches = rearrange(images, "b c (r p) (s q) -> b (r s) c p q", p=side, q=side)
    return patches.gather(1, index[:, :, None, None, None].expand(-1, -1, *patches.shape[2:])), index


def fit(images: Tensor, height: int, width: int) -> Tensor:
    """Padded with zeros below and to the right."""
    return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
