"""Attention within windows, with relative positions, shifted or not (Liu et al. 2021, "Swin",
https://arxiv.org/abs/2103.14030).

timm's parameters, in windows that are cut for each map (windows.py): what the shift rolls around an edge and what is
padding are behind a mask, and a window that is larger than the map shrinks to it.
"""

from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start
from ssl_global.attention.windows import Whole, attend


class ShiftedWindow(Residual):
    """
    window    side of a window
    shifted   by half a window; Swin has it in every second block
    heads     must divide the channels; None: as many of 32 channels as go in
    """

    def __init__(
        self,
        channels: int,
        *,
        window: int = 7,
        shifted: bool = False,
        heads: int | None = None,
        start: Start = "identity",
    ) -> None:
        super().__init__(channels, start, paper_gamma=None)
        if window < 1:
            raise ValueError(f"shifted_window: window = {window}: at least 1; the paper's is 7")
        heads = self.number_of_heads(heads)
        self.window, self.shifted = window, shifted
        self.norm = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window_size=window)
        self.attention.fused_attn = True  # type: ignore[misc]

    def branch(self, x: Tensor) -> Tensor:
        places = self.norm(x.permute(0, 2, 3, 1))
        windows = Whole().windows(places, (self.window, self.window), shifted=self.shifted)
        added = windows.join(attend(self.attention, windows.split(places), windows), like=places)
        return added.permute(0, 3, 1, 2)
