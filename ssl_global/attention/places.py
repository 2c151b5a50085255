"""Where in a backbone a module can stand: at a stage, by the name that timm's `feature_info` has for it, or any path.

`features_only` models have other paths for the same places ("layers.2" becomes "layers_2" or "model.layers.2"), and so
have the encoders here ("model.layers.2"). The model's own name of a place works in all of them.
"""

import difflib
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

MOST_BANDS = 32  # ours: a first convolution of as many channels or more is behind a rearrangement of the pixels
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def stages(model: nn.Module) -> list[str]:
    """Names of the model's stages, from the first; a ViT's blocks. Empty for a model without `feature_info`."""
    return list(strides(model))


def four_stages(model: nn.Module) -> list[str]:
    """The last four; of a model whose stages all have one resolution, as ViT's blocks, the ends of its quarters.

    The last of those is the block before the last: what the patches are behind the last, a class token does not read.
    """
    found = strides(model)
    names = list(found)
    if len(names) > 4 and len(set(found.values())) == 1:
        return [*(names[len(names) * quarter // 4 - 1] for quarter in (1, 2, 3)), names[-2]]
    return names[-4:]


def strides(model: nn.Module) -> dict[str, int]:
    """Of the model's stages: pixels from one place of the map to the next."""
    info = first([model, getattr(model, "model", None)], "feature_info") or []
    entries = getattr(info, "info", info)
    named = {entry["module"]: entry["reduction"] for entry in entries if entry.get("module")}
    return {name: stride for name, stride in named.items() if path_of(model, name) is not None}


def find(model: nn.Module, place: str) -> str:
    """The path of the module at that place. Raises ValueError, with those that are near, if there is none."""
    path = path_of(model, place)
    if path is None:
        known = stages(model)
        near = difflib.get_close_matches(place, [name for name, _ in model.named_modules() if name], n=3)
        offered = f"its stages are {listed(known)}" if known else f"the nearest are {listed(near)}"
        raise ValueError(f"{place}: not in this {type(model).__name__}; {offered}")
    return path


def matching(model: nn.Module, place: str) -> list[str]:
    """The paths that a place with *, ? or [ stands for, as in file names (* passes dots too); else the place itself.

    Raises ValueError if it stands for none.
    """
    if not set(place) & set("*?["):
        return [place]
    found = [name for name, _ in model.named_modules() if fnmatchcase(name, place)]
    if not found:
        raise ValueError(
            f"{place}: matches nothing in this {type(model).__name__}; its stages are {listed(stages(model))}"
        )
    return found


def path_of(model: nn.Module, place: str) -> str | None:
    modules = dict(model.named_modules())
    # timm's feature_info says "block" for the stages of MViT and Twins.
    written = [place, *(place.replace("block.", name, 1) for name in ("stages.", "blocks.") if place[:6] == "block.")]
    paths = [path for name in written for path in (name, f"model.{name}", f"body.{name}", name.replace(".", "_", 1))]
    path = next((path for path in paths if path and path in modules), None)
    while path is not None and isinstance(modules[path], nn.ModuleList) and len(modules[path]):
        *_, (last, _) = modules[path].named_children()  # a list is never called: what it ends with is
        path = f"{path}.{last}"
    return path


def listed(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 8 else [*names[:3], "...", names[-1]]) or "none that it names"


def host_of(module: nn.Module) -> tuple[nn.Module, str]:
    """Where a child for `module` can be registered without being run by it, and the child's name.

    Containers run their children, or are asked for them, so one for them lives in the last child that is none.
    """
    depth = 0
    while isinstance(module, CONTAINERS) and len(module):
        *_, module = module.children()
        depth += 1
    return module, f"attached_{depth}" if depth else "attached"


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that the model was built for. Raises ValueError if it does not say."""
    inner = getattr(model, "model", None)
    owners = [owner for owner in (model, inner) if isinstance(owner, nn.Module)]
    if (pixels := first(owners, "pixels")) and (channels := first(owners, "channels")):
        return channels, pixels, pixels  # an encoder of ours
    config: dict[str, Any] = first(owners, "pretrained_cfg") or first(owners, "default_cfg") or {}
    size = first([first(owners, "patch_embed")], "img_size") or (config.get("input_size") or (0, 0, 0))[1:]
    if not all(size):
        raise ValueError(f"{type(model).__name__}: does not say which images it takes; give input_size=(3, 224, 224)")
    convolution = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    channels = config.get("input_size", (3,))[0]
    if convolution and convolution.in_channels < MOST_BANDS:
        channels = convolution.in_channels
    return channels, *size


def first(owners: list[Any], attribute: str) -> Any:
    return next((value for owner in owners if (value := getattr(owner, attribute, None)) is not None), None)
