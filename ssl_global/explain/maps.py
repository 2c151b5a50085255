"""Attention maps: what each layer and head of a backbone looks at.

    for layer in attention_maps(model, images):
        layer.path, layer.grid
        layer.picture()            # (B, heads, rows, cols): the class token's, or the mean over all patches
        layer.picture((3, 4))      # what the patch in row 3, column 4 looks at
        layer.looking_at(0)        # which patches look at the class token
        layer.weights()            # all of them, (B, groups, heads, queries, keys)

Row 0 of a picture is the top of the image; a place of it is a patch of layer.stride pixels. Any image size, any tokens
before the patches, windows and shifts included. Which models: kinds.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssl_global.errors import UserError
from ssl_global.explain.layer import LayerMap, Query
from ssl_global.explain.record import Recorded, attention_layers, record

__all__ = ["LayerMap", "Query", "attention_layers", "attention_maps", "looking_at_patches", "record"]


def attention_maps(model: nn.Module, images: Tensor, *, layers: list[str] | None = None) -> list[LayerMap]:
    """Each attention of the model for these images, in the order in which they come.

    model   as for `record`; it looks at them in evaluation, without gradient, and is left as it was
    images  (B, C, H, W), normalised as the model expects
    layers  paths of the attentions that are wanted, as `attention_layers(model)` gives them; None: all

    Raises UserError as `record` does.
    """
    return seen(model, images, layers=layers).layers


def looking_at_patches(model: nn.Module, images: Tensor) -> list[LayerMap]:
    """Those layers that give weights to patches of known places: of a global-token Swin, not where patches read tokens.

    Raises UserError as `attention_maps` does, and if there is none.
    """
    layers = [
        layer for layer in attention_maps(model, images) if layer.grid and bool((layer.keys >= layer.prefix).any())
    ]
    if not layers:
        raise UserError("none of its attentions looks at patches of known places")
    return layers


def seen(model: nn.Module, images: Tensor, *, layers: list[str] | None = None) -> Recorded:
    if images.ndim != 4:
        raise UserError(f"images {tuple(images.shape)}: must be (B, C, H, W)")
    with record(model, layers=layers) as recorded, in_evaluation(model), torch.no_grad():
        model(images)
    return recorded


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Every module is left in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was
