"""Which tokens of a Swin attend to each other, on a whole map and on what is left of one when patches are hidden.

Liu et al. 2021, https://arxiv.org/abs/2103.14030: attention within windows, shifted by half a window in every second
block. Here the windows are cut from the map that is there: one that is larger than the map shrinks to it, padding is
behind a mask, the shift is taken after padding, so that what is rolled around the edge is masked where it lands.
(timm 1.0.31 pads after the shift, masks other places, and lets real tokens attend to padding.)

Hidden patches are left out in two layouts:

    Compact   one visible patch in every cell of 2 x 2, pushed together to a quarter of the image
              (Li et al. 2022, "Uniform Masking", https://arxiv.org/abs/2205.10063)
    Units     whole cells of the last stage's stride, any of them
              (Ryali et al. 2023, "Hiera", https://arxiv.org/abs/2306.00989)

In both a token knows its true place, in tokens of its stage, and the bias of a pair is looked up for the true distance.

Compact windows have half the side, in whole patches. For windows of a multiple of four patches (16 tokens in the first
stage of a Swin-T, with patches of 16 pixels) they are the windows of the whole image without the hidden tokens,
exactly; others are narrower than that. Units attend as in the whole image too, where a window is larger than a unit:
among all visible tokens at once, behind a mask, which takes the square of their number. Elsewhere each attends within
itself alone.

Not as in the papers: Li et al. let a small network make the biases; since the true distances of a compact window are
those of the full one, the table of the whole image serves as it is. A token that four patches were merged into lies in
their middle, theirs where the first did. Hiera attends to all visible tokens in its later stages.

Letters, in this file only:

    B  images     H, W  rows and columns of a map     C  channels     A  tokens of a window     N  windows of a map
"""

from dataclasses import dataclass, replace
from math import ceil

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

PADDING = -(2**30)  # the region of tokens that are not there: they attend to each other and to nothing else


@dataclass(frozen=True)
class Windows:
    """One way to cut a map into groups of tokens that attend to each other."""

    size: tuple[int, int]  # of a window, in tokens
    shift: tuple[int, int]  # down and to the right
    padded: tuple[int, int]  # the map, made a multiple of the size
    bias_rows: Tensor  # int64 (A, A), or (B * N, A, A) where it differs: each pair's row of the table of biases
    allowed: Tensor | None  # bool (N, A, A) or (B * N, A, A): whether query and key belong together; None: all do

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B * N, A, C)."""
        return cut(roll(pad(x, self.padded), self.shift), self.size)

    def join(self, windows: Tensor, like: Tensor) -> Tensor:
        """What `split` took apart: (B * N, A, C) -> (B, H, W, C), of the size of `like`."""
        (rows, cols), (h, w) = self.padded, self.size
        x = windows.view(-1, rows // h, cols // w, h, w, windows.shape[-1]).transpose(2, 3).flatten(1, 2).flatten(2, 3)
        return roll(x, (-self.shift[0], -self.shift[1]))[:, : like.shape[1], : like.shape[2]]


@dataclass(frozen=True)
class Groups:
    """Tokens that attend to each other without a map: those of each unit, or all that are visible."""

    alone: bool  # each unit by itself
    bias_rows: Tensor  # int64 (A, A) or (B, A, A)
    allowed: Tensor | None  # bool (A, A) or (B, A, A)

    def split(self, x: Tensor) -> Tensor:
        """(B, units, side, side, C) -> (B * units, A, C), or (B, A, C)."""
        return x.flatten(0, 1).flatten(1, 2) if self.alone else x.flatten(1, 3)

    def join(self, windows: Tensor, like: Tensor) -> Tensor:
        return windows.reshape(like.shape)


@dataclass(frozen=True)
class Whole:
    """Nothing is hidden: x is the map, (B, H, W, C)."""

    def merge(self, merging: nn.Module, x: Tensor) -> tuple[Tensor, "Whole"]:
        return merging(x), self

    def windows(self, x: Tensor, window: tuple[int, int], *, shifted: bool) -> Windows:
        grid = (x.shape[1], x.shape[2])
        size = (min(window[0], grid[0]), min(window[1], grid[1]))
        steps = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
        return map_windows(grid, size, shift_where_cut(grid, size, steps), window, x.device)


@dataclass(frozen=True)
class Compact:
    """x is the map of the visible patches, pushed together: (B, H, W, C)."""

    places: Tensor  # int64 (B, H, W, 2): each token's true row and column
    side: int  # tokens along a visible patch, 1 at least
    grid: tuple[int, int]  # rows and columns of the whole image's map

    def merge(self, merging: nn.Module, x: Tensor) -> tuple[Tensor, "Compact"]:
        """Four tokens to one, which lies where they lie on average, rounded down."""
        if isinstance(merging, nn.Identity):
            return x, self
        odd = (x.shape[2] % 2, x.shape[1] % 2)
        four = F.pad(self.places.permute(0, 3, 1, 2).float(), (0, odd[0], 0, odd[1]), mode="replicate")
        places = (F.avg_pool2d(four, 2) / 2).floor().long().permute(0, 2, 3, 1)
        half = (ceil(self.grid[0] / 2), ceil(self.grid[1] / 2))
        return merging(x), Compact(places, max(1, self.side // 2), half)

    def windows(self, x: Tensor, window: tuple[int, int], *, shifted: bool) -> Windows:
        """Windows of half the side, in whole patches; all there is where a window covers the whole image's map."""
        compact, side = (x.shape[1], x.shape[2]), self.side
        patches = [max(1, axis // 2 // side) for axis in window]
        covers = [axis >= whole for axis, whole in zip(window, self.grid, strict=True)]
        sides = [n if all_ else min(p * side, n) for n, all_, p in zip(compact, covers, patches, strict=True)]
        size, steps = (sides[0], sides[1]), (patches[0] // 2 * side, patches[1] // 2 * side) if shifted else (0, 0)
        cuts = map_windows(compact, size, shift_where_cut(compact, size, steps), window, x.device)
        places = cuts.split(self.places)  # (B * N, A, 2)
        distance, allowed = places[:, :, None] - places[:, None, :], cuts.allowed
        # Patches of a cell lie up to two sides apart; a window that holds less of them than that has near pairs only.
        if min(window) < 2 * side and (size != (side, side) or min(window) < side):
            near = within(distance, window)
            allowed = near if allowed is None else near & allowed.repeat(x.shape[0], 1, 1)
        return replace(cuts, bias_rows=bias_rows(distance, window), allowed=allowed)


@dataclass(frozen=True)
class Units:
    """x is the visible units, each a small map: (B, units, side, side, C)."""

    places: Tensor  # int64 (B, units, side, side, 2): each token's true row and column
    grid: tuple[int, int]  # rows and columns of the whole image's map

    def merge(self, merging: nn.Module, x: Tensor) -> tuple[Tensor, "Units"]:
        if isinstance(merging, nn.Identity):
            return x, self
        merged = merging(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        half = (ceil(self.grid[0] / 2), ceil(self.grid[1] / 2))
        return merged, Units(self.places[:, :, ::2, ::2] // 2, half)

    def windows(self, x: Tensor, window: tuple[int, int], *, shifted: bool) -> Groups:
        """The same window of the whole image, for windows larger than a unit; else each unit by itself, unshifted."""
        side = x.shape[2]
        if max(window) <= side:
            places = self.places[0, 0].flatten(0, 1)
            distance = places[:, None] - places[None, :]
            allowed = None if min(window) == side else within(distance, window)
            return Groups(True, bias_rows(distance, window), allowed)
        places = self.places.flatten(1, 3)  # (B, A, 2)
        regions = [
            region(places[..., axis], self.grid[axis], min(window[axis], self.grid[axis]),
                   window[axis] // 2 if shifted and window[axis] < self.grid[axis] else 0)
            for axis in (0, 1)
        ]  # fmt: skip
        together = [r[:, :, None] == r[:, None, :] for r in regions]
        distance = places[:, :, None] - places[:, None, :]
        return Groups(False, bias_rows(distance, window), together[0] & together[1])


Layout = Whole | Compact | Units


def map_windows(
    grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int], window: tuple[int, int], device: torch.device
) -> Windows:
    """The windows, of `size`, of a map in which nothing is hidden; `window` is that of the table of biases."""
    padded = tuple(ceil(n / s) * s for n, s in zip(grid, size, strict=True))
    inside = torch.stack(
        torch.meshgrid(*(torch.arange(s, device=device) for s in size), indexing="ij"), dim=-1
    ).flatten(0, 1)  # (A, 2)
    rows_of_pairs = bias_rows(inside[:, None] - inside[None, :], window)
    if padded == grid and shift == (0, 0):
        return Windows(size, shift, grid, rows_of_pairs, None)
    rows, cols = (
        region((torch.arange(p, device=device) + step) % p, n, s, step)
        for p, n, s, step in zip(padded, grid, size, shift, strict=True)
    )
    both = torch.stack(torch.broadcast_tensors(rows[:, None], cols[None, :]), dim=-1)
    both = torch.where((both == PADDING).any(-1, keepdim=True), PADDING, both)
    regions = cut(both[None], size)  # (N, A, 2)
    allowed = (regions[:, :, None] == regions[:, None, :]).all(-1)
    return Windows(size, shift, (padded[0], padded[1]), rows_of_pairs, allowed)


def bias_rows(distance: Tensor, window: tuple[int, int]) -> Tensor:
    """(..., 2) rows and columns from key to query -> (...) rows of the table of a window's biases."""
    h, w = window
    # Pairs that do not attend to each other may lie farther apart than the table knows.
    rows = distance[..., 0].clamp(1 - h, h - 1) + h - 1
    return rows * (2 * w - 1) + distance[..., 1].clamp(1 - w, w - 1) + w - 1


def within(distance: Tensor, window: tuple[int, int]) -> Tensor:
    """Whether a pair is near enough for both to be in a window."""
    return (distance[..., 0].abs() < window[0]) & (distance[..., 1].abs() < window[1])


def region(places: Tensor, length: int, size: int, shift: int) -> Tensor:
    """Along one axis, the window that each place falls into; what the shift leaves before the first is one too, -1."""
    return torch.where(places < length, torch.div(places - shift, size, rounding_mode="floor"), PADDING)


def shift_where_cut(grid: tuple[int, int], size: tuple[int, int], steps: tuple[int, int]) -> tuple[int, int]:
    """No shift along an axis that one window covers."""
    return (steps[0] if grid[0] > size[0] else 0, steps[1] if grid[1] > size[1] else 0)


def pad(x: Tensor, padded: tuple[int, int]) -> Tensor:
    below, right = padded[0] - x.shape[1], padded[1] - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def roll(x: Tensor, shift: tuple[int, int]) -> Tensor:
    return torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else x


def cut(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B * N, A, C), windows row by row."""
    h, w = size
    x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h))  # (B, rows, h, cols, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def attend(attention: WindowAttention, x: Tensor, windows: Windows | Groups) -> Tensor:
    """Attention within each group, (groups, A, C) -> the same, with biases for the true distances."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = biases(attention, windows, num_groups=x.shape[0])
    dropout = attention.attn_drop.p if attention.training else 0.0
    if not attention.fused_attn or (x.device.type == "cpu" and torch.is_grad_enabled()):
        # On CPUs torch's fused kernel has no gradient for a bias; what it does instead takes 1.4 times as long as this.
        logits = (q * attention.scale) @ k.transpose(-2, -1) + bias
        x = F.dropout(logits.softmax(-1), dropout) @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout)
    return attention.proj_drop(attention.proj(x.transpose(1, 2).flatten(2)))


def biases(attention: WindowAttention, windows: Windows | Groups, *, num_groups: int) -> Tensor:
    """What is added to each pair's logit, -inf where it does not belong together: (1 or groups, heads, A, A)."""
    rows = windows.bias_rows
    bias = attention.relative_position_bias_table.t().index_select(1, rows.flatten())
    bias = bias.view(-1, *rows.shape).movedim(0, -3)  # (heads, A, A) or (groups, heads, A, A)
    if windows.allowed is not None:
        allowed = windows.allowed.unsqueeze(-3)  # (A, A), (windows, A, A) or (groups, A, A), for every head
        if allowed.ndim == 4 and allowed.shape[0] != num_groups:
            allowed = allowed.repeat(num_groups // allowed.shape[0], 1, 1, 1)
        bias = bias.where(allowed, float("-inf"))
    return bias if bias.ndim == 4 else bias[None]
