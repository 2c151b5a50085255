"""Attention modules into a backbone that is there already, pretrained or not, without changing it.

    from ssl_global.attention.attach import attach

    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=True)
    attached = attach(model, {"layers.2": "non_local", "layers.3": ("criss_cross", {"recurrence": 2})})
    attached.gates()           # how far each has opened: 0, the model computes what it did, bit for bit
    attached.freeze_backbone()
    optimizer = AdamW(attached.param_groups(lr=1e-4, gate_lr=1e-3))
    attached.detach()          # the model as it was

Each module stands after its place and is given what that gives, as (B, C, H, W) (layout.py). It is a child of the
model, "<place>.attached", so it is saved, moved, copied and trained with it; the backbone's own keys stay what they
were. What runs it is a forward hook, so nothing of the model's code or structure changes.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssl_global.attention import build
from ssl_global.attention.base import Attention
from ssl_global.attention.cost import Precision, Report, cost, zeros_for
from ssl_global.attention.layout import ImageSize, Layout, Observed, Patches, in_evaluation, laid_as, layout_at, observe
from ssl_global.attention.places import find, four_stages, host_of, input_size_of, listed, matching, stages

Chosen = str | tuple[str, Mapping[str, Any]]  # a module's name, or its name and options


class Attached(nn.Module):
    """A module and the place it stands at.

    item      which item of a tuple the features are; None: there is no tuple
    entrance  path of what is given the images, where their size has to be known
    hooks     what runs it, and what tells that size. They are kept here so that copies and pickles of a model keep
              them too
    """

    def __init__(
        self,
        attention: Attention,
        chosen: tuple[str, dict[str, Any]],
        place: str,
        layout: Layout,
        item: int | None,
        entrance: str | None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.chosen, self.place, self.layout, self.item, self.entrance = chosen, place, layout, item, entrance
        self.hooks: list[RemovableHandle] = []

    @property
    def name(self) -> str:
        return self.chosen[0]

    def forward(self, output: Any) -> Any:
        return self.with_map(output, self.attention)

    def with_map(self, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """What the place gives, with its map changed."""
        x: Tensor = output if self.item is None else output[self.item]
        try:
            features_BCHW = self.layout.to_map(x)
        except ValueError as error:
            raise ValueError(f"{self.name} at {self.place}: {error}") from None
        y = laid_as(self.layout.from_map(change(features_BCHW), x), x)
        if self.item is None:
            return y
        items = [*output[: self.item], y, *output[self.item + 1 :]]
        return items if isinstance(output, list) else tuple(items)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return self(output)

    def stand_in(self, model: nn.Module) -> None:
        target = model.get_submodule(find(model, self.place))
        host, child = host_of(target)
        host.add_module(child, self)
        # Before other hooks, so that those see what the place gives from now on.
        self.hooks.append(target.register_forward_hook(self.after, prepend=True))
        if self.entrance is not None and isinstance(self.layout, Patches):
            entrance = model.get_submodule(self.entrance)
            self.hooks.append(entrance.register_forward_pre_hook(self.layout.images.see))

    def leave(self, model: nn.Module) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        host, child = host_of(model.get_submodule(find(model, self.place)))
        delattr(host, child)


def attach(
    model: nn.Module, modules: Mapping[str, Chosen], *, input_size: tuple[int, int, int] | None = None
) -> "Attachment":
    """Puts modules into `model`, each after its place.

    model       any of timm's, whole or `features_only`, an encoder of ours, or a module that is given (B, C, H, W) and
                has its features in one of the layouts of layout.py; with its weights already loaded
    modules     place: name, or place: (name, options). A place is a stage as `stages(model)` names it, or the path of a
                module
    input_size  (channels, height, width) of images that the model takes, if it does not say so itself. It looks at one
                empty image, so that layouts and channels are known

    Raises ValueError for what cannot be, and the model is as it was.
    """
    if not modules:
        raise ValueError(f"modules = {modules}: nothing to attach; the places are {listed(stages(model))}")
    wanted = {place: name_and_options(place, chosen) for place, chosen in modules.items()}
    targets = free_targets(model, {place: name for place, (name, _) in wanted.items()})
    channels, height, width = input_size or input_size_of(model)
    images, size = zeros_for(model, 1, (channels, height, width)), ImageSize(height, width)
    try:
        observed = observe(model, targets, images)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{type(model).__name__}: takes no images of {channels, height, width}: {error}") from error
    attached = [
        attached_to(model, place, *wanted[place], path, observed, size)
        for place, path in zip(wanted, targets, strict=True)
    ]
    for one, target in zip(attached, targets.values(), strict=True) if not images.is_meta else ():
        refuse_unread(model, one, target, observed)
    for one in attached:
        one.to(images.device, images.dtype).train(model.training).stand_in(model)
    return Attachment(model)


def refuse_unread(model: nn.Module, one: Attached, target: nn.Module, observed: Observed) -> None:
    """Raises ValueError if the model gives the same whatever the map is there: behind a ViT's last block only the class
    token may be read."""

    def change(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return one.with_map(output, lambda features_BCHW: features_BCHW + torch.randn_like(features_BCHW))

    hook = target.register_forward_hook(change, prepend=True)
    try:
        with torch.random.fork_rng():
            said = in_evaluation(model, observed.images)
    finally:
        hook.remove()
    if all(map(torch.equal, said, observed.said)):
        raise ValueError(
            f"{one.place}: nothing behind it looks at the patches (at the class token alone?); a place before it, or "
            "another pooling (global_pool='avg'), would be right"
        )


def free_targets(model: nn.Module, names: dict[str, str]) -> dict[str, nn.Module]:
    """The modules at the places, by their paths. names: of what shall stand there, by place."""
    paths = [find(model, place) for place in names]
    taken = {find(model, one.place): one.name for one in find_attached(model)}
    for (place, name), path in zip(names.items(), paths, strict=True):
        if path in taken:
            raise ValueError(f"{place}: {taken[path]} stands there already; detach it first")
        taken[path] = name
    return {path: model.get_submodule(path) for path in paths}


def attached_to(
    model: nn.Module, place: str, name: str, options: dict[str, Any], path: str, observed: Observed, size: ImageSize
) -> Attached:
    """The module that fits there, not standing there yet."""
    known = f"its stages are {listed(stages(model))}"
    if path not in observed.outputs:
        raise ValueError(f"{place}: never called when the model looks at an image; {known}")
    try:
        layout, item = layout_at(model, path, observed, size)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; {known}") from None
    if options.get("out_channels", layout.channels) != layout.channels:
        raise ValueError(changes_channels(name, place, layout.channels, options["out_channels"]))
    try:
        module = build(name, layout.channels, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}, of {layout.channels} channels: {error}") from error
    return Attached(module, (name, options), place, layout, item, observed.entrance)


def name_and_options(place: str, chosen: Chosen) -> tuple[str, dict[str, Any]]:
    name, options = (chosen, {}) if isinstance(chosen, str) else chosen
    if name == "dyt":
        raise ValueError(f"{place}: dyt is a norm, for training from scratch: attention.dyt.replace_layer_norms(model)")
    return name, dict(options)


def find_attached(model: nn.Module) -> list[Attached]:
    return [module for module in model.modules() if isinstance(module, Attached)]


def changes_channels(name: str, place: str, channels: int, out_channels: int) -> str:
    reason = f"{place}: {name} would make {out_channels} channels of {channels}, and what follows takes {channels}"
    heads = {"ppm": "PyramidPooling", "aspp": "pyramid"}
    return f"{reason}; its place is a head: attention.{name}.{heads[name]}" if name in heads else reason


class Attachment:
    """All that is attached to a model: what `attach` gives; `Attachment(model)` for a copy, or one that was loaded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.frozen: list[nn.Parameter] = []

    @property
    def places(self) -> dict[str, Attached]:
        return {one.place: one for one in find_attached(self.model)}

    @property
    def modules(self) -> dict[str, Chosen]:
        """As `attach` takes them, and JSON holds them: to build the same model again."""
        return {place: one.chosen for place, one in self.places.items()}

    def gates(self) -> dict[str, float | None]:
        """How far each has opened: the mean size of its gate parameters, 0 at the start; None for one without any."""
        opened = {}
        for place, one in self.places.items():
            values = [parameter.detach().abs().flatten() for parameter in one.attention.gate_parameters()]
            opened[place] = torch.cat(values).mean().item() if values else None
        return opened

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for one in self.places.values() for parameter in one.parameters()]

    def param_groups(self, lr: float, gate_lr: float) -> list[dict[str, Any]]:
        """Of the attached modules alone, for an optimizer: gates at their own rate and without weight decay, matrices,
        and the rest (biases, norms) without weight decay."""
        gates = [p for one in self.places.values() for p in one.attention.gate_parameters()]
        others = [p for p in self.parameters() if not any(p is gate for gate in gates)]
        groups: list[dict[str, Any]] = [
            {"params": gates, "lr": gate_lr, "weight_decay": 0.0},
            {"params": [p for p in others if p.ndim > 1], "lr": lr},
            {"params": [p for p in others if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def backbone_parameters(self) -> list[nn.Parameter]:
        own = {id(parameter) for parameter in self.parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in own]

    def freeze_backbone(self) -> None:
        """Only the attached modules learn. In train() batch norms' running statistics still follow the images."""
        self.frozen += [parameter for parameter in self.backbone_parameters() if parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def unfreeze_backbone(self) -> None:
        """What learnt before `freeze_backbone` learns again."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen = []

    def detach(self, *places: str) -> None:
        """Takes modules out again, all of them if none is named: the model as it was, bit for bit.

        Raises ValueError for a place where nothing stands.
        """
        if absent := set(places) - self.places.keys():
            raise ValueError(f"{', '.join(sorted(absent))}: nothing is attached there; it is at {list(self.places)}")
        if not places:
            self.unfreeze_backbone()
        for place, one in self.places.items():
            if not places or place in places:
                one.leave(self.model)

    def report(
        self,
        input_size: tuple[int, int, int] | None = None,
        batch: int = 1,
        *,
        precision: Precision = "fp32",
        device: torch.device | None = None,
    ) -> Report:
        """What the modules cost, each alone and all together; see `cost`."""
        of = partial(cost, self.model, input_size, batch, precision=precision, device=device)
        standing, after = self.places, of()
        try:
            for one in standing.values():
                one.leave(self.model)
            before, alone = of(), {}
            for place, one in standing.items():
                one.stand_in(self.model)
                alone[place] = of()
                one.leave(self.model)
        finally:
            for one in standing.values():
                if not one.hooks:
                    one.stand_in(self.model)
        return Report(before, after, alone, {place: one.name for place, one in standing.items()}, self.gates())


def parse(text: str) -> tuple[str | None, Chosen]:
    """A module as a command line says it: non_local, layer3=non_local, or "layer3=criss_cross(recurrence=3)".

    Returns its place, None if it names none, and the rest as `attach` takes it. Raises ValueError.
    """
    place, equals, call = text.partition("=") if "=" in text.partition("(")[0] else ("", "", text)
    try:
        tree = ast.parse(call.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            name, options = tree.id, {}
        elif isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            name = tree.func.id
            options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in tree.keywords}
        else:
            raise ValueError
    except (ValueError, SyntaxError):
        right = "MODULE, PLACE=MODULE or 'PLACE=MODULE(option=value)'"
        raise ValueError(f"attention {text!r}: {right} would be right") from None
    return (place.strip() if equals else None), (name, options) if options else name


def spelled(place: str, name: str, options: dict[str, Any]) -> str:
    """The other way round what `parse` reads."""
    said = ", ".join(f"{option}={value!r}" for option, value in options.items())
    return f"{place}={name}({said})" if options else f"{place}={name}"


def placed(model: nn.Module, texts: Sequence[str]) -> dict[str, Chosen]:
    """Modules as a command line says them, by their places; by default after the last stage but one.

    A place with *, ? or [ stands for all paths that it matches: layer*.bn2=se puts one into each block of a ResNet-18.
    Raises ValueError for what cannot be read, and for two at one place.
    """
    chosen: dict[str, Chosen] = {}
    for text in texts:
        place, module = parse(text)
        if place is None and len(four_stages(model)) < 2:
            raise ValueError(f"{text}: the model names no stages; PLACE={text} would be right")
        for one in matching(model, place or four_stages(model)[-2]):
            if one in chosen:
                raise ValueError(f"{text}: {name_of(chosen[one])} has {one} already")
            chosen[one] = module
    return chosen


def name_of(chosen: Chosen) -> str:
    return chosen if isinstance(chosen, str) else chosen[0]
