"""How a backbone lays out its features at some place, and the way from there to (B, C, H, W) and back.

    (B, C, H, W)      most CNNs, ConvNeXt, PVT, MaxViT
    (B, H, W, C)      Swin, MambaOut, VOLO, SAM's ViT
    (B, P + N, C)     ViT and its kin: P prefix tokens (class, registers), which are left alone, then N patches by rows
    (B, N, C)         Hiera: patches in the order in which its windows are cut
    (x, ...)          one of these beside something else: MViT, PiT, our Swin with global tokens

It is found out by looking at one forward pass: `observe`, then `layout_at`.
"""

import math
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Layout(Protocol):
    channels: int

    def to_map(self, x: Tensor) -> Tensor:
        """As (B, C, H, W). Raises ValueError for what is no whole map."""

    def from_map(self, y: Tensor, x: Tensor) -> Tensor:
        """The map in the place of what `x` said of it."""


@dataclass
class ImageSize:
    """Of the images that the backbone is looking at; kept up to date by a hook where they come in."""

    height: int
    width: int

    def see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.height, self.width = inputs[0].shape[-2:]


@dataclass
class ChannelsFirst:
    channels: int

    def to_map(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"{tuple(x.shape)} is no (B, {self.channels}, H, W); are patches hidden?")
        return x

    def from_map(self, y: Tensor, x: Tensor) -> Tensor:
        return y


@dataclass
class ChannelsLast:
    channels: int

    def to_map(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"{tuple(x.shape)} is no (B, H, W, {self.channels}); are patches hidden?")
        return x.permute(0, 3, 1, 2)

    def from_map(self, y: Tensor, x: Tensor) -> Tensor:
        return y.permute(0, 2, 3, 1)


@dataclass
class Patches:
    """Tokens by rows, after `num_prefix` others. Each stands for stride x stride pixels."""

    channels: int
    num_prefix: int
    stride: float
    images: ImageSize

    def to_map(self, x: Tensor) -> Tensor:
        num_patches = x.shape[1] - self.num_prefix
        grid = grid_of(num_patches, self.images, self.stride)
        if grid is None:
            size = f"{self.images.height} x {self.images.width}"
            raise ValueError(f"{num_patches} patches are not all of a {size} image; are some hidden or dropped?")
        return x[:, self.num_prefix :].transpose(1, 2).unflatten(2, grid)

    def from_map(self, y: Tensor, x: Tensor) -> Tensor:
        patches = y.flatten(2).transpose(1, 2)
        return torch.cat([x[:, : self.num_prefix], patches], dim=1) if self.num_prefix else patches


@dataclass
class Unrolled:
    """Patches in an order of their own. order: int64 (rows, cols), which of the tokens lies there."""

    channels: int
    order: Tensor

    def to_map(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.order.numel():
            raise ValueError(f"{x.shape[1]} patches, and not {self.order.numel()}; are some hidden?")
        return x[:, self.order.flatten()].transpose(1, 2).unflatten(2, self.order.shape)

    def from_map(self, y: Tensor, x: Tensor) -> Tensor:
        return y.flatten(2).transpose(1, 2)[:, self.order.flatten().argsort()]


@dataclass
class Observed:
    """One forward pass. outputs: of the places that were called."""

    images: Tensor
    outputs: dict[str, Any]
    entrance: str | None = None  # path of the innermost module that was given the images themselves
    said: list[Tensor] = field(default_factory=list)  # what the model gave in the end


def laid_as(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides of x: sums over another order in memory are rounded otherwise, and the backbone's own layers
    may count on theirs."""
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def observe(model: nn.Module, places: dict[str, nn.Module], images: Tensor) -> Observed:
    """Lets the model look at `images`, in evaluation, and leaves it as it was."""
    observed = Observed(images, {})

    def entered(path: str, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].shape == images.shape:
            observed.entrance = path

    def left(place: str, output: Any) -> None:
        observed.outputs[place] = output

    hooks = []
    for path, module in list(model.named_modules())[1:]:
        hooks.append(module.register_forward_pre_hook(lambda _module, inputs, p=path: entered(p, inputs)))
    for place, module in places.items():
        hooks.append(module.register_forward_hook(lambda _module, _inputs, output, p=place: left(p, output)))
    try:
        observed.said = in_evaluation(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return observed


def in_evaluation(model: nn.Module, images: Tensor) -> list[Tensor]:
    """All tensors that the model gives; it is left in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return tensors_of(model.eval()(images))
    finally:
        for module, was in training.items():
            module.training = was


def tensors_of(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    outputs = vars(outputs) if is_dataclass(outputs) else outputs
    parts = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple | list) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


def layout_at(model: nn.Module, place: str, observed: Observed, images: ImageSize) -> tuple[Layout, int | None]:
    """How features are laid out at `place` (a module's path), and which item of a tuple they are (None: no tuple).

    Raises ValueError if there is no map, or more than one.
    """
    output = observed.outputs[place]
    if isinstance(output, Tensor):
        found = layout_of(model, place, output, observed.images, images)
        if found is None:
            raise ValueError(f"gives {tuple(output.shape)}: no map of the image")
        return found, None
    if not isinstance(output, tuple | list):
        raise ValueError(f"gives a {type(output).__name__}: no map of the image")
    items = [(i, item) for i, item in enumerate(output) if isinstance(item, Tensor)]
    items = [(i, item) for i, item in items if item.ndim == 4] or items
    several = [(layout, i) for i, item in items if (layout := layout_of(model, place, item, observed.images, images))]
    if not several:
        raise ValueError("gives several tensors, and none is a map of the image")
    if len(several) > 1:
        raise ValueError(f"gives {len(several)} maps, and which of them to attend to is not known")
    return several[0]


def layout_of(model: nn.Module, place: str, x: Tensor, seen: Tensor, images: ImageSize) -> Layout | None:
    if x.ndim not in (3, 4) or len(x) != len(seen) or not x.is_floating_point():
        return None
    owners = ancestors(model, place)
    if x.ndim == 4:
        last = channels_are_last(x, images, hint=nearest(owners, "output_fmt"))
        return ChannelsLast(x.shape[3]) if last else ChannelsFirst(x.shape[1])
    if (reroll := nearest(owners, "reroll")) is not None:
        return unrolled(reroll, place, x)
    # Some add their class token only to the last blocks.
    for num_prefix in dict.fromkeys((int(nearest(owners, "num_prefix_tokens") or 0), 0)):
        num_patches = x.shape[1] - num_prefix
        if num_patches > 0:
            stride = math.sqrt(images.height * images.width / num_patches)
            if grid_of(num_patches, images, stride):
                return Patches(x.shape[2], num_prefix, stride, images)
    return None


def channels_are_last(x: Tensor, images: ImageSize, *, hint: object) -> bool:
    """By which of the two has the images' shape; by what timm says where both have."""
    _, a, b, c = x.shape
    aspect = math.log(images.height / images.width)
    first, last = (abs(math.log(height / width) - aspect) for height, width in ((b, c), (a, b)))
    if math.isclose(first, last, abs_tol=1e-6):
        return str(getattr(hint, "value", hint)) == "NHWC"
    return last < first


def unrolled(reroll: nn.Module, place: str, x: Tensor) -> Unrolled | None:
    """Hiera's blocks: its own way back to rows, tried on the numbers of the tokens."""
    parent, _, number = place.rpartition(".")
    if parent.rpartition(".")[2] != "blocks" or not number.isdecimal():
        return None
    numbers = torch.arange(x.shape[1], device=x.device)
    order: Tensor = reroll(numbers[None, :, None], int(number))
    return Unrolled(x.shape[2], order[0, :, :, 0])


def grid_of(num_patches: int, images: ImageSize, stride: float) -> tuple[int, int] | None:
    """Rows and columns of that many patches, at the edge cut off or filled up; None if neither gives as many."""
    rows, cols = images.height / stride, images.width / stride
    for grid in (
        (math.floor(rows + 1e-4), math.floor(cols + 1e-4)),
        (math.ceil(rows - 1e-4), math.ceil(cols - 1e-4)),
    ):
        if grid[0] * grid[1] == num_patches:
            return grid
    return None


def ancestors(model: nn.Module, place: str) -> list[nn.Module]:
    """The module at `place` and all that it is in, from within."""
    parts = place.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]


def nearest(owners: list[nn.Module], attribute: str) -> Any:
    return next((getattr(owner, attribute) for owner in owners if hasattr(owner, attribute)), None)
