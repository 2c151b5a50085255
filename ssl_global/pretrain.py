"""The main job: from images to a backbone that timm loads. The steps themselves are in training/loop.py.

command -> processes -> run folder -> data -> plan -> method -> resume -> train -> judge -> export -> summary
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.models.vision_transformer import Block
from torch.utils.data import DataLoader

from ssl_global import command_line
from ssl_global.command_line import Command
from ssl_global.data.loader import loader, serving
from ssl_global.data.order import batches as batches_of
from ssl_global.data.sample import built_in_sample
from ssl_global.data.source import Source, open_source
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
        print("\n".join(report.resolved(command, overridden)))
        return
    assert command.out is not None
    accelerator = start_processes(command)
    say = print if accelerator.is_main_process else (lambda *_: None)
    train_data, val_data = open_data(command, accelerator)  # first: a wrong path must not touch the run folder
    found = open_run(command, accelerator)
    if found and (command.out / "summary.json").exists():
        say(f"{command.out} is finished: {command.out / 'export'} is its export; --fresh begins anew")
        return
    plan = plan_run(recipe, num_images=len(train_data), num_processes=accelerator.num_processes)
    lines = [*report.resolved(command, overridden), f"data   {train_data.describe()}", *report.arithmetic(plan, recipe)]
    say("\n".join([*lines, f"device {accelerator.device}", ""]))

    torch.manual_seed(recipe.seed)  # the same weights on every process
    method = recipe.method.build(recipe)
    prepare_blocks(method, recipe)
    bare_optimizer = build_optimizer(method, recipe.optim)
    model, optimizer = accelerator.prepare(method, bare_optimizer)
    state = RunState(data=train_data.fingerprint)
    if found:
        state = resume(command.out, found, method, bare_optimizer, accelerator, train_data)
    judge = Judge(recipe, train_data, val_data, accelerator.device)
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
        serving(load_from(state, plan, recipe, train_data, accelerator)) as batches,
        Display(plan.num_steps, start_step=state.step, visible=accelerator.is_main_process) as display,
    ):
        run = Run(
            recipe=recipe, plan=plan, accelerator=accelerator, method=method, model=model, optimizer=optimizer,
            batches=batches, state=state, judge=judge, log=log, display=display, bad_samples=bad_samples, save=save,
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


def open_run(command: Command, accelerator: Accelerator) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint in --out and its record, if there is one that goes on with this recipe."""
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
        return None
    folder, record, damaged = found
    for line in damaged:
        print(f"warning: passed over a damaged checkpoint: {line}")
    refuse_changes(record["recipe"], json.loads(json.dumps(as_json(command.settings))), where=f"--out {out}")
    return folder, record


def open_data(command: Command, accelerator: Accelerator) -> tuple[Source, Source | None]:
    """Training images, and those to judge with."""
    data, val = command.data, command.val
    if data is None:
        with accelerator.main_process_first():  # it writes the sample, the others find it
            data, sample_val = built_in_sample()
        val = val or sample_val
    return open_source(data), open_source(val) if val else None


def prepare_blocks(method: Method, recipe: Recipe) -> None:
    if recipe.train.recompute_activations:
        for encoder in method.backbones().values():
            encoder.recompute_activations()
    if recipe.train.compile:
        for module in method.modules():
            if isinstance(module, Block):
                module.compile()


def resume(
    out: Path,
    found: tuple[Path, dict[str, Any]],
    method: Method,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    data: Source,
) -> RunState:
    folder, record = found
    if record["state"]["data"] != data.fingerprint:
        raise UserError(
            f"--data {data.path}: not the samples that the run in {out} was begun with ({data.describe()} now); "
            "give the same data to go on, or --fresh to begin anew"
        )
    state = checkpoint.load(folder, method, optimizer, record)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    if accelerator.is_main_process:
        print(f"going on from {folder}: step {state.step}, {state.images} images seen")
    return state


def load_from(
    state: RunState, plan: Plan, recipe: Recipe, data: Source, accelerator: Accelerator
) -> DataLoader[dict[str, Any]]:
    positions = batches_of(
        start_step=state.step, num_steps=plan.num_steps, global_batch=plan.global_batch, micro_batch=plan.micro_batch,
        process=accelerator.process_index, num_processes=plan.num_processes,
    )  # fmt: skip
    here = max(1, torch.cuda.device_count()) if accelerator.device.type == "cuda" else plan.num_processes
    pin = accelerator.device.type == "cuda"
    return loader(data, recipe, positions, processes_here=min(here, plan.num_processes), pin=pin)


# --------------------------------------------------------------------------------------------------------- after a run


def finish(run: Run, out: Path, command: Command, data: Source) -> None:
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
