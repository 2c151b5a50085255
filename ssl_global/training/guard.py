"""What all processes must agree on before a step counts: is it finite, has someone asked to stop, is the data readable.

One small reduction a step carries all of it. A step whose loss or gradient is not finite on any process is skipped by
all of them, before it touches weights, teacher, centre or the optimizer's averages. Too many in a row roll the run back
to its last good checkpoint, once, with other data before it; then they end it. What else goes wrong is said in words.
"""

import json
import math
import os
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_global.data.files import read_json_lines
from ssl_global.errors import UserError
from ssl_global.recipe import Recipe
from ssl_global.training.checkpoint import RunState
from ssl_global.training.watch import GO_ON, leave, tell

LOSSES_REPORTED = 8  # ours
SAME_SIGNAL_SECONDS = 2.0  # ours


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
        self.last_losses: deque[float] = deque(maxlen=LOSSES_REPORTED)
        self.where: list[str] = []  # the layers that were met first, process by process

    def too_many(self, agreed: Agreement) -> bool:
        """Whether this step makes it one too many."""
        self.last_losses.append(agreed.loss)
        self.bad_in_a_row = 0 if agreed.finite else self.bad_in_a_row + 1
        return self.bad_in_a_row > self.max_bad_steps

    def report(self, step: int) -> str:
        """What was wrong when `step` was done."""
        first = step - self.bad_in_a_row + 1
        return (
            f"train.max_bad_steps = {self.max_bad_steps}: loss or gradient was not finite in {self.bad_in_a_row} "
            f"steps in a row, {first} to {step}; none of them changed the weights. Lower optim.lr_per_256_images, "
            "raise optim.warmup_epochs, set optim.clip_norm, or use train.precision bf16 or fp32"
            f"\n  last losses: {', '.join(f'{loss:.4g}' for loss in self.last_losses)}"
            + "".join(f"\n  {line}" for line in self.where)
        )


def fallen(recipe: Recipe, state: RunState, judged: dict[str, float]) -> str | None:
    """What to say when a run from weights has lost more of them than it may; None if all is well."""
    for figure, name in (("knn", "k-NN"), ("rankme", "RankMe")):
        start, now = state.baselines.get(f"{figure}_start"), judged.get(figure)
        if start is not None and now is not None and not now >= start * (1 - recipe.eval.max_fall):
            return (
                f"eval.max_fall = {recipe.eval.max_fall:g}: {name} was {start:.3g} of the encoder that the run began "
                f"from and is {now:.3g} after step {state.step}, saved there: raise encoder.frozen_epochs (now "
                f"{recipe.encoder.waiting_epochs():g}) or optim.warmup_epochs ({recipe.optim.warmup_epochs:g}), lower "
                f"optim.lr_per_256_images ({recipe.optim.lr_per_256_images:g}), and begin anew with --fresh; or go on "
                "from there with a larger eval.max_fall"
            )
    return None


class LossAlarm:
    """Says when the loss has jumped and stays up.

    The rule is ours: the median of the last RECENT losses lies more than SPIKE times the usual scatter above the median
    of the NORMAL ones before them, and more than a twentieth of it. It is said once, and again only after all was well.
    """

    NORMAL, RECENT, SPIKE = 100, 5, 8.0

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.NORMAL + self.RECENT)
        self.said = False

    def see(self, loss: float, step: int) -> str | None:
        """One line, if there is something to say; `loss` is finite."""
        self.losses.append(loss)
        if len(self.losses) < self.losses.maxlen:  # type: ignore[operator]
            return None
        past, recent = list(self.losses)[: self.NORMAL], list(self.losses)[self.NORMAL :]
        usual, now = median(past), median(recent)
        scatter = median([abs(value - usual) for value in past])
        high = now - usual > max(self.SPIKE * scatter, abs(usual) / 20)
        said, self.said = self.said, high
        if high and not said:
            return (
                f"step {step}: the loss has jumped to {now:.4g}, it was {usual:.4g} (median of {self.NORMAL} steps): "
                "should it not come back, lower optim.lr_per_256_images or set optim.clip_norm"
            )
        return None


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop: the step under way is finished and the run saved.

    A second SIGTERM or SIGINT ends it as it is, unless it comes so soon that it is the first, handed on by a launcher.

    grace  seconds from the signal in which the run must have ended, or it ends by itself as it is; None: no limit
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, grace: float | None = None) -> None:
        self.grace = grace
        self.received: str | None = None
        self.received_at = 0.0
        self.timer: threading.Timer | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.receive) for number in self.NUMBERS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UserError):
            self.restore()  # else the process ends: a launcher's SIGTERM must not keep it from saying why
        if self.timer is not None:
            self.timer.cancel()

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number != signal.SIGUSR1 and time.monotonic() - self.received_at > SAME_SIGNAL_SECONDS:
                self.restore()
                os.kill(os.getpid(), number)
            return
        self.received, self.received_at = signal.Signals(number).name, time.monotonic()
        if self.grace is not None:
            self.timer = threading.Timer(self.grace, self.give_up)
            self.timer.daemon = True
            self.timer.start()

    def give_up(self) -> None:
        tell(f"--grace {self.grace:g}: not saved that soon after {self.received}; {GO_ON.lower()}")
        leave()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def said(self) -> str:
        return self.received or "a signal on another process"

    def agreed(self, device: torch.device) -> bool:
        """Whether a signal came to any process. All must call it."""
        if not dist.is_initialized():
            return self.received is not None
        came = torch.tensor(float(self.received is not None), device=device)
        dist.all_reduce(came)
        return bool(came > 0)


class Interrupted(Exception):  # noqa: N818
    """A signal came, somewhere, in something long that is not a step: an evaluation."""


class BadSamples:
    """Samples that could not be read, by name, over all processes: logged once each, and bounded."""

    def __init__(self, log: Path, num_samples: int, max_fraction: float) -> None:
        self.log = log
        self.num_samples = num_samples
        self.max_fraction = max_fraction
        lines = read_json_lines(log)  # of the run's earlier sessions
        self.known = {str(line["sample"]): str(line.get("reason")) for line in lines if "sample" in line}
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
