"""How long the run is and who takes which part of a step: the recipe's wishes, brought to this machine."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ssl_global.errors import wrong
from ssl_global.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Plan:
    num_images: int  # in the data
    epoch_images: int  # of an epoch: all, or those of its whole steps
    num_steps: int
    steps_per_epoch: float
    global_batch: int
    micro_batch: int
    accumulate: int  # micro-batches of one process in one step
    num_processes: int


def plan_run(recipe: Recipe, *, num_images: int, num_processes: int) -> Plan:
    """How it is shared out; `micro_batch auto` is as large as can be here, until training/fit.py has tried it.

    The global batch is the recipe's, so processes x parts x images at once is solved for the processes there are.

    Raises UserError where the global batch cannot be shared out evenly, or a warm-up outlasts the run.
    """
    train = recipe.train
    if train.global_batch % recipe.data.repeats:
        raise wrong("data.repeats", recipe.data.repeats, f"must divide train.global_batch = {train.global_batch}")
    drop = recipe.data.last_batch == "drop" and recipe.data.reader == "indexed"
    left_out = num_images % (train.global_batch // recipe.data.repeats) if drop else 0
    if left_out == num_images:
        raise wrong("data.last_batch", "drop", f"{num_images} images are less than a step; carry would be right")
    epoch_images = num_images - left_out
    steps_per_epoch = epoch_images / train.global_batch
    num_steps = train.steps or max(round((train.epochs or 0) * steps_per_epoch), 1)
    if train.steps is not None:
        recipe.check_durations(num_steps / steps_per_epoch)
    if train.global_batch % num_processes:
        right = nearest_multiples(train.global_batch, num_processes)
        others = nearest_divisors(train.global_batch, num_processes)
        raise wrong(
            "train.global_batch", train.global_batch,
            f"cannot be shared by {num_processes} processes; {right} can, or {others} processes can share it",
        )  # fmt: skip
    share = train.global_batch // num_processes
    together = images_together(recipe)
    at_most = train.micro_batch if isinstance(train.micro_batch, int) else share
    micro_batch = next(parts_of(share, at_most=at_most, multiple_of=together), None)
    if micro_batch is None:
        repeats = recipe.data.repeats
        raise wrong(
            *(("data.repeats", repeats) if repeats > 1 else ("train.global_batch", train.global_batch)),
            f"a process's share of the batch is {share} images, at most {at_most} of them at once: "
            f"none of its parts is a multiple of {together}, and so many images belong together",
        )  # fmt: skip
    return Plan(
        num_images=num_images,
        epoch_images=epoch_images,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        global_batch=train.global_batch,
        micro_batch=micro_batch,
        accumulate=share // micro_batch,
        num_processes=num_processes,
    )


def parts_of(share: int, *, at_most: int, multiple_of: int) -> Iterator[int]:
    """Images at once that a share can be cut into evenly, the most first."""
    return (n for n in range(min(at_most, share), 0, -1) if share % n == 0 and n % multiple_of == 0)


def images_together(recipe: Recipe) -> int:
    """A process takes multiples of so many at once."""
    return math.lcm(recipe.data.repeats, recipe.method.images_together())


def nearest_multiples(value: int, of: int) -> str:
    below = value // of * of
    return " or ".join(str(n) for n in (below, below + of) if n)


def nearest_divisors(value: int, near: int) -> str:
    """Those next to `near` on both sides."""
    below = next(n for n in range(near, 0, -1) if value % n == 0)
    above = next((n for n in range(near, value + 1) if value % n == 0), None)
    return " or ".join(str(n) for n in (below, above) if n)
