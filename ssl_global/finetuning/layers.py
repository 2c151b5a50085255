"""What learns how fast in fine-tuning: layers, attention modules, gates."""

import re
from collections.abc import Collection

from torch import nn

from ssl_global.attention.attach import Attachment
from ssl_global.methods.layers import grouped
from ssl_global.methods.method import ParameterGroup


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
    learning = []
    for name, parameter in model.named_parameters():
        scale = 1.0 if id(parameter) in attached else scales.get(name, 1.0)
        scale = gate_lr_times if id(parameter) in gates else scale
        decays = parameter.ndim > 1 and name not in undecayed and id(parameter) not in gates
        learning.append((parameter, decays, scale))
    return grouped(learning)
