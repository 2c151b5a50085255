"""Fixed sine-cosine positions of a grid, as MAE uses them for encoder and decoder (He et al. 2021, appendix A.1)."""

import torch
from torch import Tensor


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """(rows * cols, width), row by row, in [-1, 1]: the first half of the width tells the row, the second the column.

    Each half is [sin(p w_0) ... sin(p w_n), cos(p w_0) ... cos(p w_n)] with w_i = 10000^(-i / n) (Vaswani et al. 2017),
    computed in float64. Raises ValueError if 4 does not divide the width.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that 4 divides, got {width}")
    num_waves = width // 4
    waves = 10_000.0 ** (-torch.arange(num_waves, dtype=torch.float64) / num_waves)

    def one_axis(places: Tensor) -> Tensor:
        angles = places.double()[:, None] * waves
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, cols = grid
    by_row = one_axis(torch.arange(rows)).repeat_interleave(cols, dim=0)
    by_col = one_axis(torch.arange(cols)).repeat(rows, 1)
    return torch.cat([by_row, by_col], dim=1).float()
