"""Windows, shifts, padding and hidden patches are what a loop over pairs of tokens says they are."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import PatchMerging, WindowAttention

from ssl_global.attention.windows import Compact, Units, Whole, attend, biases
from ssl_global.encoders.global_swin import joined, true_places
from ssl_global.encoders.hiding import push_together, take_units
from ssl_global.methods.masking import random_hidden, uniform_hidden

WIDTH, HEADS = 8, 2


def attention_with(window):
    torch.manual_seed(sum(window))
    attention = WindowAttention(WIDTH, HEADS, window_size=window).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    return attention


def slow_attention(attention, x, places, grid, window, shift):
    """One image: x (n, C) at places (n, 2) of a map; a pair attends if one shifted window of the whole map has both.

    Returns (n, C), and which pairs attend (n, n).
    """
    q, k, v = (attention.qkv(x)).view(len(x), 3, HEADS, -1).unbind(1)
    size = [min(w, g) for w, g in zip(window, grid, strict=True)]
    out, pairs = torch.zeros(len(x), WIDTH, dtype=x.dtype), torch.zeros(len(x), len(x), dtype=torch.bool)

    def window_of(place):
        steps = [s if g > w else 0 for s, g, w in zip(shift, grid, window, strict=True)]
        return [(int(p) - s) // w for p, s, w in zip(place, steps, size, strict=True)]

    for i in range(len(x)):
        together = [j for j in range(len(x)) if window_of(places[i]) == window_of(places[j])]
        pairs[i, together] = True
        for h in range(HEADS):
            logits = []
            for j in together:
                down, right = (int(a - b) for a, b in zip(places[i], places[j], strict=True))
                row = (down + window[0] - 1) * (2 * window[1] - 1) + right + window[1] - 1
                bias = attention.relative_position_bias_table[row, h]
                logits.append((q[i, h] * k[j, h]).sum() * attention.scale + bias)
            weights = torch.stack(logits).softmax(0)
            out[i, h * (WIDTH // HEADS) : (h + 1) * (WIDTH // HEADS)] = sum(
                w * v[j, h] for w, j in zip(weights, together, strict=True)
            )
    return attention.proj(out), pairs


def near_attention(attention, x, places, window):
    """One group: x (n, C) at places (n, 2); a pair attends if the bias table knows its distance."""
    q, k, v = attention.qkv(x).view(len(x), 3, HEADS, -1).unbind(1)
    out = []
    for i in range(len(x)):
        away = places[i] - places
        near = (away.abs() < torch.tensor(window)).all(-1)
        rows = (away[near] + torch.tensor(window) - 1) @ torch.tensor([2 * window[1] - 1, 1])
        logits = (q[i] * k[near]).sum(-1) * attention.scale + attention.relative_position_bias_table[rows]
        out.append(attention.proj((logits.softmax(0)[..., None] * v[near]).sum(0).flatten()))
    return torch.stack(out)


def map_places(grid):
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).view(-1, 2)


sides = st.integers(1, 9)


@settings(max_examples=25, deadline=None)
@given(rows=sides, cols=sides, window=st.tuples(st.integers(1, 6), st.integers(1, 6)), shifted=st.booleans())
def test_windows_of_any_map(rows, cols, window, shifted):
    """Larger than the map, not dividing it, not square; with padding that nobody sees."""
    attention = attention_with(window)
    x = torch.randn(2, rows, cols, WIDTH).double()
    windows = Whole().windows(x, window, shifted=shifted)
    with torch.no_grad():
        got = windows.join(attend(attention, windows.split(x), windows), like=x)
        shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
        for b in range(2):
            want, _ = slow_attention(
                attention, x[b].flatten(0, 1), map_places((rows, cols)), (rows, cols), window, shift
            )
            torch.testing.assert_close(got[b].flatten(0, 1), want)


def test_both_ways_to_compute_it_agree_and_so_do_their_gradients():
    """By hand where a gradient is wanted on a CPU, by torch's fused attention elsewhere."""
    attention = attention_with((3, 4))
    x = torch.randn(2, 7, 6, WIDTH).double().requires_grad_()
    windows = Whole().windows(x, (3, 4), shifted=True)
    by_hand = attend(attention, windows.split(x), windows)
    with torch.no_grad():
        torch.testing.assert_close(by_hand, attend(attention, windows.split(x), windows))
    groups = windows.split(x)
    q, k, v = attention.qkv(groups).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    bias = biases(attention, windows, num_groups=len(groups))
    fused = attention.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
    of = [x, *attention.parameters()]
    gradients = [torch.autograd.grad(way.square().sum(), of, retain_graph=True) for way in (by_hand, fused)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@settings(max_examples=12, deadline=None)
@given(
    cells=st.tuples(st.integers(1, 4), st.integers(1, 4)), odd=st.tuples(st.booleans(), st.booleans()),
    window=st.sampled_from([2, 3, 4, 7, 8, 12, 16]), side=st.sampled_from([1, 2, 4]), shifted=st.booleans(),
)  # fmt: skip
def test_what_uniform_masking_leaves_attends_as_in_the_whole_image(cells, odd, window, side, shifted):
    """Where the windows fall on the cells' edges, or cover all, the hidden tokens' absence is all the difference."""
    grid = tuple(2 * n - (o and n > 1) for n, o in zip(cells, odd, strict=True))  # of patches
    hidden = uniform_hidden(torch.arange(2), grid)
    images = torch.randn(2, 1, grid[0] * side, grid[1] * side)
    _, seen = push_together(images, hidden, side)
    whole = (grid[0] * side, grid[1] * side)  # of tokens
    layout = Compact(joined(true_places(seen, grid, side)), side, whole)
    x = torch.randn(2, cells[0] * side, cells[1] * side, WIDTH).double()
    attention = attention_with((window, window))
    windows = layout.windows(x, (window, window), shifted=shifted)
    exact = window % ((4 if shifted else 2) * side) == 0 or window >= max(whole)
    with torch.no_grad():
        got = windows.join(attend(attention, windows.split(x), windows), like=x)
        for b in range(2):
            if exact:
                shift = (window // 2, window // 2) if shifted else (0, 0)
                want, _ = slow_attention(
                    attention, x[b].flatten(0, 1), layout.places[b].flatten(0, 1), whole, (window, window), shift
                )
                torch.testing.assert_close(got[b].flatten(0, 1), want)
    places = windows.split(layout.places)
    near = (places[:, :, None] - places[:, None, :]).abs().amax(-1) < window
    allowed = torch.ones_like(near[:1]) if windows.allowed is None else windows.allowed
    assert (near | ~allowed.repeat(len(near) // len(allowed), 1, 1)).all(), "a bias beyond the table"


@pytest.mark.parametrize("window", [(3, 3), (2, 4), (4, 32)])
def test_in_a_window_smaller_than_a_patch_only_near_tokens_attend(window):
    """Of a compact image whose visible patches are 4 tokens wide."""
    hidden = uniform_hidden(torch.arange(2), (4, 4))
    _, seen = push_together(torch.randn(2, 1, 16, 16), hidden, 4)
    layout = Compact(joined(true_places(seen, (4, 4), 4)), 4, (16, 16))
    x = torch.randn(2, 8, 8, WIDTH).double()
    windows = layout.windows(x, window, shifted=False)
    attention = attention_with(window)
    with torch.no_grad():
        got = windows.split(windows.join(attend(attention, windows.split(x), windows), like=x))
        places = windows.split(layout.places)
        for group, at, mixed in zip(windows.split(x), places, got, strict=True):
            torch.testing.assert_close(mixed, near_attention(attention, group, at, window))


def test_four_merged_patches_lie_in_their_middle():
    """In the last stage: the mean of their places, halved, rounded down; at an odd edge the last ones count twice."""
    hidden = uniform_hidden(torch.arange(3), (6, 5))
    _, seen = push_together(torch.randn(3, 1, 6, 5), hidden, 1)
    layout = Compact(joined(true_places(seen, (6, 5), 1)), 1, (6, 5))
    merging = PatchMerging(WIDTH)
    _, merged = layout.merge(merging, torch.randn(3, 3, 3, WIDTH))
    assert merged.places.shape == (3, 2, 2, 2)
    assert merged.grid == (3, 3)
    for b in range(3):
        for r in range(2):
            for c in range(2):
                four = [layout.places[b, min(2 * r + u, 2), min(2 * c + v, 2)] for u in (0, 1) for v in (0, 1)]
                assert merged.places[b, r, c].tolist() == (sum(four) // 8).tolist()


@settings(max_examples=12, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), window=st.sampled_from([2, 3, 4, 6]), shifted=st.booleans()
)
def test_units_attend_as_in_the_whole_image(grid, window, shifted):
    side = 2
    hidden = random_hidden(torch.arange(2), grid, 0.5)
    _, seen = take_units(torch.randn(2, 1, grid[0] * side, grid[1] * side), hidden, side)
    layout = Units(true_places(seen, grid, side), (grid[0] * side, grid[1] * side))
    x = torch.randn(2, seen.shape[1], side, side, WIDTH).double()
    if not seen.shape[1]:
        return
    attention = attention_with((window, window))
    windows = layout.windows(x, (window, window), shifted=shifted)
    shift = (window // 2, window // 2) if shifted and window > side else (0, 0)  # a unit by itself is not shifted
    with torch.no_grad():
        got = windows.join(attend(attention, windows.split(x), windows), like=x)
        for b in range(2):
            want, _ = slow_attention(
                attention, x[b].flatten(0, 2), layout.places[b].flatten(0, 2), layout.grid, (window, window), shift
            )
            torch.testing.assert_close(got[b].flatten(0, 2), want)


def test_in_a_window_smaller_than_a_unit_only_near_tokens_attend():
    """No shift, no neighbours: pairs of a unit whose distance the bias table knows."""
    side, window = 4, (3, 2)
    hidden = random_hidden(torch.arange(2), (3, 3), 0.5)
    _, seen = take_units(torch.randn(2, 1, 12, 12), hidden, side)
    layout = Units(true_places(seen, (3, 3), side), (12, 12))
    x = torch.randn(2, seen.shape[1], side, side, WIDTH).double()
    attention = attention_with(window)
    for shifted in (False, True):
        windows = layout.windows(x, window, shifted=shifted)
        with torch.no_grad():
            got = windows.join(attend(attention, windows.split(x), windows), like=x)
            for unit, mixed in zip(x.flatten(0, 1), got.flatten(0, 1), strict=True):
                want = near_attention(attention, unit.flatten(0, 1), map_places((side, side)), window)
                torch.testing.assert_close(mixed.flatten(0, 1), want)
