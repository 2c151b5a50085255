"""How long the run is and who takes which part of a step: the recipe's wishes, brought to this machine."""

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
    """Raises UserError where the global batch cannot be shared out evenly, or a warm-up outlasts the run."""
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
        raise wrong(
            "train.global_batch", train.global_batch, f"cannot be shared by {num_processes} processes; {right} can"
        )
    share = train.global_batch // num_processes
    micro_batch = min(train.micro_batch or share, share)
    if share % micro_batch:
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        nearest = min(divisors, key=lambda n: (abs(n - micro_batch), n))
        raise wrong(
            "train.micro_batch", micro_batch, f"does not divide a process's share of the batch, {share}; {nearest} does"
        )
    if micro_batch % recipe.data.repeats:
        raise wrong(
            "data.repeats", recipe.data.repeats, f"must divide what a process takes at once, {micro_batch} images"
        )
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


def nearest_multiples(value: int, of: int) -> str:
    below = value // of * of
    return " or ".join(str(n) for n in (below, below + of) if n)
