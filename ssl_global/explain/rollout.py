"""Attention rollout: how much of each patch has reached a token of the last layer, through all layers.

Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", https://arxiv.org/abs/2005.00928, section 3: a
layer passes on (A + I) / rowsum, A its weights over the heads' mean and I the residual; the layers are multiplied.

Not as there:

- The matrices are never multiplied. A row vector, all 1 at the token that is asked for, is carried from the last layer
  to the first; row times matrix is all that is needed. So a Swin's windows cost O(N k^2), memory stays linear in the
  pixels, and images of 1024 x 1024 are nothing special.
- Windows, shifts and merging are matrices like any other: a token outside of a layer's attention (the patches while
  global tokens read) keeps itself, a merged patch hands a quarter to each of its four. What a window gives to padding
  reaches no patch: it is left out before the rows are normalised.
- Heads may be joined by their maximum or minimum, and the smallest weights left out, as in Gildenblat's vit-explain
  (https://github.com/jacobgil/vit-explain). There the smallest of the whole matrix go, here of each query, so that no
  query loses all; and there only of the batch's first image.

It is a sketch: MLPs, norms and the size of values play no part in it, nor do gates (what global tokens write counts
even while their gate is 0).
Evidence: tests/explain/test_rollout.py, against products of whole matrices in float64.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_global.attention.base import Attention, Gated
from ssl_global.encoders.global_swin import GlobalSwin
from ssl_global.errors import UserError, wrong
from ssl_global.explain.layer import LayerMap, Query, add_at, place_of
from ssl_global.explain.maps import seen
from ssl_global.explain.record import Event, Merge

Fusion = Literal["mean", "max", "min"]


def rollout(
    model: nn.Module, images: Tensor, *, query: Query = None, heads: Fusion = "mean", discard: float = 0.0
) -> Tensor:
    """(B, rows, cols) of the patches of the first layer, each in 0..1: their shares in what the query holds at the end.
    Together they make 1, less what is from tokens without a place.

    model    as for `attention_maps`, of one backbone
    images   (B, C, H, W), normalised as the model expects; any H and W that it takes
    query    None: what stands for the image: the class token, or the global tokens where they are the summary, or else
             the mean over the last stage's patches; "mean": the latter; a number: that token before the patches;
             (row, col): that patch of the last stage
    heads    how the weights of the heads become one: mean, max or min
    discard  the share of each query's weights, the smallest, that is left out; 0 up to, not including, 1

    Raises UserError for what cannot be.
    """
    if heads not in ("mean", "max", "min"):
        raise wrong("heads", heads, "mean, max or min")
    if not 0 <= discard < 1:
        raise wrong("discard", discard, "a share of the weights: 0 up to, not including, 1")
    for path, module in model.named_modules():
        if isinstance(module, Attention) and not isinstance(module, Gated):
            raise UserError(
                f"{path} moves features between places by itself: rollout knows the backbone's attention only"
            )
    events = seen(model, images).events
    last = check_one_backbone(events)
    row = starting_row(last, query, tokens_are_summary=summary_of(model), num_images=len(images))
    return carry_back(events, row, heads=heads, discard=discard)


def carry_back(events: Sequence[Event], row: Tensor, *, heads: Fusion, discard: float) -> Tensor:
    """From (B, tokens) after the last of `events` to (B, rows, cols) before the first."""
    grid, prefix = (0, 0), 0
    for event in reversed(events):
        if isinstance(event, Merge):
            row = unmerged(row, event)
            grid, prefix = event.grid, event.prefix
        else:
            row = through(row, event, heads=heads, discard=discard)
            grid, prefix = event.known_grid(), event.prefix
    return row[:, prefix:].unflatten(1, grid)


def through(row: Tensor, layer: LayerMap, *, heads: Fusion, discard: float) -> Tensor:
    """Row times (A + I) / rowsum: (B, tokens) after the layer -> (B, tokens) before it."""
    row = torch.cat([row, row.new_zeros(len(row), 1)], dim=1)  # a place for padding, which holds nothing
    kept, given = row.clone(), torch.zeros_like(row)
    for part, weights in layer.chunks():
        A = kept_weights(fused(weights, heads), part, discard)  # (B, G, Q, K)
        places = part.queries.flatten() % row.shape[1]
        each = row[:, places].unflatten(1, part.queries.shape) / (1 + A.sum(-1))
        kept[:, places] = each.flatten(1)
        given = add_at(given, part.keys, torch.einsum("bgq,bgqk->bgk", each, A))
    return (kept + given)[:, :-1]


def fused(weights: Tensor, heads: Fusion) -> Tensor:
    """(B, G, H, Q, K) -> (B, G, Q, K)."""
    return weights.mean(2) if heads == "mean" else weights.amax(2) if heads == "max" else weights.amin(2)


def kept_weights(A: Tensor, part: LayerMap, discard: float) -> Tensor:
    """Without those on padding, and without each query's smallest."""
    real = part.keys >= 0  # (G, K)
    A = A * real[None, :, None]
    if discard == 0:
        return A
    allowed = real[:, None] if part.allowed is None else real[:, None] & part.allowed[:, :, 0]
    num_left_out = (allowed.expand(A.shape).sum(-1, keepdim=True).double() * discard).long()
    # Those that may not be attended to are 0 already; they do not count as left out.
    ranks = A.masked_fill(~allowed, float("inf")).argsort(-1).argsort(-1)
    return A.masked_fill(ranks < num_left_out, 0)


def unmerged(row: Tensor, merge: Merge) -> Tensor:
    """What a merged patch holds is shared by those that it was made of: four, or fewer at an odd edge."""
    (rows, cols), prefix = merge.grid, merge.prefix
    after = row[:, prefix:].unflatten(1, (-(-rows // 2), -(-cols // 2)))
    spread = after.repeat_interleave(2, 1)[:, :rows].repeat_interleave(2, 2)[:, :, :cols]
    high = sharers(rows, row.device)[:, None]
    wide = sharers(cols, row.device)
    return torch.cat([row[:, :prefix], (spread / (high * wide)).flatten(1)], dim=1)


def sharers(length: int, device: torch.device) -> Tensor:
    """Of each place along an axis, how many are merged with it."""
    count = torch.full((length,), 2, device=device)
    count[length - length % 2 :] = 1
    return count


def starting_row(last: LayerMap, query: Query, *, tokens_are_summary: bool, num_images: int) -> Tensor:
    """(B, tokens): 1 at the query, or shared evenly by what it means."""
    (rows, cols), prefix = last.known_grid(), last.prefix
    row = last.empty_row()[:1, 0, :-1]
    if query is None and last.class_token:
        query = 0
    if query is None and tokens_are_summary:
        row[:, :prefix] = 1 / prefix
    elif query is None or query == "mean":
        row[:, prefix:] = 1 / (rows * cols)
    else:
        row[:, place_of(query, last.grid, prefix, at="the last layer")] = 1
    return row.repeat(num_images, 1)


def summary_of(model: nn.Module) -> bool:
    """Whether global tokens stand for the image."""
    return any(isinstance(part, GlobalSwin) and part.global_pool == "token" for part in model.modules())


def check_one_backbone(events: Sequence[Event]) -> LayerMap:
    """The last layer of what is one chain of layers."""
    layers = [event for event in events if isinstance(event, LayerMap)]
    if not layers:
        raise UserError("the model was called, but none of its attentions was")
    for layer in layers:
        layer.known_grid()
    called = [layer.path for layer in layers]
    for path in called:
        if called.count(path) > 1:
            raise UserError(f"{path} is called {called.count(path)} times: rollout needs the layers of one backbone")
    return layers[-1]
