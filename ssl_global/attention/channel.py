"""DANet's channel attention: each channel gathers from others (Fu et al. 2019, https://arxiv.org/abs/1809.02983).

The paper's text weighs by likeness, softmax(x x^T); the authors' code by unlikeness, softmax(max - x x^T), which they
say keeps the loss from diverging. On maps of many places the first is nearly the identity matrix. The code's is the
default. Its map is C x C; it has no parameters but gamma.
"""

from typing import Literal

from torch import Tensor

from ssl_global.attention.base import Residual, Start


class ChannelAttention(Residual):
    """energy: "official", as the authors' code, or "paper", as their text."""

    def __init__(
        self, channels: int, *, energy: Literal["official", "paper"] = "official", start: Start = "identity"
    ) -> None:
        super().__init__(channels, start, paper_gamma=0.0)
        if energy not in ("official", "paper"):
            raise ValueError(f"channel: energy = {energy!r}: official or paper")
        self.energy = energy

    def branch(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        likeness = flat @ flat.transpose(1, 2)  # (B, C, C)
        if self.energy == "official":
            likeness = likeness.amax(-1, keepdim=True) - likeness
        return (likeness.softmax(-1).to(flat.dtype) @ flat).view_as(x)
