"""Learning rates that fall from the head towards the input: a layer's is the next one's times a decay (BEiT; timm)."""

from collections.abc import Iterable

from timm.models import group_parameters
from torch import nn

from ssl_global.methods.method import ParameterGroup


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Of each parameter that timm's model counts to a layer, by its name; others learn at the full rate."""
    matcher = getattr(model, "group_matcher", None)
    layers: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True) if matcher else {}
    last = max(layers.values(), default=0)
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def grouped(parameters: Iterable[tuple[nn.Parameter, bool, float]]) -> list[ParameterGroup]:
    """Those of (parameter, whether it decays, its share of the rate) that learn, alike ones together."""
    groups: dict[tuple[bool, float], ParameterGroup] = {}
    for parameter, decays, scale in parameters:
        if parameter.requires_grad:
            group = groups.setdefault((decays, scale), {"params": [], "decays": decays, "lr_scale": scale})
            group["params"].append(parameter)
    return list(groups.values())
