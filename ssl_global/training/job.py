"""What both jobs have in common, from the command to the summary. The steps themselves are in training/loop.py.

command -> processes -> run folder -> data -> plan -> method -> resume -> train -> judge -> export -> summary
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from ssl_global.command_line import Command
from ssl_global.data.few import few_of_each_class
from ssl_global.data.loader import Indexed, Loader, Samples, ahead_on_device
from ssl_global.data.masks import Masks
from ssl_global.data.order import Order, batches
from ssl_global.data.sample import built_in_sample
from ssl_global.data.source import Source, open_source
from ssl_global.data.statistics import with_statistics
from ssl_global.data.stream import CANNOT_PROMISE, Stream
from ssl_global.data.workers import num_workers
from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import UserError, wrong
from ssl_global.methods.method import Method
from ssl_global.recipe import Recipe, as_json
from ssl_global.training import checkpoint, engine, processes, report
from ssl_global.training.checkpoint import Layout, RunState, Writer
from ssl_global.training.engine import whole_backbone
from ssl_global.training.fit import largest_that_fits
from ssl_global.training.folder import find_checkpoint, fingerprint, held, write_json
from ssl_global.training.guard import BadSamples, FiniteSteps, Interrupted, StopSignal
from ssl_global.training.log import MetricsLog
from ssl_global.training.loop import Figures, Run, refuse_fall, train
from ssl_global.training.memory import peak_bytes
from ssl_global.training.optim import build_optimizer
from ssl_global.training.plan import Plan, plan_run
from ssl_global.training.progress import Display
from ssl_global.training.watch import Watch

if TYPE_CHECKING:
    from ssl_global.explain.gallery import Gallery


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job does its own way.

    open       training images, and those to judge with
    masks      of the training images, once they are open; None: there are none
    settle     what the data says of the recipe (classes); refuses data that the job has no use for
    begin      brings weights from elsewhere into the method, before the first step; returns what it has to say
    judge      makes what judges: (recipe, train, val, device, between)
    export     writes a folder
    figures    that the summary always has, None where they are not known
    keep       writes what else the last evaluation found into the run's folder
    say_*      in words: baselines before the first step, a summary after the last
    """

    settle: Callable[[Recipe, Source | Stream, Source | None], Recipe]
    begin: Callable[[Method, Recipe], list[str]]
    judge: Callable[..., Figures]
    export: Callable[..., object]
    figures: tuple[str, ...]
    say_baselines: Callable[[dict[str, float]], str]
    say_summary: Callable[[dict[str, Any]], list[str]]
    open: Callable[[Command, Accelerator], tuple[Source | Stream, Source | None]] = field(
        default_factory=lambda: open_data
    )
    masks: Callable[[], Masks | None] = lambda: None
    keep: Callable[[Figures, Encoder, Path], None] = lambda judge, encoder, out: None


def do(job: Job, command: Command, overridden: dict[str, object]) -> None:
    recipe = command.settings
    if command.print:
        print("\n".join(report.resolved(recipe, command.recipe, overridden)))
        return
    out = command.out
    assert out is not None
    accelerator, store = start_processes(command)
    rank, world = accelerator.process_index, accelerator.num_processes
    with Watch(store, rank=rank, num_processes=world, timeout=command.timeout) as watch:
        train_data, val_data = job.open(command, accelerator)  # first: a wrong path must not touch the run folder
        if isinstance(train_data, Source):
            statistics = with_statistics(recipe.data, train_data, processes_here=processes.here(accelerator))
            recipe = replace(recipe, data=statistics)
        command = replace(command, settings=job.settle(recipe, train_data, val_data))
        with held(out, fresh=command.fresh and not processes.restarted()):
            learn(job, command, overridden, accelerator, watch, train_data, val_data)
    accelerator.end_training()


def learn(
    job: Job,
    command: Command,
    overridden: dict[str, object],
    accelerator: Accelerator,
    watch: Watch,
    train_data: Source | Stream,
    val_data: Source | None,
) -> None:
    """The run itself, from its first step or its newest checkpoint to its export, or to a signal."""
    out, recipe = command.out, command.settings
    assert out is not None
    say = print if accelerator.is_main_process else (lambda *_: None)
    masks = job.masks()
    found = find_checkpoint(out, recipe, train_data, masks, report.provenance())
    if found and (out / "summary.json").exists():
        say(f"{out} is finished: {out / 'export'} is its export; --fresh begins anew")
        return
    plan = plan_run(recipe, num_images=len(train_data), num_processes=accelerator.num_processes)
    lines = [*report.resolved(recipe, command.recipe, overridden), f"data   {train_data.describe()}"]
    to_be_found = recipe.train.micro_batch == "auto"
    lines += [] if to_be_found else report.arithmetic(plan, recipe)
    lines += [f"device {accelerator.device}, {engine.name(accelerator)}"]
    say("\n".join(lines))

    torch.manual_seed(recipe.seed)  # the same weights on every process
    method = recipe.method.build(recipe)
    if not found:
        for line in job.begin(method, recipe):
            say(line)
    method.fetch(recipe)
    bare_optimizer = build_optimizer(method, recipe.optim, waiting_epochs=recipe.encoder.waiting_epochs())
    model, optimizer = engine.prepare(accelerator, method, bare_optimizer, recipe)
    say(f"memory {engine.state_bytes(method) / 1e6:.1f} MB of weights and averages on each process")
    if to_be_found:
        size, how = largest_that_fits(model, method, accelerator, recipe, plan, masks=masks is not None)
        found_it = replace(recipe, train=replace(recipe.train, micro_batch=size))
        plan = plan_run(found_it, num_images=len(train_data), num_processes=accelerator.num_processes)
        say("\n".join([how, *report.arithmetic(plan, recipe)]))
    layout = layout_of(plan, recipe, accelerator)
    state = RunState(data=fingerprint(train_data, masks))
    if found:
        folder, record, damaged = found
        state = restore(folder, record, method, bare_optimizer, accelerator)
        say("\n".join(report.resumed(folder, record, damaged, layout, recipe)))
    if warning := engine.slower_than_float32(accelerator.device, recipe.train.precision):
        say(f"warning: {warning}\n")
    if isinstance(train_data, Stream):
        say(f"warning: {CANNOT_PROMISE}\n")
    with (
        StopSignal(command.grace) as signals,
        Display(plan.num_steps, start_step=state.step, visible=accelerator.is_main_process) as display,
    ):
        seen = train_data if isinstance(train_data, Source) else None
        run = Run(
            recipe=recipe, plan=plan, accelerator=accelerator, method=method, model=model, optimizer=optimizer,
            masks=masks, gallery=gallery_of(recipe, val_data or seen, accelerator.device),
            bare_optimizer=bare_optimizer, state=state,
            judge=job.judge(
                recipe, seen, val_data, accelerator.device, between=partial(give_way, signals, accelerator)
            ),
            log=MetricsLog(accelerator, out, start_step=state.step, settings=as_json(recipe)), display=display,
            bad_samples=BadSamples(out / "bad_samples.jsonl", len(train_data), recipe.data.max_bad_fraction),
            writer=Writer(out, recipe, layout, last_step=state.step if found else None), signals=signals, watch=watch,
            finite_steps=FiniteSteps(recipe.train.max_bad_steps),
        )  # fmt: skip
        ended = begin(job, run) and go(run, train_data, out) and finish(job, run, out, command, train_data)
        if not ended:
            display.say(f"stopped by {signals.said} after step {run.state.step} of {plan.num_steps}, saved in {out}")
            again = shlex.join(word for word in sys.argv if word != "--fresh")
            display.say(f"the same command goes on from there: {again}")


# -------------------------------------------------------------------------------------------------------- before a run


def start_processes(command: Command) -> tuple[Accelerator, dist.Store | None]:
    """Accelerate finds the processes and the device from how it was launched."""
    precision = command.settings.train.precision
    on_cpu = command.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if precision == "fp16" and on_cpu:
        raise wrong("train.precision", precision, "needs a GPU; on a CPU use fp32, or bf16 where the processor has it")
    return processes.start(
        cpu=command.device == "cpu", precision=precision, trackers=list(command.log_with), run=str(command.out)
    )


def open_data(command: Command, accelerator: Accelerator) -> tuple[Source | Stream, Source | None]:
    """Training images, and those to judge with."""
    data, val = command.data, command.val
    settings = command.settings
    if data is None:
        with accelerator.local_main_process_first():  # it writes the sample, the others find it
            data, sample_val = built_in_sample()
        val = val or sample_val
    val_data = open_source(val) if val else None
    if settings.data.reader == "stream":
        assert settings.data.epoch_images is not None
        return Stream(data, epoch_images=settings.data.epoch_images, seed=settings.seed), val_data
    source, few = open_source(data), settings.data.images_per_class
    return source if few is None else few_of_each_class(source, few, seed=settings.seed), val_data


def gallery_of(recipe: Recipe, source: Source | None, device: torch.device) -> "Gallery | None":
    """None where nothing is to be looked at, or nothing can be: a stream gives no image twice."""
    if source is None or (recipe.explain.every, recipe.explain.attention_every) == (None, None):
        return None
    from ssl_global.explain.gallery import Gallery  # it brings matplotlib, which takes its time

    return Gallery(recipe, source, device)


def layout_of(plan: Plan, recipe: Recipe, accelerator: Accelerator) -> Layout:
    return Layout(
        processes=plan.num_processes, engine=engine.name(accelerator), micro_batch=plan.micro_batch,
        accumulate=plan.accumulate, workers=num_workers(recipe.data, processes.here(accelerator)),
    )  # fmt: skip


def restore(
    folder: Path, record: dict[str, Any], method: Method, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> RunState:
    state = checkpoint.load(folder, method, optimizer, record)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    return state


# ---------------------------------------------------------------------------------------------------------------- a run


def give_way(signals: StopSignal, accelerator: Accelerator) -> None:
    """Between two batches of an evaluation. Raises Interrupted on all processes if a signal came to one."""
    if signals.agreed(accelerator.device):
        raise Interrupted


def begin(job: Job, run: Run) -> bool:
    """Judge the encoder before the first step, once. False if a signal came."""
    if run.state.step > 0:
        return True
    try:
        run.state.baselines = run.judge.baselines(whole_backbone(run.method, run.recipe, run.accelerator.device))
    except Interrupted:
        return False
    run.display.say(job.say_baselines(run.state.baselines))
    return True


def go(run: Run, data: Source | Stream, out: Path) -> bool:
    """Train to the end, from the last good checkpoint once more if need be. False if a signal ended it before."""
    while True:
        loader = load_from(run, data)
        run.display.say(f"loader {loader.describe()}\n")
        with loader.serving() as served:
            run.batches = ahead_on_device(served, run.accelerator.device)
            ending = train(run)
        if ending != "diverged":
            return ending == "done"
        roll_back(run, out)


def load_from(run: Run, data: Source | Stream) -> Loader:
    """This process's share of every batch from where the run is."""
    plan, state, accelerator = run.plan, run.state, run.accelerator
    micro_batches = batches(
        start_step=state.step + state.moved_past, num_steps=plan.num_steps + state.moved_past,
        global_batch=plan.global_batch, micro_batch=plan.micro_batch, process=accelerator.process_index,
        num_processes=plan.num_processes,
    )  # fmt: skip
    if isinstance(data, Source):
        samples: Samples = Indexed(data, run.masks)
        bounds = data.bounds
    else:
        samples = data.begin(process=accelerator.process_index, step=state.step + state.moved_past)
        bounds = np.array([0, len(data)])
    return Loader(
        samples, Order.of(bounds, run.recipe), run.recipe, micro_batches, micro_batch=plan.micro_batch,
        processes_here=processes.here(accelerator), pin=accelerator.device.type == "cuda", masks=run.masks is not None,
    )  # fmt: skip


def roll_back(run: Run, out: Path) -> None:
    """To the last checkpoint before the steps that were not finite, with the data behind them ahead. Once in a run.

    Raises UserError if that was tried before, or there is no such checkpoint.
    """
    steps, now = run.finite_steps, run.state
    run.writer.settle()
    found = checkpoint.newest(out, before=now.step - steps.bad_in_a_row)
    if now.moved_past or found is None:
        why = "it was rolled back before" if now.moved_past else "there is no checkpoint from before"
        raise UserError(f"{steps.report(now.step)}\n  the run ends: {why}")
    folder, record, _ = found
    run.state = restore(folder, record, run.method, run.bare_optimizer, run.accelerator)
    run.state.moved_past = now.step - run.state.step
    run.log.rewind(run.state.step)
    run.save(wait=True)
    checkpoint.on_main(lambda: checkpoint.drop_after(out, run.state.step))
    run.finite_steps = FiniteSteps(steps.max_bad_steps)
    run.display.warn(f"rolled back to step {run.state.step}; the data goes on behind step {now.step}. It is done once")


# --------------------------------------------------------------------------------------------------------- after a run


def finish(job: Job, run: Run, out: Path, command: Command, data: Source | Stream) -> bool:
    """Judge the backbone a last time, export it, write the summary that says all is done. False if a signal came."""
    with run.watch.aside("judging and exporting"):
        encoder = whole_backbone(run.method, run.recipe, run.accelerator.device)
        try:
            judged = run.judge.evaluate(encoder, final=True)
        except Interrupted:
            return False
        run.log.write(run.state.step, judged)
        for warning in run.judge.verdicts():
            run.display.warn(warning)
        refuse_fall(run, judged)
        if run.accelerator.is_main_process:
            summary = summarise(job, run, judged, out, command, data)
            what = next(iter(run.method.backbones()))
            job.export(encoder, out / "export", recipe=run.recipe, summary=summary, what=what)
            job.keep(run.judge, encoder, out)
            write_json(out / "summary.json", summary)
            for line in job.say_summary(summary):
                run.display.say(line)
        run.accelerator.wait_for_everyone()
    return True


def summarise(
    job: Job, run: Run, judged: dict[str, float], out: Path, command: Command, data: Source | Stream
) -> dict[str, Any]:
    state = run.state
    return {
        "recipe": command.recipe,
        "data": data.describe(),
        "steps": state.step,
        "images": state.images,
        "seconds": round(state.seconds, 1),
        "images_per_second": round(state.images / max(state.seconds, 1e-9), 1),
        "peak_memory": peak_bytes(run.accelerator.device),
        "loss": state.last_loss,
        **dict.fromkeys(job.figures),
        **judged,
        **state.baselines,
        "export": str(out / "export"),
    }
