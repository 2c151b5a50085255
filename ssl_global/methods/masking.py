"""Which patches an encoder does not see. `hidden` is bool and True means hidden, everywhere."""

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
