"""Multi-scale large kernel attention: three decomposed kernels, each on a third of the channels and gated by a small
convolution (Wang et al. 2022, "Multi-scale Attention Network", https://arxiv.org/abs/2209.14145).

Kernels (near, far, steps) of (3, 5, 2), (5, 7, 3) and (7, 9, 4), as in the authors' code, between two 1 x 1
convolutions; the result is added to x, scaled by a number that begins at 0, published so: gamma here.

Not as in the paper: channels that three does not divide are cut as evenly as can be.
"""

import torch
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start

KERNELS = ((3, 5, 2), (5, 7, 3), (7, 9, 4))


class MultiScaleLKA(Residual):
    def __init__(self, channels: int, *, start: Start = "identity") -> None:
        super().__init__(channels, start, paper_gamma=0.0)
        self.sizes = [len(part) for part in torch.arange(channels).tensor_split(3)]
        parts = [(size, kernel) for size, kernel in zip(self.sizes, KERNELS, strict=True) if size]
        self.norm = nn.LayerNorm(channels)
        self.first = nn.Conv2d(channels, 2 * channels, 1)
        self.large = nn.ModuleList(large_kernel(size, *kernel) for size, kernel in parts)
        self.gates = nn.ModuleList(
            nn.Conv2d(size, size, near, padding=near // 2, groups=size) for size, (near, _, _) in parts
        )
        self.last = nn.Conv2d(channels, channels, 1)

    def branch(self, x: Tensor) -> Tensor:
        normal = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attended, passed = self.first(normal).chunk(2, dim=1)
        parts = attended.split([size for size in self.sizes if size], dim=1)
        weighed = [large(part) * gate(part) for large, gate, part in zip(self.large, self.gates, parts, strict=True)]
        mixed: Tensor = self.last(passed * torch.cat(weighed, dim=1))
        return mixed


def large_kernel(channels: int, near: int, far: int, steps: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, near, padding=near // 2, groups=channels),
        nn.Conv2d(channels, channels, far, padding=far // 2 * steps, dilation=steps, groups=channels),
        nn.Conv2d(channels, channels, 1),
    )
