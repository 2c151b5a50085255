"""The loop: one step of training on one screen, in the order in which it happens. It knows no method by name.

next batch -> views on the device -> rates of the step -> method -> backward -> clip
-> every process agrees that loss and gradient are finite -> optimizer -> moving averages -> log, evaluate, save
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ssl_global.data.loader import to_device
from ssl_global.data.masks import Masks
from ssl_global.data.randomness import STEP, stream
from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import UserError
from ssl_global.methods.method import Batch, Method
from ssl_global.recipe import Recipe
from ssl_global.schedules import Progress
from ssl_global.training.checkpoint import RunState, Writer
from ssl_global.training.diagnose import where_not_finite
from ssl_global.training.engine import clip, is_sharded, precision, seen_backbone, whole_backbone
from ssl_global.training.guard import BadSamples, FiniteSteps, Interrupted, LossAlarm, StopSignal, agree, fallen
from ssl_global.training.log import MetricsLog
from ssl_global.training.memory import peak_bytes
from ssl_global.training.optim import set_rates, withhold
from ssl_global.training.plan import Plan
from ssl_global.training.processes import on_main_for_all
from ssl_global.training.progress import Display
from ssl_global.training.watch import Watch

if TYPE_CHECKING:
    from ssl_global.explain.gallery import Gallery


class Figures(Protocol):
    """Judges a method's backbone, as evaluation.judge.Judge does."""

    def baselines(self, encoder: Encoder) -> dict[str, float]: ...
    def evaluate(self, encoder: Encoder, *, final: bool) -> dict[str, float]: ...
    def verdicts(self) -> list[str]: ...
    def note(self, metrics: dict[str, float]) -> None: ...


Ending = Literal["done", "stopped", "diverged"]


@dataclass
class Run:
    """All that the loop works on, put together by ssl_global/pretrain.py."""

    recipe: Recipe
    plan: Plan
    accelerator: Accelerator
    method: Method  # the bare one: hooks, evaluation, checkpoints
    model: nn.Module  # the same, prepared by Accelerate: the only one whose forward is called in training
    optimizer: torch.optim.Optimizer
    bare_optimizer: torch.optim.Optimizer  # the same without Accelerate's wrapping, for checkpoints
    state: RunState
    judge: Figures
    log: MetricsLog
    display: Display
    bad_samples: BadSamples
    writer: Writer
    signals: StopSignal
    watch: Watch
    finite_steps: FiniteSteps
    masks: Masks | None = None  # of the training images
    gallery: "Gallery | None" = None  # what is looked at while it runs
    batches: Iterator[dict[str, Any]] = field(
        default_factory=lambda: iter(())
    )  # micro-batches from the state's step on

    def save(self, *, wait: bool) -> float:
        """All processes call it. Returns the seconds that training stood still."""
        if self.accelerator.scaler is not None:
            self.state.scaler = self.accelerator.scaler.state_dict()
        self.watch.at(self.state.step, "saving")
        return self.writer.save(self.method, self.bare_optimizer, self.state, wait=wait)


def train(run: Run) -> Ending:
    """Take all steps from `run.state.step` to the end, or until a signal comes or too many steps are not finite."""
    recipe, plan, state, accelerator, method = run.recipe, run.plan, run.state, run.accelerator, run.method
    meter, alarm, watch = Meter(plan.global_batch), LossAlarm(), run.watch
    stop = run.signals.agreed(accelerator.device)  # it may have come while the run was made ready
    run.model.train()
    while state.step < plan.num_steps and not stop:
        progress = Progress(step=state.step, num_steps=plan.num_steps, steps_per_epoch=plan.steps_per_epoch)

        # ---------------------------------------------------------------------------------------- one training step
        lr = set_rates(run.optimizer, recipe.optim, plan.global_batch, progress)
        seed_step(recipe.seed, state.step, accelerator.process_index)
        method.begin_step(progress)
        parts = parts_of_step(run, meter)
        if method.looks_ahead() and plan.accumulate > 1:
            parts = look_ahead(run, list(parts), progress)
        outputs = []
        for part, batch in enumerate(parts, start=1):
            pieces = method.pieces(batch)
            for number, piece in enumerate(pieces, start=1):
                last = (part, number) == (plan.accumulate, len(pieces))
                with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
                    with precision(accelerator, recipe):
                        output = run.model(piece, progress)
                    accelerator.backward(output["loss"] / plan.accumulate)
                outputs.append({name: value.detach() for name, value in output.items()})
        method.gradients_done(progress)
        withhold(run.optimizer, progress)
        gradient_norm = clip(accelerator, run.optimizer, recipe.optim.clip_norm)
        watch.at(state.step, "agreeing")
        figures = {name: torch.stack([o[name] for o in outputs]).sum() / plan.accumulate for name in outputs[0]}
        agreed = agree(
            figures["loss"], gradient_norm, stop=run.signals.received is not None, bad_samples=run.bad_samples.to_share
        )
        if agreed.finite:
            run.optimizer.step()
            method.after_step(progress)
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # fp16: an overflow lowers the loss's scale
        run.optimizer.zero_grad()
        state.step += 1
        state.images += plan.global_batch
        # ------------------------------------------------------------------------------------------------------------

        if run.finite_steps.too_many(agreed):
            with precision(accelerator, recipe):
                run.finite_steps.where = where_not_finite(run.model, method, batch, progress)
            run.display.warn(run.finite_steps.report(state.step))
            return "diverged"
        watch.begin()  # after the first step: it may compile, and its data may have been far away
        meter.step_done()
        run.display.step(state.step)
        if agreed.finite:
            state.last_loss = agreed.loss
            if warning := alarm.see(agreed.loss, state.step):
                run.display.warn(warning)
        else:
            run.display.warn(f"step {state.step}: loss or gradient is not finite; skipped on all processes")
        if agreed.bad_samples:
            for line in run.bad_samples.share():
                run.display.warn(f"cannot be read, replaced: {line}")
        if failed := run.writer.news():
            run.display.warn(f"a checkpoint could not be written: {failed}; the run goes on, the next one is tried")
        end, stop = state.step == plan.num_steps, agreed.stop
        if state.step % recipe.log.every == 0 or end or state.step == 1:
            metrics = mean_over_processes(accelerator, figures) | {"loss": agreed.loss, "lr": lr}
            metrics |= {"gradient_norm": float(gradient_norm), "epoch": progress.epoch} | meter.read()
            metrics["peak_memory_gb"] = peak_bytes(accelerator.device) / 1e9
            run.log.write(state.step, metrics)
            run.display.show(state.step, metrics)
            run.judge.note(metrics)
        if state.step % recipe.checkpoint.every == 0 and agreed.finite and not (end or stop):
            with meter.aside():
                state.seconds += meter.take_seconds()
                run.log.write(state.step, {"checkpoint_stall_seconds": run.save(wait=False)})
        if state.step % recipe.eval.every == 0 and not (end or stop):  # after the last step the run is judged anyway
            with meter.aside(), watch.aside("evaluating"):
                stop = judge(run)
        if run.gallery and run.gallery.due(state.step, end=end) and not stop:
            with meter.aside(), watch.aside("drawing"):
                look(run, run.gallery, progress, end=end)
    state.seconds += meter.take_seconds()
    if run.writer.last_step != state.step:
        run.save(wait=True)
    run.writer.settle(must=True)
    return "done" if state.step == plan.num_steps else "stopped"


def parts_of_step(run: Run, meter: "Meter") -> Iterator[Batch]:
    """The micro-batches of a step, on the device."""
    for _ in range(run.plan.accumulate):
        run.watch.at(run.state.step, "waiting for data")
        with meter.waiting():
            loaded = next(run.batches)
        run.watch.at(run.state.step, "forward and backward")
        run.bad_samples.see(loaded["bad"], loaded["lost"])
        yield cast(Batch, to_device(loaded, run.recipe, run.accelerator.device))


def look_ahead(run: Run, parts: list[Batch], progress: Progress) -> Iterator[Batch]:
    """The same parts, after the method has seen them all without gradient."""
    with torch.no_grad(), precision(run.accelerator, run.recipe):
        for batch in parts:
            run.model(batch, progress, ahead=True)
    return iter(parts)


def judge(run: Run) -> bool:
    """Evaluate the backbone by now. Returns whether a signal cut it short."""
    try:
        judged = run.judge.evaluate(whole_backbone(run.method, run.recipe, run.accelerator.device), final=False)
    except Interrupted:
        return True
    run.log.write(run.state.step, judged)
    run.display.show(run.state.step, judged)
    for warning in run.judge.verdicts():
        run.display.warn(warning)
    refuse_fall(run, judged)
    return False


def refuse_fall(run: Run, judged: dict[str, float]) -> None:
    """Raises UserError on all processes, with all saved, if weights that the run began from are being destroyed."""
    complaint = on_main_for_all(lambda: fallen(run.recipe, run.state, judged))
    if complaint is not None:
        if run.writer.last_step != run.state.step:
            run.save(wait=True)
        run.writer.settle(must=True)
        raise UserError(complaint)


def look(run: Run, gallery: "Gallery", progress: Progress, *, end: bool) -> None:
    """Look at the backbone by now. All processes bring its parts together, the first one looks, the others wait here:
    in the next step they would take it for one that hangs."""
    encoder = seen_backbone(run.method, run.recipe, run.accelerator.device)
    if run.accelerator.is_main_process:
        look_at(encoder, run, gallery, progress, end=end)
    run.accelerator.wait_for_everyone()


def look_at(encoder: Encoder, run: Run, gallery: "Gallery", progress: Progress, *, end: bool) -> None:
    trained = progress.epoch > run.recipe.optim.warmup_epochs
    method = None if is_sharded(run.method) else run.method
    looked = gallery.look(encoder, method, run.state.step, end=end, trained=trained)
    run.log.write(run.state.step, looked.figures)
    try:
        run.log.draw(run.state.step, looked.pictures)
    except OSError as error:
        looked.warnings.append(f"the pictures cannot be written: {error}")
    drawn = f", drew {', '.join(looked.pictures)}" if looked.pictures else ""
    run.display.say(f"step {run.state.step}: looked at {len(gallery.shown)} images in {looked.seconds:.1f} s{drawn}")
    for warning in looked.warnings:
        run.display.warn(warning)


def seed_step(seed: int, step: int, process: int) -> None:
    """What is random inside the model (drop path) is a function of the step and the process."""
    torch.manual_seed(int(stream(seed, STEP, step, process).integers(2**63)))


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
