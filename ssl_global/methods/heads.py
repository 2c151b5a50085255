"""What stands on an encoder while it learns, and is thrown away after."""

import torch.nn.functional as F
from torch import Tensor, nn


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
        return F.linear(F.normalize(self.mlp(summary), dim=-1), F.normalize(self.prototypes.weight, dim=-1))
