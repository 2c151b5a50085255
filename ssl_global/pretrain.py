"""The main job: from images to a backbone that timm loads. The steps themselves are in training/loop.py.

command -> processes -> run folder -> data -> plan -> method -> resume -> train -> judge -> export -> summary
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.models.vision_transformer import Block

from ssl_global import command_line
from ssl_global.command_line import Command
from ssl_global.data.loader import Indexed, Loader, Samples, ahead_on_device
from ssl_global.data.order import Order, batches
from ssl_global.data.sample import built_in_sample
from ssl_global.data.source import Source, difference, open_source
from ssl_global.data.statistics import with_statistics
from ssl_global.data.stream import CANNOT_PROMISE, Stream
from ssl_global.errors import UserError, wrong
from ssl_global.evaluation.judge import Judge
from ssl_global.export import export
from ssl_global.methods.method import Method
from ssl_global.recipe import Recipe, as_json, refuse_changes
from ssl_global.training import checkpoint, report
from ssl_global.training.checkpoint import RunState
from ssl_global.training.guard import BadSamples
from ssl_global.training.log import MetricsLog
from ssl_global.training.loop import Run, train
from ssl_global.training.optim import build_optimizer
from ssl_global.training.plan import Plan, plan_run
from ssl_global.training.progress import Display


def main(argv: Sequence[str] | None = None) -> None:
    command_line.main(pretrain, argv)


def pretrain(command: Command, overridden: dict[str, object]) -> None:
    recipe = command.settings
    if command.print:
        print("\n".join(report.resolved(recipe, command.recipe, overridden)))
        return
    assert command.out is not None
    accelerator = start_processes(command)
    say = print if accelerator.is_main_process else (lambda *_: None)
    train_data, val_data = open_data(command, accelerator)  # first: a wrong path must not touch the run folder
    if isinstance(train_data, Source):
        statistics = with_statistics(recipe.data, train_data, processes_here=processes_here(accelerator))
        recipe = replace(recipe, data=statistics)
    found = open_run(command, recipe, train_data, accelerator)
    if found and (command.out / "summary.json").exists():
        say(f"{command.out} is finished: {command.out / 'export'} is its export; --fresh begins anew")
        return
    plan = plan_run(recipe, num_images=len(train_data), num_processes=accelerator.num_processes)
    lines = [*report.resolved(recipe, command.recipe, overridden), f"data   {train_data.describe()}"]
    say("\n".join([*lines, *report.arithmetic(plan, recipe), f"device {accelerator.device}"]))

    torch.manual_seed(recipe.seed)  # the same weights on every process
    method = recipe.method.build(recipe)
    prepare_blocks(method, recipe)
    bare_optimizer = build_optimizer(method, recipe.optim)
    model, optimizer = accelerator.prepare(method, bare_optimizer)
    state = RunState(data=fingerprint(train_data))
    if found:
        state = resume(found, method, bare_optimizer, accelerator)
    loader = load_from(state, plan, recipe, command, train_data, accelerator)
    say(f"loader {loader.describe()}\n")
    if isinstance(train_data, Stream):
        say(f"warning: {CANNOT_PROMISE}\n")
    judge = Judge(recipe, train_data if isinstance(train_data, Source) else None, val_data, accelerator.device)
    if state.step == 0:
        state.baselines = judge.baselines(method)
        say(report.baselines(state.baselines))

    def save() -> None:
        if accelerator.scaler is not None:
            state.scaler = accelerator.scaler.state_dict()
        if accelerator.is_main_process:
            checkpoint.save(out, method, bare_optimizer, state, recipe, keep=recipe.checkpoint.keep)
        accelerator.wait_for_everyone()

    out = command.out
    log = MetricsLog(accelerator, out, start_step=state.step, settings=as_json(recipe))
    bad_samples = BadSamples(out / "bad_samples.jsonl", len(train_data), recipe.data.max_bad_fraction)
    with (
        loader.serving() as served,
        Display(plan.num_steps, start_step=state.step, visible=accelerator.is_main_process) as display,
    ):
        run = Run(
            recipe=recipe, plan=plan, accelerator=accelerator, method=method, model=model, optimizer=optimizer,
            batches=ahead_on_device(served, accelerator.device), state=state, judge=judge, log=log, display=display,
            bad_samples=bad_samples, save=save,
        )  # fmt: skip
        stopped_by = train(run)
        if stopped_by is None:
            finish(run, out, command, train_data)
        else:
            display.say(f"stopped by {stopped_by} after step {state.step} of {plan.num_steps}, saved in {out}")
            display.say("the same command goes on from there")
    accelerator.end_training()


# -------------------------------------------------------------------------------------------------------- before a run


def start_processes(command: Command) -> Accelerator:
    """Accelerate finds the processes and the device from how it was launched."""
    precision = command.settings.train.precision
    on_cpu = command.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if precision == "fp16" and on_cpu:
        raise wrong("train.precision", precision, "needs a GPU; on a CPU use fp32, or bf16 where the processor has it")
    try:
        return Accelerator(
            cpu=command.device == "cpu",
            mixed_precision={"fp32": "no"}.get(precision, precision),
            log_with=list(command.log_with) or None,
            project_dir=str(command.out),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise UserError(str(error).replace("\n", " ")) from error


def open_run(
    command: Command, recipe: Recipe, data: Source | Stream, accelerator: Accelerator
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint in --out and its record, if there is one that goes on with this recipe and data."""
    out = command.out
    assert out is not None
    if accelerator.is_main_process:
        if command.fresh and out.exists():
            aside = out.with_name(f"{out.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
            out.rename(aside)
            print(f"--fresh: the run that was in {out} is now in {aside}")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}; a folder that can be written to would be right") from error
    accelerator.wait_for_everyone()
    found = checkpoint.newest(out)
    if found is None:
        if accelerator.is_main_process:
            write_json(out / "run.json", report.provenance())
            write_json(out / "data.json", data.parts() if isinstance(data, Source) else {})
        return None
    folder, record, damaged = found
    for line in damaged:
        print(f"warning: passed over a damaged checkpoint: {line}")
    refuse_changes(record["recipe"], json.loads(json.dumps(as_json(recipe))), where=f"--out {out}")
    refuse_other_data(record["state"]["data"], data, out)
    return folder, record


def refuse_other_data(begun_with: str, data: Source | Stream, out: Path) -> None:
    """A run goes on with the samples that it was begun with, or its place among them means nothing."""
    if fingerprint(data) == begun_with:
        return
    parts = out / "data.json"
    known = isinstance(data, Source) and parts.is_file()
    said = f": {difference(json.loads(parts.read_text()), data.parts())}" if known and isinstance(data, Source) else ""
    raise UserError(
        f"--data {data.path}: not the samples that the run in {out} was begun with{said} ({data.describe()} now); "
        "give the same data to go on, or --fresh to begin anew"
    )


def fingerprint(data: Source | Stream) -> str:
    return data.fingerprint if isinstance(data, Source) else f"stream {data.path}"


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
    return open_source(data), val_data


def prepare_blocks(method: Method, recipe: Recipe) -> None:
    if recipe.train.recompute_activations:
        for encoder in method.backbones().values():
            encoder.recompute_activations()
    if recipe.train.compile:
        for module in method.modules():
            if isinstance(module, Block):
                module.compile()


def resume(
    found: tuple[Path, dict[str, Any]], method: Method, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> RunState:
    folder, record = found
    state = checkpoint.load(folder, method, optimizer, record)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    if accelerator.is_main_process:
        print(f"going on from {folder}: step {state.step}, {state.images} images seen")
    return state


def load_from(
    state: RunState, plan: Plan, recipe: Recipe, command: Command, data: Source | Stream, accelerator: Accelerator
) -> Loader:
    """This process's share of every batch from the state's step on."""
    micro_batches = batches(
        start_step=state.step, num_steps=plan.num_steps, global_batch=plan.global_batch, micro_batch=plan.micro_batch,
        process=accelerator.process_index, num_processes=plan.num_processes,
    )  # fmt: skip
    if isinstance(data, Source):
        samples: Samples = Indexed(data)
        bounds = data.bounds
    else:
        samples = data.begin(process=accelerator.process_index, step=state.step)
        bounds = np.array([0, len(data)])
    return Loader(
        samples, Order.of(bounds, recipe), recipe, micro_batches, micro_batch=plan.micro_batch,
        processes_here=processes_here(accelerator), pin=accelerator.device.type == "cuda",
    )  # fmt: skip


def processes_here(accelerator: Accelerator) -> int:
    """Training processes on this machine: they share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


# --------------------------------------------------------------------------------------------------------- after a run


def finish(run: Run, out: Path, command: Command, data: Source | Stream) -> None:
    """Judge the backbone a last time, export it, and write the summary that says all is done."""
    judged = run.judge.evaluate(run.method, final=True)
    run.log.write(run.state.step, judged)
    for warning in run.judge.verdicts():
        run.display.warn(warning)
    if run.accelerator.is_main_process:
        state = run.state
        summary = {
            "recipe": command.recipe,
            "data": data.describe(),
            "steps": state.step,
            "images": state.images,
            "seconds": round(state.seconds, 1),
            "images_per_second": round(state.images / max(state.seconds, 1e-9), 1),
            "peak_memory": report.peak_memory_bytes(run.accelerator.device),
            "loss": state.last_loss,
            "knn": None,
            "knn_untrained": None,
            "knn_pixels": None,
            **judged,
            **state.baselines,
            "export": str(out / "export"),
        }
        what, encoder = checkpoint.choose(run.method.backbones(), None)
        export(encoder, out / "export", recipe=run.recipe, summary=summary, what=what)
        write_json(out / "summary.json", summary)
        for line in report.summary(summary):
            run.display.say(line)
    run.accelerator.wait_for_everyone()


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(file)


if __name__ == "__main__":
    main()
