"""EMAX, corrected: efficient multi-scale attention whose number of groups depends on the image.

The source draws one number of groups for a whole batch, at random also in evaluation, by a step that has no gradient,
and runs for one number only. There is no paper. Here each image has its own mixture, sum over g of p_g(x) EMA_g(x),
with p a softmax over candidates from the image's averages: it is learnt, no image sees another, and evaluation repeats
itself.

Evidence: none that it does better than ema_msa alone; experimental.
"""

from torch import Tensor, nn

from ssl_global.attention.base import Mixed, Start
from ssl_global.attention.ema_msa import EfficientMultiScaleAttention


class EMAX(Mixed):
    """groups: the candidates, each of which must divide the channels; None: those of 4, 8, 16 and 32 that do, or 1."""

    def __init__(self, channels: int, *, groups: tuple[int, ...] | None = None, start: Start = "identity") -> None:
        super().__init__(channels, start)
        if groups is None:
            groups = tuple(n for n in (4, 8, 16, 32) if channels % n == 0) or (1,)
        if not groups or any(n < 1 or channels % n for n in groups):
            raise ValueError(f"emax: groups = {groups}: each must divide {channels} channels")
        self.choose = nn.Linear(channels, len(groups))
        self.candidates = nn.ModuleList(EfficientMultiScaleAttention(channels, groups=n, start="paper") for n in groups)

    def mix(self, x: Tensor) -> Tensor:
        shares = self.choose(x.mean((2, 3))).softmax(-1)  # (B, candidates)
        weighed = [
            share[:, None, None, None] * one(x) for share, one in zip(shares.unbind(1), self.candidates, strict=True)
        ]
        return sum(weighed[1:], weighed[0])
