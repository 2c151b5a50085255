"""Looking on while a model runs: its attentions one after another, and not a trace left behind.

    with record(model) as recorded:
        model(images)
    recorded.layers[-1].picture()

Everything is done in hooks before the layers, which change nothing: the model computes bit for bit what it would, with
the fused attention that it has. They are gone at the end of the `with`, after an error too.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssl_global.errors import UserError
from ssl_global.explain.kinds import MERGINGS, Trunk, found_in, trunk_of
from ssl_global.explain.layer import LayerMap


@dataclass(frozen=True)
class Merge:
    """Between two stages: 2 x 2 patches to one; the last row or column of an odd map stays with itself."""

    grid: tuple[int, int]  # before
    prefix: int


Event = LayerMap | Merge


@dataclass
class Recorded:
    """What happened, in its order. A model that was called several times appears several times."""

    events: list[Event] = field(default_factory=list)

    @property
    def layers(self) -> list[LayerMap]:
        return [event for event in self.events if isinstance(event, LayerMap)]


@contextmanager
def record(model: nn.Module, *, layers: list[str] | None = None) -> Iterator[Recorded]:
    """Within it, every call of the model is recorded: queries and keys of each layer, linear in the image's pixels.

    model   one of timm's (kinds.py lists which), an encoder of ours, or what holds one
    layers  paths of the attentions that are wanted, as `attention_layers` gives them; None: all

    Raises UserError for a model without attention, with a kind that cannot be read, or that is compiled, and for a path
    that is none of its attentions'.
    """
    recorded = Recorded()
    with watch(Looker(model, layers=layers), recorded.events.append):
        yield recorded


def attention_layers(model: nn.Module) -> list[str]:
    """Paths of all attentions of the model. Raises UserError as `record` does."""
    return list(found_in(model))


class Looker:
    """What of a model there is to look at: to be found once, to be watched as often as one likes.

    images   at most so many of a batch are looked at; None: all
    layers   as for `record`
    seconds  that looking has taken so far, on the CPU; of a GPU's work, the time to ask for it
    """

    def __init__(self, model: nn.Module, *, images: int | None = None, layers: list[str] | None = None) -> None:
        self.model, self.attentions, self.seconds = model, found_in(model), 0.0
        for path in layers or []:
            if path not in self.attentions:
                raise UserError(f"layers: {path!r} is no attention of the model; they are {', '.join(self.attentions)}")
        if layers is not None:
            self.attentions = {path: found for path, found in self.attentions.items() if path in layers}
        self.trunks = {
            path: trunk_of(module, images)
            for path, module in model.named_modules()
            if hasattr(getattr(module, "patch_embed", None), "dynamic_feat_size")
        }
        self.elsewhere = Trunk(images=images)  # for attentions that belong to no model with patches, as a decoder's

    def trunk_at(self, path: str) -> Trunk:
        """That of the innermost model around it."""
        around = [trunk for trunk in self.trunks if not trunk or f"{path}.".startswith(f"{trunk}.")]
        return self.trunks[max(around, key=len)] if around else self.elsewhere


@contextmanager
def watch(looker: Looker, see: Callable[[Event], object]) -> Iterator[None]:
    """Within it, `see` is called with each attention, before it is computed. Raises UserError for a compiled model."""
    refuse_compiled(looker.model)
    handles = []
    try:
        start = time.perf_counter()
        for path, module in looker.model.named_modules():
            if path in looker.attentions:
                look: Any = partial(see_attention, looker, path, looker.trunk_at(path), see)
                handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
            elif isinstance(module, MERGINGS):
                handles.append(module.register_forward_pre_hook(partial(see_merge, looker.trunk_at(path), see)))
            if path in looker.trunks:
                embed = module.get_submodule("patch_embed")
                handles.append(embed.register_forward_pre_hook(partial(see_images, looker.trunks[path])))
        looker.seconds += time.perf_counter() - start
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_compiled(model: nn.Module) -> None:
    """torch leaves hooks that come after compiling out of what is compiled, without a word."""
    for path, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            raise UserError(
                f"{path or 'the model'} is compiled, so its attention cannot be seen; look before compiling"
            )


@torch.no_grad()
def see_attention(
    looker: Looker,
    path: str,
    trunk: Trunk,
    see: Callable[[Event], object],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    start = time.perf_counter()
    _, kind = looker.attentions[path]
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    del given["self"]
    for layer in kind(path, trunk, module, **given):
        see(layer)
    looker.seconds += time.perf_counter() - start


def see_merge(trunk: Trunk, see: Callable[[Event], object], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    (x,) = args
    see(Merge((x.shape[-3], x.shape[-2]), trunk.prefix))
    trunk.stride = (trunk.stride[0] * 2, trunk.stride[1] * 2)


def see_images(trunk: Trunk, module: Any, args: tuple[Tensor, ...]) -> None:
    rows, cols = module.feat_ratio(as_scalar=False)
    trunk.stride, trunk.grid = (float(rows), float(cols)), module.dynamic_feat_size(args[0].shape[-2:])
