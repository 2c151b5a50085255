"""Which patches an encoder does not see. `hidden` is bool and True means hidden, everywhere."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# The constants of splitmix64 (Steele, Lea and Flood 2014), as int64 holds them.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64
SECOND = 0x5851F42D4C957F2D  # ours: turns a seed into another, for a second draw


def num_hidden(num_patches: int, ratio: float) -> int:
    """How many of them are hidden: the visible ones are rounded down, as MAE does."""
    return num_patches - int(num_patches * (1 - ratio))


def random_hidden(seeds_B: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """Random patches of each image, equally many in each: bool (B, rows, cols), on the device of the seeds.

    seeds_B  int64 (B,); an image's hidden patches depend on its seed only, so neither the number of processes nor a
             resumed run changes them
    ratio    share of the patches to hide, between 0 and 1

    Slowly: give each patch a random number made from the seed and its place; hide those with the largest.
    """
    rows, cols = grid
    order_BN = noise(seeds_B, rows * cols).argsort(dim=1)
    hidden_BN = torch.ones_like(order_BN, dtype=torch.bool)
    num_visible = rows * cols - num_hidden(rows * cols, ratio)
    hidden_BN.scatter_(1, order_BN[:, :num_visible], False)
    return hidden_BN.view(-1, rows, cols)


def uniform_hidden(seeds_B: Tensor, grid: tuple[int, int]) -> Tensor:
    """All but one patch of every cell of 2 x 2: bool (B, rows, cols) (Li et al. 2022, "Uniform Masking", section 3.2).

    Cells that reach over the edge of an odd grid have their visible patch within it. An image's patches depend on its
    seed only. Slowly: for each cell draw one of its patches, each as likely; hide the others.
    """
    rows, cols = grid
    cells = ((rows + 1) // 2, (cols + 1) // 2)
    noise_BRS = noise(seeds_B, cells[0] * cells[1]).view(-1, *cells)
    row = 2 * torch.arange(cells[0], device=seeds_B.device)[:, None]
    col = 2 * torch.arange(cells[1], device=seeds_B.device)
    visible_BRS = (row + (noise_BRS & 1) * (row + 1 < rows)) * cols + col + (noise_BRS >> 1 & 1) * (col + 1 < cols)
    hidden_BN = torch.ones(len(seeds_B), rows * cols, dtype=torch.bool, device=seeds_B.device)
    return hidden_BN.scatter_(1, visible_BRS.flatten(1), False).view(-1, rows, cols)


def some_of(visible_BN: Tensor, seeds_B: Tensor, count: int) -> Tensor:
    """`count` random ones of those that are true in each row, which must be as many or more: bool (B, N)."""
    noise_BN = noise(seeds_B ^ SECOND, visible_BN.shape[1])
    order_BN = noise_BN.masked_fill(~visible_BN, torch.iinfo(torch.int64).max).argsort(dim=1)
    return torch.zeros_like(visible_BN).scatter_(1, order_BN[:, :count], True)


def noise(seeds_B: Tensor, count: int) -> Tensor:
    """Random int64 (B, count), a function of each image's seed."""
    places = torch.arange(1, count + 1, device=seeds_B.device)
    return mix(seeds_B[:, None] + places * GOLDEN)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: int64 in, int64 out, each bit of which depends on all bits of x."""
    x = (x ^ shift_right(x, 30)) * MIX_1
    x = (x ^ shift_right(x, 27)) * MIX_2
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# ----------------------------------------------------------------------------------------------- blocks, on the CPU

TRIES = 10  # places that a block is tried at before the rest is hidden patch by patch (BEiT's code)
SMALLEST_BLOCK = 4  # patches (BEiT, algorithm 1: 16 of 14 x 14; DINOv2's code: 4)
LONGEST_SIDE = 1 / 0.3  # times the other one (BEiT, algorithm 1)


def block_hidden(
    seeds: Sequence[int], grid: tuple[int, int], *, view: int, share: float, ratios: tuple[float, float]
) -> np.ndarray:
    """Blocks of patches of some images (Bao et al. 2021, BEiT, algorithm 1): bool (B, rows, cols).

    seeds   of the images; what is hidden of one depends on its seed and the view's number only
    share   of the images that have hidden patches at all, in the mean: each by itself
    ratios  smallest and largest share of such an image's patches, evenly drawn between; exactly so many are hidden
            (rounded down), at least one

    In numpy because there the number of hidden patches, which differs from image to image, is known without waiting
    for a device. Slowly: hide blocks of random size, shape and place until there is no room for a further one, then
    single patches, as DINOv3's code does.
    """
    hidden_BRS = np.zeros((len(seeds), *grid), dtype=bool)
    for hidden_RS, seed in zip(hidden_BRS, seeds, strict=True):
        random = np.random.Generator(np.random.Philox(key=[seed, view]))
        if random.random() < share:
            hide_blocks(hidden_RS, max(int(hidden_RS.size * random.uniform(*ratios)), 1), random)
    return hidden_BRS


def hide_blocks(hidden_RS: np.ndarray, count: int, random: np.random.Generator) -> None:
    """Exactly `count` patches of one image, in place, of which none is hidden yet."""
    while count and (found := a_block(hidden_RS, count, random)) is not None:
        count -= found.size - int(found.sum())
        found[:] = True
    hidden_RS.flat[random.choice(np.flatnonzero(~hidden_RS), size=count, replace=False)] = True


def a_block(hidden_RS: np.ndarray, most: int, random: np.random.Generator) -> np.ndarray | None:
    """The part of the grid where a block may lie that hides 1 to `most` patches more; None if none was met."""
    rows, cols = hidden_RS.shape
    for _ in range(TRIES):
        area = random.uniform(min(SMALLEST_BLOCK, most), most)
        shape = LONGEST_SIDE ** random.uniform(-1, 1)
        high, wide = max(round((area * shape) ** 0.5), 1), max(round((area / shape) ** 0.5), 1)
        if high > rows or wide > cols:
            continue
        top, left = random.integers(rows - high + 1), random.integers(cols - wide + 1)
        block = hidden_RS[top : top + high, left : left + wide]
        if 0 < block.size - block.sum() <= most:
            return block
    return None
