"""Which patches an encoder does not see. `hidden` is bool and True means hidden, everywhere."""

import torch
from torch import Tensor

# The constants of splitmix64 (Steele, Lea and Flood 2014), as int64 holds them.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


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
    places_N = torch.arange(1, rows * cols + 1, device=seeds_B.device)
    noise_BN = mix(seeds_B[:, None] + places_N * GOLDEN)
    order_BN = noise_BN.argsort(dim=1)
    hidden_BN = torch.ones_like(order_BN, dtype=torch.bool)
    num_visible = rows * cols - num_hidden(rows * cols, ratio)
    hidden_BN.scatter_(1, order_BN[:, :num_visible], False)
    return hidden_BN.view(-1, rows, cols)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: int64 in, int64 out, each bit of which depends on all bits of x."""
    x = (x ^ shift_right(x, 30)) * MIX_1
    x = (x ^ shift_right(x, 27)) * MIX_2
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
