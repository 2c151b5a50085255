"""What every 2D attention module offers: (B, C, H, W) in, the same shape out, and nothing changed until it is trained.

Three ways to stand in a pretrained backbone without disturbing it, all exact (`torch.equal`):

    Mixed      x + gamma * (f(x) - x), gamma 0 in each channel: f is the published form, whole at gamma 1
    Residual   x + gamma * f(x), gamma 0 in each channel: for forms that are published as something added to x
    Gated      x * 2 sigmoid(z), z from a layer that begins at 0: the gates are 1

In the first two only gamma learns at first, f gets its gradient once gamma has moved; in the third the layer that
begins at 0 learns from the first step. start="paper" is the published form: f(x); x + f(x), or x + gamma f(x) with a
single gamma; x * sigmoid(z).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Start = Literal["identity", "paper"]


class Attention(nn.Module):
    """(B, C, H, W) -> (B, C, H, W), any H and W of at least 1."""

    def __init__(self, channels: int, start: Start) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels = {channels}: at least 1")
        if start not in ("identity", "paper"):
            raise ValueError(f"start = {start!r}: identity or paper")
        self.channels, self.start = channels, start
        self.last_layers: list[nn.Module] = []  # those that `begin` was called with

    def gate_parameters(self) -> list[nn.Parameter]:
        """What is 0 where the module is the identity: gammas, and the last layers of gates. They take no weight decay,
        and may learn faster than the rest; with start="paper" there may be none."""
        found = []
        for part in self.modules():
            if isinstance(part, Attention):
                gamma = getattr(part, "gamma", None)
                found += [gamma] if isinstance(gamma, nn.Parameter) else []
                layers = part.last_layers if part.start == "identity" else []
                found += [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
        return found

    def number_of_heads(self, heads: int | None) -> int:
        """The number asked for, or one that fits. Raises ValueError if it does not divide the channels."""
        heads = heads_for(self.channels) if heads is None else heads
        if heads < 1 or self.channels % heads:
            name = type(self).__module__.rpartition(".")[2]
            raise ValueError(f"{name}: heads = {heads}: does not divide {self.channels} channels")
        return heads


class Mixed(Attention):
    """A module whose published form is `mix`."""

    def __init__(self, channels: int, start: Start) -> None:
        super().__init__(channels, start)
        self.gamma = nn.Parameter(torch.zeros(channels)) if start == "identity" else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x)
        if self.gamma is None:
            return mixed
        return x + (self.gamma[:, None, None] * (mixed - x)).to(x.dtype)

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Residual(Attention):
    """A module that adds `branch` to x.

    paper_gamma   what the published form begins with, one number for all channels; None: it has none
    """

    def __init__(self, channels: int, start: Start, *, paper_gamma: float | None) -> None:
        super().__init__(channels, start)
        if start == "identity":
            self.gamma: nn.Parameter | None = nn.Parameter(torch.zeros(channels))
        else:
            self.gamma = None if paper_gamma is None else nn.Parameter(torch.tensor([paper_gamma]))

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.branch(x))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + (branch if self.gamma is None else self.gamma[:, None, None] * branch).to(x.dtype)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Gated(Attention):
    """A module that multiplies x by gates."""

    @property
    def gate_layer(self) -> type[nn.Module]:
        """Makes gates of what their last layer says: in 0..2, or 0..1 in the published form."""
        return TwiceSigmoid if self.start == "identity" else nn.Sigmoid

    def begin(self, last: nn.Module) -> None:
        """To be called with the gates' last layer."""
        self.last_layers.append(last)
        if self.start == "identity":
            for parameter in last.parameters(recurse=False):
                nn.init.zeros_(parameter)


class TwiceSigmoid(nn.Module):
    """1 at 0, in 0..2."""

    def forward(self, z: Tensor) -> Tensor:
        return 2 * z.sigmoid()


class BatchNorm(nn.BatchNorm2d):
    """torch's, but a single value of a channel, of which there is no deviation, is normalised as in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """(B, heads, N, K), (B, heads, M, K), (B, heads, M, V) -> (B, heads, N, V), without a map of N x M in memory.

    torch has fused kernels for queries and values of one width, whose channels lie side by side; for others it makes
    the map without a word. Zeros beside the narrower ones change nothing.

    mask   bool, True where a key may be seen; it must have four dimensions
    scale  of the products; None: 1 / sqrt(K)
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    width, widest = value.shape[-1], max(query.shape[-1], value.shape[-1])
    q, k, v = (
        part.contiguous() if part.shape[-1] == widest else F.pad(part, (0, widest - part.shape[-1]))
        for part in (query, key, value)
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :width]


def heads_for(channels: int) -> int:
    """The largest number of heads, of at least 32 channels each, that divides them; one for fewer."""
    return max(n for n in range(1, max(1, channels // 32) + 1) if channels % n == 0)
