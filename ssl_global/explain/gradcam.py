"""Grad-CAM: which places of an image speak for a class.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
https://arxiv.org/abs/1610.02391. With A the maps (B, C, rows, cols) of some layer and y the class's logit,

    weight of a channel = mean over places of dy / dA        map = relu(sum over channels of weight * A)

scaled to 0..1 in each image. The `grad-cam` package computes it (Gildenblat, https://github.com/jacobgil/pytorch-grad-cam,
MIT), an extra: pip install 'ssl_global[explain]'. What it takes for granted is brought about here:

    maps are (B, C, rows, cols)      each family's layout is found out and turned (attention/layout.py)
    a layer's output stays           a copy is kept: an in-place relu behind the layer would change it
    the model may be changed         its parameters' gradients and modes are as they were afterwards, hooks are gone
"""

import contextlib
import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_global.attention.places import find, stages
from ssl_global.errors import UserError
from ssl_global.explain.pictures import upsample
from ssl_global.explain.places import layout_here, network


@dataclass(frozen=True)
class GradCam:
    """
    maps     float (B, rows, cols) in 0..1, on the CPU
    classes  int64 (B,), of which they speak
    layer    path of the module whose output they weigh
    """

    maps: Tensor
    classes: Tensor
    layer: str

    def of_size(self, size: tuple[int, int]) -> Tensor:
        """(B, *size), bilinear."""
        return upsample(self.maps, size)


def grad_cam(
    model: nn.Module,
    images: Tensor,
    wanted: int | str | Sequence[int | str] | None = None,
    *,
    names: Sequence[str] = (),
    layer: str | None = None,
) -> GradCam:
    """Where the images speak for a class.

    model   a classifier: (B, C, H, W) -> (B, classes)
    images  (B, C, H, W), normalised
    wanted  a class by its number or name, or one for each image; None: the one that is most likely
    names   of the classes; without them those that the model was exported with
    layer   path of a module; None: by the family. Of a ViT the norm at the beginning of the last block, since behind
            that block only the class token is read; of others the end of the last stage

    Raises UserError for a class that there is not (with the nearest), a layer that there is not or that nothing
    depends on, a model that is no classifier, and if the package is not there.
    """
    package, target = the_package()
    model = network(model)
    path, to_map = chosen_layer(model, layer, images)
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    with as_it_was(model, before):
        cam = package(model, [model.get_submodule(path)], to_map)
        try:
            with torch.enable_grad():
                classes = numbers_of(wanted, model, images, names or class_names(model))
                cam(images.detach().requires_grad_(), [target(number) for number in classes])
            kept, gradients = cam.activations_and_grads.activations, cam.activations_and_grads.gradients
            if len(kept) != 1 or len(gradients) != 1 or not gradients[0].any():
                raise UserError(
                    f"layer = {path}: the answer does not depend on its patches; an earlier one would be right"
                )
            maps = cam.get_cam_image(None, None, None, kept[0].float().numpy(), gradients[0].float().numpy())
        finally:
            cam.activations_and_grads.release()
    return GradCam(scaled(torch.from_numpy(maps).relu()), torch.tensor(classes), path)


def scaled(maps: Tensor) -> Tensor:
    """(B, rows, cols) to 0..1 in each image; zeros stay zeros."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def the_package() -> tuple[Any, Any]:
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise UserError("Grad-CAM needs the package grad-cam; pip install 'ssl_global[explain]'") from error
    return GradCAM, ClassifierOutputTarget


@contextlib.contextmanager
def as_it_was(model: nn.Module, gradients: dict[str, Tensor | None]) -> Iterator[None]:
    """What the package does to a model is undone: it sets gradients and modes."""
    modes = {module: module.training for module in model.modules()}
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield model.requires_grad_(False)  # type: ignore[misc]  # only the images' gradient is wanted
    finally:
        for module, was in modes.items():
            module.training = was
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learning[parameter]).grad = gradients[name]


# -------------------------------------------------------------------------------------------------------------- classes


def class_names(model: nn.Module | Path) -> list[str]:
    """Of a classifier that finetune.py exported: the model, or its folder. Empty if it has none.

    timm keeps them with the model; one with attention modules, which timm does not load, has them in its folder only.
    """
    if isinstance(model, Path):
        try:
            return list(json.loads((model / "config.json").read_text()).get("label_names", []))
        except (OSError, ValueError) as error:
            raise UserError(f"{model}: no export there (config.json)") from error
    return list((getattr(model, "pretrained_cfg", None) or {}).get("label_names") or [])


def numbers_of(
    wanted: int | str | Sequence[int | str] | None, model: nn.Module, images: Tensor, names: Sequence[str]
) -> list[int]:
    """A class for each image, or UserError."""
    with torch.no_grad():
        said = model.eval()(images)
    if not isinstance(said, Tensor) or said.ndim != 2 or getattr(model, "num_classes", 1) == 0:
        raise UserError(f"{type(model).__name__}: no classifier, (B, classes); finetune.py makes one of a backbone")
    if wanted is None:
        return [int(number) for number in said.argmax(1)]
    each = [wanted] * len(images) if isinstance(wanted, int | str) else list(wanted)
    if len(each) != len(images):
        raise UserError(f"{len(each)} classes for {len(images)} images: one, or one for each, would be right")
    return [number_of(one, said.shape[1], names) for one in each]


def number_of(one: int | str, num_classes: int, names: Sequence[str]) -> int:
    if isinstance(one, str):
        if one in names:
            return list(names).index(one)
        if not names:
            raise UserError(f"class {one!r}: this model has no names for its classes; 0 to {num_classes - 1} it has")
        near = difflib.get_close_matches(one, names, n=3, cutoff=0.4) or names[:3]
        raise UserError(f"class {one!r}: not one of {len(names)}; the nearest are {', '.join(near)}")
    if not 0 <= one < num_classes:
        raise UserError(f"class {one}: 0 to {num_classes - 1} would be right")
    return one


# --------------------------------------------------------------------------------------------------------------- layers


def chosen_layer(model: nn.Module, layer: str | None, images: Tensor) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The path of a module that gives a map by itself, and how that becomes (B, C, rows, cols)."""
    reasons = []
    for path in [layer] if layer is not None else candidates(model):
        try:
            path = find(model, path)
            layout, item = layout_here(model, path, images)
            if item is not None:
                raise ValueError("gives several tensors; a module within it would be right")
            return path, lambda x, layout=layout: layout.to_map(x).clone()
        except ValueError as error:
            reasons.append(str(error) if path in str(error) else f"{path}: {error}")
    raise UserError(f"layer = {layer}: {reasons[-1]}" if reasons else "layer = None: this model names no stages")


def candidates(model: nn.Module) -> list[str]:
    """Of the last stage: a ViT block's first norm; its end; its last block, where its end has global tokens too."""
    if not stages(model):
        return []
    last = stages(model)[-1]
    within = dict(model.get_submodule(find(model, last)).named_children())
    blocks = within.get("blocks")
    inner = [f"{last}.blocks.{len(blocks) - 1}"] if isinstance(blocks, nn.Sequential | nn.ModuleList) else []
    return [*([f"{last}.norm1"] if "norm1" in within else []), last, *inner]
