"""Training steps on one process, on two, and on more: images a second, efficiency, and what the processes' talk costs.

    python -m benchmarks scaling --out scaling.json
    python -m benchmarks scaling --device cuda --processes 1 2 4 8 --images 64

Weak scaling: each process takes the same number of images, so N of them at an efficiency of 1 do N times as many a
second. Processes are started as torchrun does, on CPUs with a thread each and gloo, on GPUs with nccl; the engine is
prepared as for a run (training/engine.py), and a step is the loop's: forward, backward, clipping, AdamW, moving
averages, on synthetic views. FSDP2 needs GPUs, two or more.

Communication is what a step takes longer than the same step of a method that belongs to no engine, done by all
processes at the same time, turn by turn: exchanged gradients and weights as far as work does not hide them, and the
engine's own bookkeeping.
"""

import json
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from accelerate import Accelerator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.measure import Comparison, report
from ssl_global.command_line import find
from ssl_global.methods.method import Batch, Method
from ssl_global.planning.dry_run import empty_batch
from ssl_global.recipe import Recipe
from ssl_global.schedules import Progress
from ssl_global.training import engine, processes
from ssl_global.training.optim import build_optimizer

RECIPES = {"cpu": ("dino:demo", "mae:demo"), "cuda": ("dino", "mae")}
IMAGES = {"cpu": 32, "cuda": 64}
# As launch/fsdp2.yaml has it, in the words in which accelerate's launcher hands it on.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}  # fmt: skip
LATER = Progress(step=50, num_steps=100, steps_per_epoch=10)

Seconds = dict[str, list[float]]  # of steps: "engine", and "alone" without one


@dataclass(frozen=True)
class Settings:
    recipes: tuple[str, ...] = ()  # by default the demos on a CPU, the papers' on GPUs
    processes: tuple[int, ...] = (1, 2)
    images: int | None = None  # of a step, on each process; by default 32 on a CPU, 64 on a GPU
    steps: int = 10  # that are timed, in each round
    rounds: int = 3
    device: Literal["cpu", "cuda"] = "cpu"
    out: Path | None = None


@dataclass
class Case:
    """A recipe on so many processes."""

    recipe: str
    engine: str
    num_processes: int
    rounds: list[Seconds] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.engine if self.num_processes == 1 else f"{self.engine}, {self.num_processes} processes"

    def seconds_an_image(self, images: int) -> list[float]:
        """Of all processes together, round by round."""
        return [median(seconds["engine"]) / (images * self.num_processes) for seconds in self.rounds]

    def communication(self) -> float:
        """Share of a step."""
        return median(1 - median(seconds["alone"]) / median(seconds["engine"]) for seconds in self.rounds)


def main() -> None:
    settings = tyro.cli(Settings)
    images = settings.images or IMAGES[settings.device]
    cases = cases_of(settings)
    for turn in range(settings.rounds):
        at = turn % len(cases)
        for case in cases[at:] + cases[:at]:
            case.rounds.append(launched(case, settings, images))
    comparisons = compared(cases, images)
    figures = {comparison.title: efficiencies(comparison, cases) for comparison in comparisons}
    report(comparisons, {}, settings.out)
    for title, of_recipe in figures.items():
        Console(width=120).print(table(title, of_recipe))
    if settings.out:
        settings.out.write_text(
            json.dumps(json.loads(settings.out.read_text()) | {"figures": figures}, indent=2) + "\n"
        )


def cases_of(settings: Settings) -> list[Case]:
    engines = ("DDP", "FSDP2") if settings.device == "cuda" else ("DDP",)
    return [
        Case(recipe, engine_name if number > 1 else "one process", number)
        for recipe in settings.recipes or RECIPES[settings.device]
        for number in sorted({1, *settings.processes})
        for engine_name in (engines if number > 1 else engines[:1])
    ]


def launched(case: Case, settings: Settings, images: int) -> Seconds:
    """What the first process measured."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=case.num_processes, max_restarts=0, run_id=str(uuid.uuid4()),
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
    )  # fmt: skip
    found: Seconds = elastic_launch(config, measured)(
        case.recipe, case.engine, settings.device, images, settings.steps
    )[0]
    return found


def compared(cases: list[Case], images: int) -> list[Comparison]:
    found = []
    for recipe in dict.fromkeys(case.recipe for case in cases):
        seconds = {case.name: case.seconds_an_image(images) for case in cases if case.recipe == recipe}
        found.append(Comparison(f"{recipe}, {images} images on each process, an image", "one process", seconds))
    return found


def efficiencies(comparison: Comparison, cases: list[Case]) -> dict[str, dict[str, float]]:
    found = {}
    for case in cases:
        if comparison.title.startswith(f"{case.recipe}, "):
            efficiency = comparison.ratio(case.name) / case.num_processes
            found[case.name] = {"efficiency": efficiency, "communication": case.communication()}
    return found


def table(title: str, figures: dict[str, dict[str, float]]) -> Table:
    shown = Table("", "efficiency", "communication", title=title, box=SIMPLE_HEAD)
    for name, figure in figures.items():
        shown.add_row(name, *[f"{share:.0%}" for share in figure.values()])
    return shown


# ------------------------------------------------------------------------------------------------- in each process


def measured(recipe_name: str, engine_name: str, device: str, images: int, num_steps: int) -> Seconds:
    if device == "cpu":
        torch.set_num_threads(1)
    if engine_name == "FSDP2":
        os.environ.update(FSDP2)
    _, _, build = find(recipe_name)
    recipe: Recipe = build()
    accelerator, _ = processes.start(cpu=device == "cpu", precision=recipe.train.precision, trackers=[], run=".")
    alone, with_engine = Stepper(recipe, accelerator, images), Stepper(recipe, accelerator, images)
    alone.method.to(accelerator.device)
    with_engine.prepare()
    options = {"alone": alone, "engine": with_engine}
    seconds: Seconds = {name: [] for name in options}
    for turn in range(num_steps + 1):
        for name, step in options.items():
            accelerator.wait_for_everyone()
            begin = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    if dist.is_initialized():
        dist.destroy_process_group()
    return seconds


class Stepper:
    """Takes a recipe's steps on views of noise."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, images: int) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.accelerator = recipe, accelerator
        self.method: Method = recipe.method.build(recipe)
        self.model: nn.Module = self.method
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.method, recipe.optim)
        self.batch = noise(recipe, images, accelerator.device)
        self.method.train()

    def prepare(self) -> None:
        self.model, self.optimizer = engine.prepare(self.accelerator, self.method, self.optimizer, self.recipe)

    def __call__(self) -> None:
        precision, device = self.recipe.train.precision, self.accelerator.device.type
        self.method.begin_step(LATER)
        # bf16 for fp16 too, which takes as long, and no scaling.
        with torch.autocast(device, torch.bfloat16, enabled=precision != "fp32"):
            loss = self.model(self.batch, LATER)["loss"]
        loss.backward()
        self.method.gradients_done(LATER)
        engine.clip(self.accelerator, self.optimizer, self.recipe.optim.clip_norm)
        self.optimizer.step()
        self.method.after_step(LATER)
        self.optimizer.zero_grad()


def noise(recipe: Recipe, images: int, device: torch.device) -> Batch:
    batch = empty_batch(recipe, images)
    batch["views"] = [torch.randn_like(view, device=device) for view in batch["views"]]
    batch["seed"], batch["label"] = torch.arange(images, device=device), batch["label"].to(device)
    return batch


if __name__ == "__main__":
    main()
