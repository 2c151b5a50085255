"""DANet's two attentions side by side (Fu et al. 2019, https://arxiv.org/abs/1809.02983).

x + gamma_p P(x) + gamma_c C(x): the plug-in form. In the authors' head each branch has convolutions around it and the
two are summed there; the sources add (x + P) + (x + C), which doubles x.
"""

from typing import Literal

from torch import Tensor

from ssl_global.attention.base import Attention, Start
from ssl_global.attention.channel import ChannelAttention
from ssl_global.attention.position import PositionAttention


class DualAttention(Attention):
    """reduction: of position's query and key.  energy: of channel's; see both."""

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 8,
        energy: Literal["official", "paper"] = "official",
        start: Start = "identity",
    ) -> None:
        super().__init__(channels, start)
        self.position = PositionAttention(channels, reduction=reduction, start=start)
        self.by_channel = ChannelAttention(channels, energy=energy, start=start)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_channel.add(self.position(x), self.by_channel.branch(x))
