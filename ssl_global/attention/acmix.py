"""ACmix: attention within small windows and a convolution from the same three projections (Pan et al. 2022, "On the
Integration of Self-Attention and Convolution", https://arxiv.org/abs/2111.14556).

Attention: each place to the k x k around it, with a learned position of both. Convolution: query, key and value of all
heads are mixed into 3 x 3 maps, each of which is moved its way and summed; the moving is a convolution that begins as
exactly that. Both are weighed by a number. Written from the paper's formulas: its code has no licence.

Not as in the authors' code: beyond the edge the edge is repeated, where theirs mirrors, which small maps cannot.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.base import Mixed, Start

SIDE = 3  # of the convolution


class ACmix(Mixed):
    """kernel: side of the attention's window, odd.  heads: must divide the channels; None: of 32 channels."""

    def __init__(self, channels: int, *, kernel: int = 7, heads: int | None = None, start: Start = "identity") -> None:
        super().__init__(channels, start)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"acmix: kernel = {kernel}: an odd number; the paper's is 7")
        self.kernel, self.heads = kernel, self.number_of_heads(heads)
        width = channels // self.heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.position = nn.Conv2d(2, width, 1)
        self.maps = nn.Conv2d(3 * self.heads, SIDE**2, 1, bias=False)
        self.move = nn.Conv2d(SIDE**2 * width, channels, SIDE, padding=SIDE // 2, groups=width)
        self.rates = nn.Parameter(torch.full((2,), 0.5))
        moves = torch.eye(SIDE**2).view(SIDE**2, SIDE, SIDE)  # the n-th map is read at the n-th place around
        assert self.move.bias is not None
        with torch.no_grad():
            self.move.weight.copy_(moves.expand(channels, -1, -1, -1))
            self.move.bias.zero_()

    def mix(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        attended = self.attend(*qkv.unflatten(1, (3, self.heads, -1)).unbind(1))
        maps = self.maps(qkv.unflatten(1, (3 * self.heads, -1)).flatten(3))  # (B, 9, C / heads, H * W)
        moved = self.move(maps.transpose(1, 2).flatten(1, 2).unflatten(2, x.shape[2:]))
        return self.rates[0] * attended.flatten(1, 2) + self.rates[1] * moved

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, heads, c, H, W) each -> the same."""
        height, width = query.shape[3:]
        rows = torch.linspace(-1, 1, height, device=query.device, dtype=query.dtype)[:, None].expand(height, width)
        cols = torch.linspace(-1, 1, width, device=query.device, dtype=query.dtype)[None, :].expand(height, width)
        here = self.position(torch.stack([cols, rows])[None])  # (1, c, H, W)
        keys, values = (self.around(part.flatten(0, 1)).unflatten(0, query.shape[:2]) for part in (key, value))
        away = here[:, :, None] - self.around(here)  # (1, c, k * k, H, W)
        logits = (query.unsqueeze(3) * (keys + away)).sum(2) * query.shape[2] ** -0.5  # (B, heads, k * k, H, W)
        return (logits.softmax(2).to(values.dtype).unsqueeze(2) * values).sum(3)

    def around(self, x: Tensor) -> Tensor:
        """The k x k around each place: (n, c, H, W) -> (n, c, k * k, H, W)."""
        reach = self.kernel // 2
        padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
        return F.unfold(padded, self.kernel).unflatten(1, (x.shape[1], -1)).unflatten(3, x.shape[2:])
