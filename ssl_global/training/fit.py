"""`train.micro_batch auto`: the most images at once that fit this device, found by trying.

A trial is a step's forward and backward, twice, on black images: the second meets the gradients of the first, as the
later parts of an accumulated step do. AdamW's averages are not there when a run begins; room is taken for them
meanwhile. The two smallest sizes come first, then the largest that the line through the last two peaks lets fit: a size
that cannot fit is hardly ever tried; where it is, a GPU says torch.OutOfMemoryError. What all processes can do counts.

Nothing of it stays: weights are not stepped, gradients are dropped, buffers and the generators of random numbers are
put back, and the data is not touched. The global batch is the recipe's, so the run learns what it would have, up to
rounding; batch norms apart, which see a part of the batch, and consistency losses, whose negatives are of a part.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_global.data.loader import AHEAD, Batch, to_device
from ssl_global.data.views import draw
from ssl_global.errors import UserError, wrong
from ssl_global.methods.method import Batch as OnDevice
from ssl_global.methods.method import Method
from ssl_global.recipe import Recipe
from ssl_global.schedules import Progress
from ssl_global.training import processes
from ssl_global.training.engine import local, precision
from ssl_global.training.memory import LiveBytes
from ssl_global.training.plan import Plan, images_together, parts_of

USABLE = 0.95  # of what is free (ours): evaluations need some of it, and there are pieces that cannot be used
BEGINNING = Progress(step=0, num_steps=1, steps_per_epoch=1)

Peaks = dict[int, int | None]  # images -> bytes that were taken, or None where memory was full


def largest_that_fits(
    model: nn.Module, method: Method, accelerator: Accelerator, recipe: Recipe, plan: Plan, *, masks: bool
) -> tuple[int, str]:
    """Images at once, and a line that says so. All processes must call it, before the first step.

    Raises UserError where not even the fewest fit.
    """
    share = plan.global_batch // plan.num_processes
    sizes = list(parts_of(share, at_most=share, multiple_of=images_together(recipe)))[::-1]
    device = accelerator.device
    allowed = least_of_all(int(USABLE * free_bytes(device, processes.here(accelerator))), device)
    trial = Trial(model, method, accelerator, recipe, masks=masks)
    with leaving_no_trace(method, device):
        peaks = search(sizes, allowed, trial.peak)
    fitting = {size: peak for size, peak in peaks.items() if peak is not None and peak <= allowed}
    if not fitting:
        raise wrong(
            "train.micro_batch", "auto",
            f"not even {sizes[0]} images at once fit in the {allowed / 1e9:.2f} GB that are free; "
            "train.recompute_activations takes less",
        )  # fmt: skip
    found = max(fitting)
    return (
        found,
        f"fit    {found} images at once take {fitting[found] / 1e9:.2f} of {allowed / 1e9:.2f} GB that are free",
    )


def search(sizes: list[int], allowed: int, peak: Callable[[int], int | None]) -> Peaks:
    """Tries few of the sizes, which rise; the largest that fits is among them."""
    tried: Peaks = {}
    fits, too_large = -1, len(sizes)  # places in `sizes`
    while too_large - fits > 1:
        place = fits + 1  # the next one, of the first two; then as far as they promise
        if len(tried) > 1:
            place = max((p for p in range(place, too_large) if promised(tried, sizes[p]) <= allowed), default=too_large)
        if place == too_large:
            break
        size = sizes[place]
        tried[size] = peak(size)
        if (taken := tried[size]) is not None and taken <= allowed:
            fits = place
        else:
            too_large = place
    return tried


def promised(tried: Peaks, size: int) -> float:
    """By the line through the two largest sizes that had room."""
    (low, below), (high, above) = sorted((s, taken) for s, taken in tried.items() if taken is not None)[-2:]
    return above + (above - below) / (high - low) * (size - high)


def least_of_all(number: int, device: torch.device) -> int:
    """Over all processes, which all must call it."""
    if not dist.is_initialized():
        return number
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)


def free_bytes(device: torch.device, processes_here: int) -> int:
    """Of the GPU, or of this machine's memory the share of one of its training processes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, free_in_container()) // processes_here


def free_in_container() -> int:
    """What a container's own limit leaves (Linux, cgroup 2); without one, more than there is."""
    try:
        most, now = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # "max": no limit
        return 2**63
    return max(most - now, 0)


class Trial:
    """Takes a step of some images, but for the step itself."""

    def __init__(
        self, model: nn.Module, method: Method, accelerator: Accelerator, recipe: Recipe, *, masks: bool
    ) -> None:
        self.model, self.method, self.accelerator, self.recipe, self.masks = model, method, accelerator, recipe, masks
        self.share = recipe.train.global_batch // accelerator.num_processes
        # Where processes speak to each other inside a step, one that has no room leaves the others waiting.
        self.speaks = (
            accelerator.is_fsdp2
            or method.speaks_in_forward()
            or any(isinstance(module, _BatchNorm) for module in method.modules())
        )

    def peak(self, images: int) -> int | None:
        """Bytes of gradients, averages and the step, the most of all processes; None where memory was full on one."""
        device, taken = self.accelerator.device, -1
        try:
            taken = self.bytes_of_gpu(images) if device.type == "cuda" else self.bytes_counted(images)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
                raise
            if self.speaks and dist.is_initialized():
                raise UserError(
                    f"train.micro_batch = auto: {images} images at once do not fit; give a smaller number"
                ) from None
        drop_gradients(self.method)
        self.method.begin_step(BEGINNING)  # what a trial has kept must not be there before the next one
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if least_of_all(taken, device) < 0:
            return None
        return -least_of_all(-taken, device)

    def bytes_of_gpu(self, images: int) -> int:
        device = self.accelerator.device
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.step(images)
        taken = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        return taken

    def bytes_counted(self, images: int) -> int:
        with LiveBytes([*self.method.parameters(), *self.method.buffers()]) as live:
            self.step(images)
        return live.peak

    def step(self, images: int) -> None:
        device, recipe = self.accelerator.device, self.recipe
        learning = [local(p) for p in self.method.parameters() if p.requires_grad]
        averages = [torch.empty_like(tensor) for tensor in learning for _ in range(2)]
        ahead = [self.black(images, device) for _ in range(1 if device.type == "cuda" else AHEAD)]
        self.method.begin_step(BEGINNING)
        num_parts = self.share // images
        looked_at = self.look_ahead(images, num_parts) if self.method.looks_ahead() and num_parts > 1 else []
        for part in range(2):
            # The last part brings FSDP2's gradients together; DDP would do so in the room that it has.
            apart = part == 0 or not self.accelerator.is_fsdp2
            with self.accelerator.no_sync(self.model) if apart else contextlib.nullcontext():
                for batch in self.method.pieces(self.on_device(images)):
                    with precision(self.accelerator, recipe):
                        loss = self.model(batch, BEGINNING)["loss"]
                    loss.backward()
        self.method.gradients_done(BEGINNING)
        del averages, ahead, looked_at

    def look_ahead(self, images: int, num_parts: int) -> list[OnDevice]:
        """All parts of a step, which stay while the first ones have their turn; the method keeps what it saw."""
        parts = []
        with torch.no_grad(), precision(self.accelerator, self.recipe):
            for _ in range(num_parts):
                parts.append(self.on_device(images))
                self.model(parts[-1], BEGINNING, ahead=True)
        return parts

    def on_device(self, images: int) -> OnDevice:
        device = self.accelerator.device
        return cast(OnDevice, to_device(self.black(images, device), self.recipe, device))

    def black(self, images: int, device: torch.device) -> Batch:
        """A micro-batch as the loader gives it, coloured as chance will have it."""
        recipe, random = self.recipe, np.random.default_rng(0)
        kinds = list(recipe.views.groups().values())
        sides = [(kind.count, recipe.data.channels, kind.pixels) for kind in kinds]
        sides += [(kinds[0].count, 1, kinds[0].pixels)] if self.masks else []
        colours = [np.stack([draw(kind, (64, 64), random).colours for _ in range(images)]) for kind in kinds]
        multi_label = getattr(recipe.method, "multi_label", False)
        labels = (images, len(getattr(recipe.method, "classes", ()))) if multi_label else (images,)
        return {
            "crops": [torch.zeros(images, *side, side[-1], dtype=torch.uint8, device=device) for side in sides],
            "colours": [torch.from_numpy(of_kind) for of_kind in colours],
            "seed": torch.arange(images),
            "label": torch.zeros(labels, dtype=torch.uint8 if multi_label else torch.int64),
            "key": [""] * images,
        }


@contextlib.contextmanager
def leaving_no_trace(method: Method, device: torch.device) -> Iterator[None]:
    """The method and torch's generators of random numbers are afterwards what they were; gradients are none."""
    buffers = [(buffer, buffer.clone()) for buffer in method.buffers()]
    modes = [(module, module.training) for module in method.modules()]
    gpus = [device.index or 0] if device.type == "cuda" else []
    # What is compiled is compiled for the sizes that come: trials, of other sizes, go without.
    with torch.random.fork_rng(devices=gpus), torch.compiler.set_stance("force_eager"):
        method.train()
        yield
    drop_gradients(method)
    method.begin_step(BEGINNING)
    for module, training in modes:
        module.training = training
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def drop_gradients(method: Method) -> None:
    for parameter in method.parameters():
        parameter.grad = None
