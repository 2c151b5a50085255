"""Learning rates that fall from the head towards the input: a layer's is the next one's times a decay (BEiT; timm)."""

import re
from collections.abc import Collection

from timm.models import group_parameters
from torch import nn

from ssl_global.attention.attach import Attachment
from ssl_global.methods.method import ParameterGroup


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Of each parameter that timm's model counts to a layer, by its name; others learn at the full rate."""
    matcher = getattr(model, "group_matcher", None)
    layers: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True) if matcher else {}
    last = max(layers.values(), default=0)
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def of_maps(scales: dict[str, float], names: Collection[str]) -> dict[str, float]:
    """The same for the names that parameters have in a features_only model: layers_0.x or model.layers.0.x."""
    found = {}
    for name in names:
        found[name] = next((scales[known] for known in (name, plain_name(name)) if known in scales), 1.0)
    return found


def plain_name(name: str) -> str:
    """Of a features_only model's tensor: in the whole model."""
    return re.sub(r"^(\w+?)_(\d+)\.", r"\1.\2.", name.removeprefix("model.").removeprefix("body."))


def layered(
    model: nn.Module, attachment: Attachment, scales: dict[str, float], gate_lr_times: float
) -> list[ParameterGroup]:
    """Matrices decay, 1-D parameters do not, nor those that timm's model says. Attention modules learn at the full
    rate, their gates faster and undecayed."""
    gates = {id(p) for one in attachment.places.values() for p in one.attention.gate_parameters()}
    attached = {id(p) for p in attachment.parameters()}
    undecayed: Collection[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    groups: dict[tuple[bool, float], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0 if id(parameter) in attached else scales.get(name, 1.0)
        scale = gate_lr_times if id(parameter) in gates else scale
        decays = parameter.ndim > 1 and name not in undecayed and id(parameter) not in gates
        group = groups.setdefault((decays, scale), {"params": [], "decays": decays, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())
