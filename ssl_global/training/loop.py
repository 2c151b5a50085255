"""The loop: one step of training on one screen, in the order in which it happens. It knows no method by name.

next batch -> views on the device -> rates of the step -> method -> backward -> clip
-> every process agrees that loss and gradient are finite -> optimizer -> moving averages -> log, evaluate, save
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ssl_global.data.loader import to_device
from ssl_global.data.randomness import STEP, stream
from ssl_global.evaluation.judge import Judge
from ssl_global.methods.method import Method
from ssl_global.recipe import Recipe
from ssl_global.schedules import Progress
from ssl_global.training.checkpoint import RunState
from ssl_global.training.guard import BadSamples, FiniteSteps, StopSignal, agree
from ssl_global.training.log import MetricsLog
from ssl_global.training.optim import set_rates
from ssl_global.training.plan import Plan
from ssl_global.training.progress import Display


@dataclass
class Run:
    """All that the loop works on, put together by ssl_global/pretrain.py."""

    recipe: Recipe
    plan: Plan
    accelerator: Accelerator
    method: Method  # the bare one: hooks, evaluation, checkpoints
    model: nn.Module  # the same, prepared by Accelerate: the only one whose forward is called in training
    optimizer: torch.optim.Optimizer
    batches: Iterator[dict[str, Any]]  # micro-batch by micro-batch, from the state's step on
    state: RunState
    judge: Judge
    log: MetricsLog
    display: Display
    bad_samples: BadSamples
    save: Callable[[], None]  # all processes call it


def train(run: Run) -> str | None:
    """Take all steps from `run.state.step` to the end. Returns the signal that ended it early, if one did."""
    recipe, plan, state, accelerator, method = run.recipe, run.plan, run.state, run.accelerator, run.method
    finite_steps, signals, meter = FiniteSteps(recipe.train.max_bad_steps), StopSignal(), Meter(plan.global_batch)
    run.model.train()
    while state.step < plan.num_steps:
        progress = Progress(step=state.step, num_steps=plan.num_steps, steps_per_epoch=plan.steps_per_epoch)

        # ---------------------------------------------------------------------------------------- one training step
        lr = set_rates(run.optimizer, recipe.optim, plan.global_batch, progress)
        seed_step(recipe.seed, state.step, accelerator.process_index)
        method.begin_step(progress)
        outputs = []
        for part in range(plan.accumulate):
            with meter.waiting():
                loaded = next(run.batches)
            run.bad_samples.see(loaded["bad"], loaded["lost"])
            last = part == plan.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
                output = run.model(to_device(loaded, recipe.data, accelerator.device), progress)
                accelerator.backward(output["loss"] / plan.accumulate)
            outputs.append({name: value.detach() for name, value in output.items()})
        method.gradients_done(progress)
        gradient_norm = clip(accelerator, run.optimizer, recipe.optim.clip_norm)
        figures = {name: torch.stack([o[name] for o in outputs]).mean() for name in outputs[0]}
        agreed = agree(
            figures["loss"], gradient_norm, stop=signals.received is not None, bad_samples=run.bad_samples.to_share
        )
        if agreed.finite:
            run.optimizer.step()
            method.after_step(progress)
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # fp16: an overflow lowers the loss's scale
        run.optimizer.zero_grad()
        state.step += 1
        state.images += plan.global_batch
        finite_steps.see(agreed.finite, state.step)
        # ------------------------------------------------------------------------------------------------------------

        state.last_loss = agreed.loss if agreed.finite else state.last_loss
        meter.step_done()
        run.display.step(state.step)
        if not agreed.finite:
            run.display.warn(f"step {state.step}: loss or gradient is not finite; skipped on all processes")
        if agreed.bad_samples:
            for line in run.bad_samples.share():
                run.display.warn(f"cannot be read, replaced: {line}")
        end = state.step == plan.num_steps
        stop = agreed.stop and not end
        if state.step % recipe.log.every == 0 or end or state.step == 1:
            metrics = mean_over_processes(accelerator, figures) | {"loss": agreed.loss, "lr": lr}
            metrics |= {"gradient_norm": float(gradient_norm), "epoch": progress.epoch} | meter.read()
            run.log.write(state.step, metrics)
            run.display.show(state.step, metrics)
            run.judge.note(metrics)
        if state.step % recipe.eval.every == 0 and not end:  # after the last step the run is judged anyway
            with meter.aside():
                judged = run.judge.evaluate(method, final=False)
            run.log.write(state.step, judged)
            run.display.show(state.step, judged)
            for warning in run.judge.verdicts():
                run.display.warn(warning)
        if state.step % recipe.checkpoint.every == 0 or end or stop:
            with meter.aside():
                state.seconds += meter.take_seconds()
                run.save()
        if stop:
            break
    signals.restore()
    if state.step == plan.num_steps:
        return None
    return signals.received or "a signal on another process"


def seed_step(seed: int, step: int, process: int) -> None:
    """What is random inside the model (drop path) is a function of the step and the process."""
    torch.manual_seed(int(stream(seed, STEP, step, process).integers(2**63)))


def clip(accelerator: Accelerator, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> Tensor:
    """Scale the whole gradient down to `clip_norm`, if it is longer; returns its norm before that."""
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = accelerator.clip_grad_norm_(learning, float("inf") if clip_norm is None else clip_norm)
    assert norm is not None
    return norm


def mean_over_processes(accelerator: Accelerator, figures: dict[str, Tensor]) -> dict[str, float]:
    names = sorted(figures)
    means = accelerator.reduce(torch.stack([figures[name].float() for name in names]), reduction="mean")
    return dict(zip(names, means.tolist(), strict=True))


class Meter:
    """Images a second and the share of the time spent waiting for data, since they were last read."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.unsaved_seconds = 0.0
        self.reset()

    def reset(self) -> None:
        self.started, self.steps, self.waited = time.monotonic(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.waited += time.monotonic() - begin

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Evaluating and saving are not training: leave their time out."""
        begin = time.monotonic()
        yield
        self.started += time.monotonic() - begin

    def step_done(self) -> None:
        self.steps += 1

    def read(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        figures = {
            "images_per_second": self.steps * self.global_batch / seconds,
            "waiting_for_data": self.waited / seconds,
        }
        self.unsaved_seconds += seconds
        self.reset()
        return figures

    def take_seconds(self) -> float:
        """Training time since this was last asked."""
        self.read()
        seconds, self.unsaved_seconds = self.unsaved_seconds, 0.0
        return seconds
