"""Views of several sizes through one encoder."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ssl_global.encoders.encoder import Encoder, Tokens


def tokens_of(encoder: Encoder, views: list[Tensor]) -> Iterator[Tokens]:
    """What the encoder says of (B, C, H, W) views, in their order: neighbours of one size go through it together, and
    come as one `Tokens` of their number times B images, view by view."""
    start = 0
    for stop in range(1, len(views) + 1):
        if stop == len(views) or views[stop].shape != views[start].shape:
            yield encoder(torch.cat(views[start:stop]))
            start = stop
