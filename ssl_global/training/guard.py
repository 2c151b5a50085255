"""What all processes must agree on before a step counts: is it finite, has someone asked to stop, is the data readable.

One small reduction a step carries all of it. A step whose loss or gradient is not finite on any process is skipped by
all of them, before it touches weights, teacher or centre.
"""

import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_global.errors import UserError


@dataclass(frozen=True)
class Agreement:
    """The same on every process."""

    loss: float  # mean over the global batch
    finite: bool  # loss and gradient, everywhere
    stop: bool  # a signal came, somewhere
    bad_samples: bool  # someone met a sample that cannot be read


def agree(loss: Tensor, gradient_norm: Tensor, *, stop: bool, bad_samples: bool) -> Agreement:
    """Share one process's view of the step with all others. All must call it."""
    finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
    flags = torch.tensor([float(stop), float(bad_samples), 1.0], device=loss.device)
    shared = torch.cat([torch.where(finite, loss, 0.0).view(1), (~finite).float().view(1), flags])
    if dist.is_initialized():
        dist.all_reduce(shared)
    loss_sum, not_finite, stops, bad, processes = shared.tolist()
    return Agreement(
        loss=loss_sum / processes if not not_finite else math.nan,
        finite=not_finite == 0,
        stop=stops > 0,
        bad_samples=bad > 0,
    )


class FiniteSteps:
    """Counts steps in a row that were skipped; `max_bad_steps` is how many may be."""

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps = max_bad_steps
        self.bad_in_a_row = 0

    def see(self, finite: bool, step: int) -> None:
        """Raises UserError when one too many steps in a row was not finite."""
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if self.bad_in_a_row > self.max_bad_steps:
            first = step - self.bad_in_a_row + 1
            raise UserError(
                f"train.max_bad_steps = {self.max_bad_steps}: loss or gradient was not finite in {self.bad_in_a_row} "
                f"steps in a row, {first} to {step}; none of them changed the weights. Lower optim.lr_per_256_images, "
                "raise optim.warmup_epochs, set optim.clip_norm, or use train.precision bf16 or fp32"
            )


class StopSignal:
    """SIGTERM and SIGINT ask for a stop: the step under way is finished and the run saved. A second one kills."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class BadSamples:
    """Samples that could not be read, by name, over all processes: logged once each, and bounded."""

    def __init__(self, log: Path, num_samples: int, max_fraction: float) -> None:
        self.log = log
        self.num_samples = num_samples
        self.max_fraction = max_fraction
        lines = log.read_text().splitlines() if log.exists() else []  # of the run's earlier sessions
        self.known = {line["sample"]: line["reason"] for line in map(json.loads, lines)}
        self.new: dict[str, str] = {}
        self.lost: list[str] = []

    def see(self, bad: list[tuple[str, str]], lost: list[str]) -> None:
        """What this process met in a batch; `lost` says why samples found no replacement."""
        self.new |= {key: reason for key, reason in bad if key not in self.known}
        self.lost += lost

    @property
    def to_share(self) -> bool:
        """Whether this process has something that the others do not know."""
        return bool(self.new or self.lost)

    def share(self) -> list[str]:
        """Tell all processes, which all must call it; returns what is newly known, as lines.

        Raises UserError when there are too many, or one that nothing can replace.
        """
        everywhere: list[tuple[dict[str, str], list[str]]] = [(self.new, self.lost)]
        if dist.is_initialized():
            everywhere = [({}, [])] * dist.get_world_size()
            dist.all_gather_object(everywhere, (self.new, self.lost))
        found = {key: reason for new, _ in everywhere for key, reason in new.items() if key not in self.known}
        self.known |= found
        self.new = {}
        if found and (not dist.is_initialized() or dist.get_rank() == 0):
            with self.log.open("a") as file:
                file.writelines(json.dumps({"sample": key, "reason": reason}) + "\n" for key, reason in found.items())
        if lost := list(dict.fromkeys(why for _, reasons in everywhere for why in reasons)):
            more = f"\n  and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise UserError("the data cannot be read: " + "\n  ".join(lost[:3]) + more)
        if len(self.known) > self.max_fraction * self.num_samples:
            listed = "".join(f"\n  {key}: {reason}" for key, reason in self.known.items())
            raise UserError(
                f"data.max_bad_fraction = {self.max_fraction}: {len(self.known)} of {self.num_samples} samples cannot "
                f"be read; mend or remove them, or allow {len(self.known) / self.num_samples:.3g} or more:{listed}"
            )
        return [f"{key}: {reason}" for key, reason in found.items()]
