"""Every 2D attention module as its paper's formula in the plain form: what proves the modules, and what they are timed
against.

    form("non_local")(module, x)      # what module(x) should be

A form has the module's name, takes weights and options off the module, and calls of it only layers that are torch's own
(linear, convolution, norm); the rest is written out. Attention is the map of all places by all, behind a mask: one
function, `masked_attention`, stands behind global, local, shifted, cross-shaped, criss-cross and all other windows.
Pooling is means of slices, sampling is four neighbours and their weights.

One rule for both starts: gates and gammas are read off the module as they are, so a form says what the module says as
it begins, as it is published, and wherever training has moved it; in evaluation, where nothing is dropped.

Any B, C, H and W. The first line of a form's docstring is what docs/attention.md calls it.

Letters, in this file only:

    B  images     C  channels     H, W  rows and columns     N  places, H * W     M  places that are asked
    K  channels of query and key     c  channels of a head or a group     G  global tokens
"""

from collections.abc import Callable, Iterable
from itertools import product
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Callable[[Any, Tensor], Tensor]


def form(name: str) -> Form:
    """Of the module of that name."""
    found: Form = globals()[name]
    return found


# ------------------------------------------------------------------------------------------------------- what is shared


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """(..., N, K), (..., M, K), (..., M, C) -> (..., N, C), by the whole map of N x M.

    mask   bool (N, M), True where the second may be seen by the first; None: everywhere
    bias   added to the products before the mask
    """
    logits = (query * scale) @ key.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(-1) @ value


def flat(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, N, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def by_heads(tokens: Tensor, heads: int, parts: int = 1) -> tuple[Tensor, ...]:
    """(B, N, parts * heads * c) -> (B, heads, N, c) of each part."""
    return tokens.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def together(mixed: Tensor) -> Tensor:
    """(B, heads, N, c) -> (B, N, heads * c)."""
    return mixed.transpose(1, 2).flatten(2)


def places(x: Tensor) -> Tensor:
    """(N, 2): row and column of each place."""
    rows, cols = (torch.arange(size, device=x.device) for size in x.shape[2:])
    return torch.cartesian_prod(rows, cols)


def alike(of_places: Tensor) -> Tensor:
    """(N, n) -> (N, N): for which pairs all n numbers are the same."""
    return (of_places[:, None] == of_places[None]).all(-1)


def added(module: Any, x: Tensor, branch: Tensor) -> Tensor:
    return x + branch if module.gamma is None else x + module.gamma[:, None, None] * branch


def instead(module: Any, x: Tensor, mixed: Tensor) -> Tensor:
    return mixed if module.gamma is None else x + module.gamma[:, None, None] * (mixed - x)


def gates(module: Any, z: Tensor) -> Tensor:
    return (2 if module.start == "identity" else 1) * z.sigmoid()


def means(x: Tensor, rows: list[slice], cols: list[slice]) -> Tensor:
    """Of the map's regions: (B, C, len(rows), len(cols))."""
    return torch.stack([torch.stack([x[:, :, r, c].mean((2, 3)) for c in cols], dim=-1) for r in rows], dim=-2)


def rectified(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """A convolution without a bias, a norm and a ReLU; edges are filled with zeros so that the map keeps its size."""
    conv, norm, *_ = layers
    assert isinstance(conv, nn.Conv2d)
    normal: Tensor = norm(convolved(x, conv))
    return F.relu(normal)


def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The map keeps its size; a kernel for each channel where the layer has so many groups."""
    steps, kernel = conv.dilation[0], conv.weight.shape[-1]
    padding = steps * (kernel // 2)
    return F.conv2d(x, conv.weight, conv.bias, padding=padding, dilation=steps, groups=conv.groups)


# -------------------------------------------------------------------------------------------- attention behind one mask


def global_attention(module: Any, x: Tensor) -> Tensor:
    """the N x N map of each head"""
    heads = module.attention.num_heads
    query, key, value = by_heads(module.attention.qkv(module.norm(flat(x))), heads, parts=3)
    mixed = together(masked_attention(query, key, value, scale=query.shape[-1] ** -0.5))
    return added(module, x, as_map(module.attention.proj(mixed), x))


def position(module: Any, x: Tensor) -> Tensor:
    """the N x N map, without a scale"""
    query, key, value = (flat(part(x)) for part in (module.query, module.key, module.value))
    return added(module, x, as_map(masked_attention(query, key, value, scale=1.0), x))


def criss_cross(module: Any, x: Tensor) -> Tensor:
    """the N x N map behind a mask of row or column, as often as it recurs"""
    at = places(x)
    mask = alike(at[:, :1]) | alike(at[:, 1:])
    for _ in range(module.recurrence):
        query, key, value = (flat(part(x)) for part in (module.query, module.key, module.value))
        x = added(module, x, as_map(masked_attention(query, key, value, scale=1.0, mask=mask), x))
    return x


def neighbourhood(module: Any, x: Tensor) -> Tensor:
    """the N x N map behind a mask of the k nearest rows and columns"""

    def near(length: int) -> Tensor:
        index = torch.arange(length, device=x.device)
        nearest = (index[:, None] - index[None]).abs().argsort(dim=1, stable=True)[:, : module.kernel]
        return torch.zeros(length, length, dtype=torch.bool, device=x.device).scatter(1, nearest, True)

    rows, cols = (near(length) for length in x.shape[2:])
    mask = (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2).flatten(0, 1)
    query, key, value = by_heads(module.qkv(module.norm(flat(x))), module.heads, parts=3)
    mixed = masked_attention(query, key, value, scale=query.shape[-1] ** -0.5, mask=mask)
    return added(module, x, as_map(module.out(together(mixed)), x))


def shifted_window(module: Any, x: Tensor) -> Tensor:
    """the N x N map with a bias for each distance, behind a mask of windows"""
    at, window, parts = places(x), module.window, []
    for axis, length in enumerate(x.shape[2:]):
        size = min(window, length)
        shift = window // 2 if module.shifted and size < length else 0
        parts.append((at[:, axis] - shift).div(size, rounding_mode="floor"))
    mask = alike(torch.stack(parts, dim=-1))
    rows, cols = ((at[:, None, axis] - at[None, :, axis]).clamp(1 - window, window - 1) + window - 1 for axis in (0, 1))
    attention = module.attention
    bias = attention.relative_position_bias_table[rows * (2 * window - 1) + cols].permute(2, 0, 1)
    query, key, value = by_heads(attention.qkv(module.norm(flat(x))), attention.num_heads, parts=3)
    mixed = masked_attention(query, key, value, scale=query.shape[-1] ** -0.5, mask=mask, bias=bias)
    return added(module, x, as_map(attention.proj(together(mixed)), x))


def cross_shaped_window(module: Any, x: Tensor) -> Tensor:
    """two N x N maps, half of the heads each, behind masks of bands"""
    query, key, value = module.qkv(module.norm(flat(x))).chunk(3, dim=-1)
    halves = []
    for axis, parts in enumerate(zip(*(part.chunk(2, dim=-1) for part in (query, key, value)), strict=True)):
        mask = alike(places(x)[:, [axis]] // module.stripe)
        q, k, v = (by_heads(part, module.heads_each)[0] for part in parts)
        mixed = together(masked_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask))
        bands = as_map(parts[2], x).split(module.stripe, dim=2 + axis)
        # The convolution does not look over a band's edge.
        of_positions = torch.cat([convolved(band, module.positions[axis]) for band in bands], dim=2 + axis)
        halves.append(mixed + flat(of_positions))
    return added(module, x, as_map(module.out(torch.cat(halves, dim=-1)), x))


def local(module: Any, x: Tensor) -> Tensor:
    """the mean of N x N maps behind masks of windows"""
    return added(module, x, mean_of_windows(module, x))


def mean_of_windows(module: Any, x: Tensor) -> Tensor:
    """One map serves all windows that do not overlap: those `apart` strides from one another along each axis."""
    window, stride = module.window, module.stride
    apart = ceil(window / stride)
    at, sizes = places(x), torch.tensor(x.shape[2:], device=x.device)
    query, key, value = by_heads(module.qkv(module.norm(flat(x))), module.heads, parts=3)
    total, count = torch.zeros_like(flat(x)), x.new_zeros(at.shape[0], 1)
    for first in product(range(apart), repeat=2):
        since = at - torch.tensor(first, device=x.device) * stride
        number = since.div(apart * stride, rounding_mode="floor") * apart + torch.tensor(first, device=x.device)
        # The last window along an axis is the first that reaches its end.
        exists = (number == 0) | ((number - 1) * stride + window < sizes)
        inside = ((since >= 0) & (since % (apart * stride) < window) & exists).all(-1, keepdim=True)
        mask = alike(number.where(inside, -1))  # what is in no window is thrown away below
        mixed = masked_attention(query, key, value, scale=query.shape[-1] ** -0.5, mask=mask)
        total = total + inside * module.out(together(mixed))
        count = count + inside
    return as_map(total / count, x)


def multipole(module: Any, x: Tensor) -> Tensor:
    """`local` on each map of a pyramid, the coarser ones enlarged and added"""

    def from_here(level: Tensor) -> tuple[Tensor, int]:
        """What this level and the coarser ones add, and how many they are."""
        height, width = level.shape[2:]
        if max(height, width) <= module.local.window:
            return mean_of_windows(module.local, level), 1
        even = F.pad(level, (0, width % 2, 0, height % 2), mode="replicate")
        if isinstance(module.down, nn.Conv2d):
            half = F.conv2d(even, module.down.weight, module.down.bias, stride=2)
        else:
            half = torch.stack([even[:, :, i::2, j::2] for i, j in product((0, 1), repeat=2)]).mean(0)
        coarse, below = from_here(half)
        if isinstance(module.up, nn.ConvTranspose2d):
            coarse = F.conv_transpose2d(coarse, module.up.weight, module.up.bias, stride=2)
        else:
            coarse = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        share = 1 / below if module.weights == "code" else 1
        return mean_of_windows(module.local, level) + share * coarse[:, :, :height, :width], below + 1

    return added(module, x, from_here(x)[0])


def spatial_reduction(module: Any, x: Tensor) -> Tensor:
    """the N x M map of each head, M the squares"""
    normal = module.norm_places(flat(x))
    asked, side = normal, module.reduction
    if side > 1:
        padded = F.pad(as_map(normal, x), (0, -x.shape[3] % side, 0, -x.shape[2] % side))
        asked = module.norm(flat(F.conv2d(padded, module.sr.weight, module.sr.bias, stride=side)))
    (query,) = by_heads(module.q(normal), module.heads)
    key, value = by_heads(module.kv(asked), module.heads, parts=2)
    mixed = masked_attention(query, key, value, scale=query.shape[-1] ** -0.5)
    return added(module, x, as_map(module.proj(together(mixed)), x))


def deformable(module: Any, x: Tensor) -> Tensor:
    """the N x M map of each head, M places read off between their four neighbours"""
    normal = as_map(module.norm(flat(x)), x)
    query = module.query(normal)
    read = []
    for part, asking in zip(*(t.chunk(module.groups, dim=1) for t in (normal, query)), strict=True):
        conv = module.look
        looked = F.conv2d(asking, conv.weight, conv.bias, conv.stride, conv.weight.shape[-1] // 2, groups=conv.groups)
        rows, cols = looked.shape[2:]
        offsets = module.reach * module.offset(F.gelu(module.look_norm(flat(looked)))).tanh()
        cells = places(looked) + 0.5 + offsets  # (B, rows * cols, 2), in cells of the grid
        read.append(between(part, cells[..., 0] * x.shape[2] / rows - 0.5, cells[..., 1] * x.shape[3] / cols - 0.5))
    weight, bias = module.key_value.weight[:, :, 0, 0], module.key_value.bias
    key, value = by_heads(F.linear(torch.cat(read, dim=-1), weight, bias), module.heads, parts=2)
    (query,) = by_heads(flat(query), module.heads)
    mixed = together(masked_attention(query, key, value, scale=query.shape[-1] ** -0.5))
    return added(module, x, module.out(as_map(mixed, x)))


def between(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """(B, C, H, W) at (B, M) rows and columns, bilinear, beyond the edge the edge: (B, M, C)."""
    height, width = x.shape[2:]
    row, col = row.clamp(0, height - 1), col.clamp(0, width - 1)
    total = x.new_zeros(())
    for down, right in product((0, 1), repeat=2):
        i, j = row.floor() + down, col.floor() + right
        share = (1 - (row - i).abs()) * (1 - (col - j).abs())  # 0 for the one that clamp moves
        index = (i.clamp(max=height - 1) * width + j.clamp(max=width - 1)).long()
        total = total + share[..., None] * flat(x).gather(1, index[..., None].expand(-1, -1, x.shape[1]))
    return total


def global_tokens(module: Any, x: Tensor) -> Tensor:
    """two maps of G x N: the tokens attend to the places, then the places to the tokens"""
    mixer = module.mixer
    scale = (mixer.bottleneck // mixer.heads) ** -0.5
    tokens = module.tokens.expand(x.shape[0], -1, -1)
    (reading,) = by_heads(mixer.read_query(mixer.norm_tokens(tokens)), mixer.heads)
    key, value, writing = by_heads(mixer.of_patches(mixer.norm_patches(flat(x))), mixer.heads, parts=3)
    tokens = tokens + mixer.read_out(together(masked_attention(reading, key, value, scale=scale)))
    key, value = by_heads(mixer.of_tokens(mixer.norm_read(tokens)), mixer.heads, parts=2)
    written = mixer.write_out(together(masked_attention(writing, key, value, scale=scale)))
    return x + as_map(mixer.gate * written, x)


def non_local(module: Any, x: Tensor) -> Tensor:
    """the N x M map, of each of the four modes"""
    asked = F.max_pool2d(x, 2, ceil_mode=True) if module.sub_sample else x
    value = flat(module.value(asked))
    query, key = (
        (flat(x), flat(asked)) if module.mode == "gaussian" else (flat(module.theta(x)), flat(module.phi(asked)))
    )
    if module.mode in ("embedded_gaussian", "gaussian"):
        gathered = masked_attention(query, key, value, scale=query.shape[-1] ** -0.5)
    elif module.mode == "dot":
        gathered = (query @ key.transpose(1, 2)) / key.shape[1] @ value
    else:
        pairs = torch.cat(torch.broadcast_tensors(query[:, :, None], key[:, None]), dim=-1)  # (B, N, M, 2 K)
        gathered = F.relu(module.weigh(pairs))[..., 0] / key.shape[1] @ value
    return added(module, x, module.norm(module.out(as_map(gathered, x))))


def channel(module: Any, x: Tensor) -> Tensor:
    """the C x C map"""
    rows = x.flatten(2)
    likeness = torch.einsum("bin,bjn->bij", rows, rows)
    if module.energy == "official":
        likeness = likeness.max(dim=-1, keepdim=True).values - likeness
    return added(module, x, torch.einsum("bij,bjn->bin", likeness.softmax(-1), rows).unflatten(2, x.shape[2:]))


def dual(module: Any, x: Tensor) -> Tensor:
    """x, what `position` adds to it, and what `channel` adds to it"""
    return position(module.position, x) + (channel(module.by_channel, x) - x)


def acmix(module: Any, x: Tensor) -> Tensor:
    """a loop over the k x k around each place, and one over the nine shifts"""
    height, width = x.shape[2:]
    projected = module.qkv(x).unflatten(1, (3 * module.heads, -1))  # (B, 3 * heads, c, H, W)
    query, key, value = projected.chunk(3, dim=1)
    rows, cols = (torch.linspace(-1, 1, size, dtype=x.dtype, device=x.device) for size in (height, width))
    here = module.position(torch.stack(torch.meshgrid(rows, cols, indexing="ij")).flip(0)[None])  # (1, c, H, W)
    reach = range(-(module.kernel // 2), module.kernel // 2 + 1)

    def beside(part: Tensor, down: int, right: int) -> Tensor:
        """So far from each place, or at the edge."""
        below, aside = (torch.arange(size, device=x.device) + by for size, by in ((height, down), (width, right)))
        return part[..., below.clamp(0, height - 1)[:, None], aside.clamp(0, width - 1)]

    around = list(product(reach, repeat=2))
    logits = [(query * (beside(key, *by) + here - beside(here, *by))).sum(2) for by in around]
    weights = (torch.stack(logits) * query.shape[2] ** -0.5).softmax(0)  # (k * k, B, heads, H, W)
    attended = torch.zeros_like(query)
    for share, by in zip(weights, around, strict=True):
        attended = attended + share.unsqueeze(2) * beside(value, *by)

    maps = F.pad(torch.einsum("nh,bhcyx->bncyx", module.maps.weight[:, :, 0, 0], projected), (1, 1, 1, 1))
    moves = module.move.weight.unflatten(0, (-1, module.heads))  # (c, heads, 9, 3, 3)
    moved = module.move.bias[:, None, None]
    for i, j in product(range(3), repeat=2):
        shifted = torch.einsum("chn,bncyx->bchyx", moves[..., i, j], maps[..., i : i + height, j : j + width])
        moved = moved + shifted.flatten(1, 2)
    return instead(module, x, module.rates[0] * attended.flatten(1, 2) + module.rates[1] * moved)


# ---------------------------------------------------------------------------------------------------------------- gates


def se(module: Any, x: Tensor) -> Tensor:
    """means of the map, two linear layers, gates of channels"""
    hidden = F.relu(module.se.fc1(x.mean((2, 3), keepdim=True)))
    return x * gates(module, module.se.fc2(hidden))


def eca(module: Any, x: Tensor) -> Tensor:
    """a convolution over the channels' means, gates of channels"""
    weight = module.eca.conv.weight
    seen = F.conv1d(x.mean((2, 3))[:, None], weight, padding=weight.shape[-1] // 2)[:, 0]
    return x * gates(module, seen[:, :, None, None])


def gca(module: Any, x: Tensor) -> Tensor:
    """what one softmax over the places gathers, two linear layers, gates of channels"""
    weights = module.context.conv_attn(x).flatten(2).softmax(-1)
    gathered = (x.flatten(2) * weights).sum(-1)[:, :, None, None]
    mlp = module.context.mlp_scale
    hidden = mlp.fc1(gathered).flatten(1)
    hidden = F.relu(F.layer_norm(hidden, hidden.shape[1:], mlp.norm.weight, mlp.norm.bias, mlp.norm.eps))
    return x * gates(module, mlp.fc2(hidden[:, :, None, None]))


def cbam(module: Any, x: Tensor) -> Tensor:
    """means and maxima of channels, then of places, gates of each"""
    by_channel, conv = module.cbam.channel, module.cbam.spatial.conv
    pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
    mean, most = (by_channel.fc2(F.relu(by_channel.fc1(part))) for part in pooled)
    x = x * gates(module, mean + most)
    return x * gates(module, conv.bn(convolved(torch.stack([x.mean(1), x.amax(1)], dim=1), conv.conv)))


def coord(module: Any, x: Tensor) -> Tensor:
    """means of rows and of columns, gates of each"""
    parts = module.coord
    of_rows, of_cols = (F.hardswish(parts.bn1(parts.conv1(x.mean(axis, keepdim=True)))) for axis in (3, 2))
    return x * gates(module, parts.conv_h(of_rows)) * gates(module, parts.conv_w(of_cols))


def gather_excite(module: Any, x: Tensor) -> Tensor:
    """means of slices, two linear layers, gates of the nearest region"""
    extent = module.extent or 2 * max(x.shape[2:])  # the first region then holds all
    regions = ([slice(max(0, i - extent + 1), i + extent) for i in range(0, size, extent)] for size in x.shape[2:])
    excited = module.excite[2](F.relu(module.excite[0](means(x, *regions))))
    rows, cols = (
        torch.arange(size, device=x.device) * count // size
        for size, count in zip(x.shape[2:], excited.shape[2:], strict=True)
    )
    return x * gates(module, excited[:, :, rows][:, :, :, cols])


def ema_msa(module: Any, x: Tensor) -> Tensor:
    """group by group: two branches, each summed up with the other's softmax"""
    parts = []
    for part in x.chunk(module.groups, dim=1):
        by_row, by_col = (module.along(part.mean(axis, keepdim=True)).sigmoid() for axis in (3, 2))
        gated = part * by_row * by_col
        mean, variance = gated.mean((2, 3), keepdim=True), gated.var((2, 3), keepdim=True, correction=0)
        weight, bias = module.norm.weight[:, None, None], module.norm.bias[:, None, None]
        first = (gated - mean) / (variance + module.norm.eps).sqrt() * weight + bias
        second = module.around(part)
        weights = [one.mean((2, 3), keepdim=True).softmax(1) for one in (second, first)]
        total = (weights[0] * first + weights[1] * second).sum(1, keepdim=True)
        parts.append(part * total.sigmoid())
    return instead(module, x, torch.cat(parts, dim=1))


def emax(module: Any, x: Tensor) -> Tensor:
    """each image's own mixture of `ema_msa` with so many groups"""
    shares = module.choose(x.mean((2, 3))).softmax(-1)
    candidates = [ema_msa(candidate, x) for candidate in module.candidates]
    return instead(module, x, torch.einsum("bn,nbcyx->bcyx", shares, torch.stack(candidates)))


# --------------------------------------------------------------------------------------------------------- convolutions


def lka(module: Any, x: Tensor) -> Tensor:
    """x times three convolutions"""
    seen = convolved(convolved(x, module.near), module.far)
    return instead(module, x, x * convolved(seen, module.point))


def mlka(module: Any, x: Tensor) -> Tensor:
    """three thirds, each three convolutions times a fourth"""
    projected = convolved(as_map(module.norm(flat(x)), x), module.first)
    attended, passed = projected.chunk(2, dim=1)
    thirds = [third for third in attended.tensor_split(3, dim=1) if third.shape[1]]
    weighed = []
    for third, (near, far, point), gate in zip(thirds, module.large, module.gates, strict=True):
        large = convolved(convolved(convolved(third, near), far), point)
        weighed.append(large * convolved(third, gate))
    return added(module, x, convolved(passed * torch.cat(weighed, dim=1), module.last))


def large_kernel(module: Any, x: Tensor) -> Tensor:
    """a convolution and a norm for each of the two kernels, added up"""
    large, small = module.conv.large_conv, module.conv.small_conv
    return instead(module, x, large.bn(convolved(x, large.conv)) + small.bn(convolved(x, small.conv)))


def dilated(module: Any, x: Tensor) -> Tensor:
    """three convolutions, a norm and a ReLU after each"""
    seen = x
    for layers in module.layers:
        seen = rectified(layers, seen)
    return instead(module, x, seen)


def ppm(module: Any, x: Tensor) -> Tensor:
    """means of slices, a convolution of each, enlarged, a convolution of all"""
    pyramid, parts = module.pyramid, [x]
    for bins, layers in zip(pyramid.bins, pyramid.pooled, strict=True):
        regions = ([slice(i * n // bins, ceil((i + 1) * n / bins)) for i in range(bins)] for n in x.shape[2:])
        small = rectified(layers, means(x, *regions))
        parts.append(F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=True))
    return instead(module, x, rectified(pyramid.join, torch.cat(parts, dim=1)))


def aspp(module: Any, x: Tensor) -> Tensor:
    """a convolution for each rate, the map's mean everywhere, a convolution of all"""
    *convs, (_, *of_mean) = module.pyramid.convs
    mean = rectified(of_mean, x.mean((2, 3), keepdim=True)).expand_as(x)
    return instead(
        module, x, rectified(module.pyramid.project, torch.cat([*(rectified(c, x) for c in convs), mean], 1))
    )
