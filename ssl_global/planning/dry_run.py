"""A recipe's step on tensors without content: what it computes and what it keeps, before anything is paid for.

The method is built on the meta device and its step, forward and backward, is run under FakeTensorMode: no weight is
drawn, nothing is computed, no memory is taken. Floating-point operations are those that torch's FlopCounterMode counts
(matrix products, convolutions, attention; 2 to a multiply-add; no norms, no optimizer). Bytes are counted tensor by
tensor (training/memory.py), for the kernels of a CPU; on the CPU itself that is right to 2 % (tested against torch's
profiler), for a GPU an estimate: its kernels keep about the same, and need room besides.
"""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssl_global.errors import UserError
from ssl_global.methods.method import Batch, Method
from ssl_global.recipe import MethodConfig, Recipe
from ssl_global.schedules import Progress
from ssl_global.training.engine import BLOCKS, DTYPES
from ssl_global.training.memory import LiveBytes, tensors_of

SIZES = (8, 16)  # images, about, of the two steps that the line through is drawn from (ours)
FIRST = Progress(step=0, num_steps=1, steps_per_epoch=1)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Numbers of a method's tensors; all its tensors are float32."""

    learning: int
    fixed: int  # parameters that learn nothing by themselves: a teacher's, fixed positions
    heads: int  # of those that learn: what is not in a backbone, as heads and decoders
    buffers: int
    blocks: int  # of all parameters: the transformer blocks', which FSDP2 gathers one by one
    largest_block: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """Of a step on `images` images, forward and backward, on one process."""

    flops_each: float  # of an image
    fixed_bytes: float  # at the step's peak, beside weights, gradients and averages: whatever the number of images
    bytes_each: float  # and for each image
    cast_bytes: int  # of the fixed ones, weights in another precision

    def bytes(self, images: int) -> int:
        return round(self.fixed_bytes + self.bytes_each * images)


def dry_run(recipe: Recipe) -> tuple[Parts, Step]:
    """Raises UserError for a method that cannot take a step without content."""
    if type(recipe.method).settled is not MethodConfig.settled:
        raise UserError("this recipe learns from a model that lies elsewhere: its step cannot be run without content")
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # what is drawn in numpy is not
    with torch.device("meta"):
        method = recipe.method.build(recipe)
    parts = parts_of(method)
    together = recipe.method.images_together()
    few = max(SIZES[0] // together, 1) * together
    sizes = (few, SIZES[1] // SIZES[0] * few)
    with mode:
        method._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        if recipe.train.recompute_activations:
            for encoder in method.backbones().values():
                encoder.recompute_activations()
        method.train()
        for parameter in method.parameters():  # as behind the first part of an accumulated step
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        try:
            with FlopCounterMode(display=False) as counter:
                small, casts = one_step(method, recipe, sizes[0])
            large, _ = one_step(method, recipe, sizes[1])
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"this recipe's step cannot be run without content: {reason}") from error
    flops_each, each = counter.get_total_flops() / sizes[0], (large - small) / (sizes[1] - sizes[0])
    fixed = small - each * sizes[0]
    return parts, Step(flops_each=flops_each, fixed_bytes=fixed, bytes_each=each, cast_bytes=casts)


def one_step(method: Method, recipe: Recipe, images: int) -> tuple[int, int]:
    """Bytes at its peak, beside what the method keeps, and what of that are casts of weights."""
    with LiveBytes(tensors_of(method)) as live:
        batch = empty_batch(recipe, images)
        ahead = [torch.zeros((2, *view.shape), dtype=torch.uint8) for view in batch["views"]]  # loader.ahead_on_device
        method.begin_step(FIRST)
        # fp16 is not for CPUs; bf16 is as wide.
        for piece in method.pieces(batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision != "fp32"):
                loss = method(piece, FIRST)["loss"]
            loss.backward()
        del ahead
    return live.peak, live.casts


def empty_batch(recipe: Recipe, images: int) -> Batch:
    """What the loop would give to the method."""
    kinds, channels = list(recipe.views.groups().values()), recipe.data.channels
    labels: tuple[int, ...] = (images,)
    if getattr(recipe.method, "multi_label", False):
        labels = (images, len(getattr(recipe.method, "classes", ())))
    side = kinds[0].pixels
    return {
        "views": [torch.zeros(images, channels, kind.pixels, kind.pixels) for kind in kinds for _ in range(kind.count)],
        "seed": torch.zeros(images, dtype=torch.int64),
        "seeds": list(range(images)),  # what is hidden is drawn from them: not of all images the same
        "key": [""] * images,
        "label": torch.zeros(labels, dtype=torch.int64),
        "mask": torch.zeros(images, side, side, dtype=torch.int64),
    }


def parts_of(method: Method) -> Parts:
    learning = {p: p.numel() for p in method.parameters() if p.requires_grad}
    of_backbones = {p for encoder in method.backbones().values() for p in encoder.parameters() if p.requires_grad}
    blocks = [sum(p.numel() for p in m.parameters()) for m in method.modules() if isinstance(m, BLOCKS)]
    return Parts(
        learning=sum(learning.values()),
        fixed=sum(p.numel() for p in method.parameters() if not p.requires_grad),
        heads=sum(number for p, number in learning.items() if p not in of_backbones),
        buffers=sum(b.numel() for b in method.buffers()),
        blocks=sum(blocks),
        largest_block=max(blocks, default=0),
    )


def width_of(precision: str) -> int:
    """Bytes of a number that travels in the step's precision."""
    return DTYPES[precision].itemsize
