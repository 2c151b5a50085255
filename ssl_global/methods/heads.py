"""What stands on an encoder while it learns, and is thrown away after."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_global.methods.chunks import chunks


class PrototypeHead(nn.Module):
    """DINO's head: three linear layers to a narrow bottleneck, then the cosine to each of K prototypes.

    Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 3 and appendix C. Both sides are normalised: a logit is
    a cosine, in [-1, 1]. The authors' weight-norm layer with its norms fixed at 1 is the same function of its weight.
    """

    def __init__(self, width: int, *, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, summary: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        prototypes: Tensor = UnitRows.apply(self.prototypes.weight)
        return F.linear(F.normalize(self.mlp(summary), dim=-1), prototypes)


class Projector(nn.Module):
    """SimCLR's head: one hidden layer (Chen et al. 2020, https://arxiv.org/abs/2002.05709, section 4.2)."""

    def __init__(self, width: int, *, hidden: int, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))

    def forward(self, summary: Tensor) -> Tensor:
        """(B, D) -> (B, out)."""
        projected: Tensor = self.mlp(summary)
        return projected


class UnitRows(torch.autograd.Function):
    """Each row w of a matrix at length 1: u = w / |w|, and dw = (du - u (u . du)) / |w|, some rows at a time.

    F.normalize says the same in ten walks over a matrix that, with 65 536 prototypes, no cache holds; this takes one
    forward and one back, in float32 whatever the matrix is.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        unit, lengths = torch.empty_like(weight), weight.new_empty(len(weight), 1, dtype=torch.float32)
        for some in chunks(weight):
            rows = weight[some].float()
            torch.linalg.vector_norm(rows, dim=1, keepdim=True, out=lengths[some]).clamp_(min=1e-12)
            unit[some] = rows / lengths[some]
        ctx.save_for_backward(unit, lengths)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_unit: Tensor) -> Tensor:
        unit, lengths = ctx.saved_tensors
        gradient = torch.empty_like(of_unit)
        for some in chunks(unit):
            u, du = unit[some].float(), of_unit[some].float()
            along = (u * du).sum(1, keepdim=True)
            gradient[some] = torch.addcmul(du, u, along, value=-1).div_(lengths[some])
        return gradient
