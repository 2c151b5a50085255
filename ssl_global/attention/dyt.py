"""DyT: a squashing function in the place of a layer norm (Zhu et al. 2025, https://arxiv.org/abs/2503.10622).

weight * tanh(alpha x) + bias, with one alpha for all, 0.5 at first. It is a norm for training from scratch, no
attention: a pretrained model whose norms are replaced is another model, and has to learn again.
"""

import torch
from torch import Tensor, nn


class DyT(nn.Module):
    """(..., channels) -> the same."""

    def __init__(self, channels: int, *, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x) + self.bias


def replace_layer_norms(model: nn.Module, *, alpha: float = 0.5) -> int:
    """Puts a DyT in the place of each layer norm over one dimension, in place; returns how many there were."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm) and len(child.normalized_shape) == 1:
                norm = DyT(child.normalized_shape[0], alpha=alpha)
                setattr(parent, name, norm.to(next(child.parameters(), torch.empty(0)).device))
                count += 1
    return count
