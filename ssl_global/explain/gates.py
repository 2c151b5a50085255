"""What each attached attention module does to a map: how far it has opened, how much it changes, and how it weighs.

    with record(model) as found:      # hooks are there only inside, and gone after an error too
        model(images)
    print(table(found))

Of a module that multiplies (se, eca, cbam, coord, gca, gather_excite) the gates are recorded as they come out of its
last layer, 1: nothing changes; 0 to 2, or 0 to 1 in the published form. Of position and non_local (softmax modes) the
map of which place looks where is computed once more from their own queries and keys, for maps of few places, since
their fused attention keeps none. Others have neither: how much they change is what can be said.

    B  images     C  channels     N  places that ask     M  places that are asked
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.attention.attach import Attached
from ssl_global.attention.base import Attention, Gated, TwiceSigmoid
from ssl_global.attention.non_local import NonLocal, places
from ssl_global.attention.position import PositionAttention

MOST_PLACES = 1024  # of a map whose attention is kept, N x M: 4 MB an image (ours)


@dataclass
class Gate:
    """Of one module, over all images that were looked at while it was recorded; tensors are on the CPU.

    path      of the module in the model;  place: what it stands after;  name: what it is
    opened    mean size of its gate parameters, 0 at the start from an identity; None: it has none
    gamma     (C,), or (1,) in the published form; None: it has none
    change    (B,): |y - x| / |x|, of what it made of each image's map
    channels  (B, C): the weight of each channel, a mean over the places where it differs from place to place
    spatial   (B, rows, cols): the weight of each place, a mean over channels; of a module with `looks`, how much each
              place is looked at, 1 if all are alike
    looks     (B, N, M): which share of what each place gathers comes from where; rows sum to 1
    """

    path: str
    place: str
    name: str
    opened: float | None
    gamma: Tensor | None
    change: Tensor
    channels: Tensor | None
    spatial: Tensor | None
    looks: Tensor | None


@dataclass
class Seen:
    """What the hooks of one module have seen: a list for each call."""

    change: list[Tensor] = field(default_factory=list)
    gates: list[list[Tensor]] = field(default_factory=list)
    looks: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[list[Gate]]:
    """Gives a list that is empty inside, and afterwards has a Gate for each module that was called, in their order.

    Raises ValueError if nothing is attached to the model.
    """
    standing = {path: one for path, one in model.named_modules() if isinstance(one, Attached)}
    if not standing:
        raise ValueError(f"{type(model).__name__}: nothing is attached to it; attention.attach.attach does that")
    found: list[Gate] = []
    seen = {path: Seen() for path in standing}
    with contextlib.ExitStack() as hooks:
        for path, one in standing.items():
            watch(one.attention, seen[path], hooks)
        yield found
    found += [summed_up(path, one, seen[path]) for path, one in standing.items() if seen[path].change]


def gates(model: nn.Module, images: Tensor) -> list[Gate]:
    """What the modules do to these images, (B, C, H, W), normalised: without gradient, in evaluation."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), record(model) as found:
            model.eval()(images)
    finally:
        for module, was in modes.items():
            module.training = was
    return found


# ---------------------------------------------------------------------------------------------------------------- hooks


def watch(attention: Attention, seen: Seen, hooks: contextlib.ExitStack) -> None:
    def begins(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        seen.gates.append([])

    def gate(_module: nn.Module, _inputs: tuple[Tensor, ...], weights: Tensor) -> None:
        seen.gates[-1].append(weights.detach().float())

    def ends(_module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = inputs[0].detach().float()
        size = x.flatten(1).norm(dim=1)
        seen.change.append((y.detach().float() - x).flatten(1).norm(dim=1) / size.clamp_min(1e-12))
        seen.sizes.append((x.shape[2], x.shape[3]))

    def looks(module: nn.Module, inputs: tuple[Tensor, ...], _y: Tensor) -> None:
        if (found := looks_of(module, inputs[0].detach())) is not None:
            seen.looks.append(found)

    hooks.callback(attention.register_forward_pre_hook(begins).remove)
    hooks.callback(attention.register_forward_hook(ends).remove)
    for part in attention.modules():
        if isinstance(attention, Gated) and isinstance(part, TwiceSigmoid | nn.Sigmoid):
            hooks.callback(part.register_forward_hook(gate).remove)
        if isinstance(part, PositionAttention | NonLocal):
            hooks.callback(part.register_forward_hook(looks).remove)


def looks_of(module: nn.Module, x: Tensor) -> Tensor | None:
    """(B, N, M), from the module's own queries and keys; None for a map of too many places, or none that sums to 1."""
    with torch.no_grad():
        if isinstance(module, PositionAttention):
            query, key, scale = places(module.query(x)), places(module.key(x)), 1.0
        elif isinstance(module, NonLocal) and module.mode in ("embedded_gaussian", "gaussian"):
            asked = F.max_pool2d(x, 2, ceil_mode=True) if module.sub_sample else x
            plain = module.mode == "gaussian"
            query = places(x if plain else module.theta(x))
            key = places(asked if plain else module.phi(asked))
            scale = query.shape[-1] ** -0.5
        else:
            return None
        if query.shape[1] > MOST_PLACES:
            return None
        return (query.float() @ key.float().transpose(1, 2) * scale).softmax(-1)


# -------------------------------------------------------------------------------------------------------------- figures


def summed_up(path: str, one: Attached, seen: Seen) -> Gate:
    parameters = [parameter.detach().abs().flatten() for parameter in one.attention.gate_parameters()]
    gamma = getattr(one.attention, "gamma", None)
    channels, spatial = of_gates(seen)
    looks = joined(seen.looks)
    if looks is not None and looks.shape[2] == seen.sizes[0][0] * seen.sizes[0][1]:
        spatial = (looks.mean(1) * looks.shape[2]).unflatten(1, seen.sizes[0])
    return Gate(
        path=path,
        place=one.place,
        name=one.name,
        opened=torch.cat(parameters).mean().item() if parameters else None,
        gamma=None if gamma is None else gamma.detach().float().cpu().clone(),
        change=torch.cat(seen.change).cpu(),
        channels=channels,
        spatial=spatial,
        looks=looks,
    )


def of_gates(seen: Seen) -> tuple[Tensor | None, Tensor | None]:
    """The weights of channels (B, C), and of places (B, rows, cols): products of the gates that differ along them."""
    by_channel, by_place = [], []
    for gates_of_call, size in zip(seen.gates, seen.sizes, strict=True):
        maps = [as_map(gate) for gate in gates_of_call]
        in_channels = [one for one in maps if one.shape[1] > 1]
        in_places = [one for one in maps if one.shape[2:] != (1, 1)]
        if in_channels:
            by_channel.append(product(in_channels).mean((2, 3)))
        if in_places:
            by_place.append(F.interpolate(product(in_places).mean(1, keepdim=True), size)[:, 0])
    return joined(by_channel), joined(by_place)


def as_map(gate: Tensor) -> Tensor:
    """(B, C, 1 or rows, 1 or cols); a gate of three dimensions is (B, 1, C), as eca has it."""
    return gate.transpose(1, 2)[..., None] if gate.ndim == 3 else gate


def product(maps: Sequence[Tensor]) -> Tensor:
    whole = maps[0]
    for one in maps[1:]:
        whole = whole * one
    return whole


def joined(parts: list[Tensor]) -> Tensor | None:
    """Of all calls, on the CPU; None if there is nothing, or if they are of different sizes."""
    if not parts or len({part.shape[1:] for part in parts}) > 1:
        return None
    return torch.cat(parts).cpu()


# ---------------------------------------------------------------------------------------------------------------- table


def table(found: Sequence[Gate]) -> str:
    """A line for each module: means over the images, and the range of the weights."""
    head = ("place", "module", "opened", "change", "channels", "places")
    rows = [
        (
            one.place,
            one.name,
            "-" if one.opened is None else f"{one.opened:.3g}",
            f"{one.change.mean().item():.2%}",
            span(one.channels),
            span(one.spatial),
        )
        for one in found
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
                     for row in (head, *rows))  # fmt: skip


def span(weights: Tensor | None) -> str:
    return "-" if weights is None else f"{weights.min().item():.3f} to {weights.max().item():.3f}"
