"""Features of a network as maps of its images, whatever its family lays them out as (attention/layout.py).

B  images     rows, cols  of the map     D  width of the features
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssl_global.attention.layout import ImageSize, Layout, Patches, layout_at, layout_of, observe
from ssl_global.attention.places import find, input_size_of, stages
from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import UserError


def network(model: nn.Module) -> nn.Module:
    """timm's model of an encoder of ours; others are what they are."""
    return model.model if isinstance(model, Encoder) else model


def patch_features(model: nn.Module, images: Tensor, place: str | None = None) -> Tensor:
    """(B, rows, cols, D): what the network says of each place, without class token, registers or global tokens.

    model   an encoder of ours, or any model of timm's
    images  (B, C, H, W), normalised, of sizes that the model takes
    place   a stage as `attention.places.stages(model)` names it, or a module's path; None: the last features, as the
            model gives them (normalised, in a ViT)

    Without gradient, in evaluation; the model is left in the mode that it was in. Raises UserError for a place that
    there is not, or where there is no map.
    """
    model = network(model)
    try:
        path = None if place is None else find(model, place)
        x = last_features(model, images) if path is None else output_at(model, path, images)
        layout, item = layout_here(model, path, images)
        features_BCHW = layout.to_map(x if item is None else x[item])
    except ValueError as error:
        raise UserError(f"features{f' at {place}' if place else ''}: {error}") from error
    return features_BCHW.permute(0, 2, 3, 1).float()


def output_at(model: nn.Module, path: str, images: Tensor) -> Any:
    observed = observe(model, {path: model.get_submodule(path)}, images)
    if path not in observed.outputs:
        raise ValueError(f"{path}: never called when the model looks at an image")
    return observed.outputs[path]


def last_features(model: nn.Module, images: Tensor) -> Tensor:
    forward_features: Callable[[Tensor], Tensor] | None = getattr(model, "forward_features", None)
    if forward_features is None:
        raise ValueError(f"{type(model).__name__}: has no forward_features; name a place, of {stages(model)}")
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            return forward_features(images)
    finally:
        for module, was in training.items():
            module.training = was


def layout_here(model: nn.Module, path: str | None, images: Tensor) -> tuple[Layout, int | None]:
    """How features of these images are laid out there, and in which item of a tuple they are (None: there is no tuple).

    How many pixels a token stands for is learnt from images of the model's own size, which its patches divide; others
    may be padded. Raises ValueError if there is no map, or several.
    """
    height, width = images.shape[-2:]
    try:
        own = (images.shape[1], *input_size_of(model)[1:])
    except ValueError:  # it does not say
        own = (images.shape[1], height, width)
    zeros, size = images.new_zeros(1, *own), ImageSize(own[1], own[2])
    layout: Layout | None
    if path is None:
        layout, item = layout_of(model, "", last_features(model, zeros), zeros, size), None
        if layout is None:
            raise ValueError(f"{type(model).__name__}: gives no map of the image")
    else:
        observed = observe(model, {path: model.get_submodule(path)}, zeros)
        if path not in observed.outputs:
            raise ValueError(f"{path}: never called when the model looks at an image")
        layout, item = layout_at(model, path, observed, size)
    if isinstance(layout, Patches):
        layout.images = ImageSize(height, width)
    return layout, item
