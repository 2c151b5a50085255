"""Saving a run and coming back to it: ours against Accelerate's save_state and load_state, on the same file system.

    python -m benchmarks checkpoint --folder /where/runs/go --processes 1 8 --out checkpoint.json

What is saved is DINO's recipe with all of AdamW's moments. Beside each save run steps: a chain of small matrix products
and, with several processes, the one small reduction that ends a step. What they cost is told apart:

    stall    how long training stands still for a save
    steps    how much longer the steps take while a save is written in the background
    disk     ours is checksummed and flushed to the disk before it counts, Accelerate's is left in the system's memory
             with no checksum; so ours is also given without those two, and Accelerate's also with a flush

Both keep two checkpoints and delete older ones. Several processes are replicas of each other, over gloo, on the CPU;
training waits for the slowest of them, so every figure is the slowest's.
"""

import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import tyro
from accelerate.utils import ProjectConfiguration
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.staging import DefaultStager

from benchmarks.measure import Comparison, machine, report
from ssl_global.command_line import find
from ssl_global.training import checkpoint, engine, processes
from ssl_global.training.checkpoint import Layout, RunState, Writer
from ssl_global.training.optim import build_optimizer

MEGABYTE = 1e6
RESULTS = "results.json"  # what the processes have measured, for the one that began them
ROWS, WIDTH, PRODUCTS = 512, 384, 12  # of the matrix products of a step: milliseconds, with Python between them

# Where a save's time goes: what of ours, and of what it calls, is which part.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "copy aside": ((DefaultStager, "stage"),),
    "plan, together": ((dcp, "save"),),
    "serialise": ((safetensors.torch, "save"),),
    "write": ((checkpoint, "save_file"), (dcp.HuggingFaceStorageWriter, "write_data")),
    "flush": ((os, "fsync"),),
    "checksum": ((checkpoint, "checksum"),),
    "delete the oldest": ((checkpoint, "prune"),),
}
THEIRS, OURS, BACKGROUND = "accelerate", "ours, waited for", "ours, in the background"

Figures = dict[str, float]  # of one save, or of one coming back
Rounds = dict[str, list[Figures]]  # of each option


def main() -> None:
    tyro.cli(run, prog="python -m benchmarks checkpoint")


def run(
    rounds: int = 7,
    processes: tuple[int, ...] = (1, 2),
    small: bool = False,
    folder: Path | None = None,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Compares our checkpoints with Accelerate's.

    Args:
        rounds: Of each comparison.
        processes: Replicas, one number for each measurement.
        small: DINO's demo in place of its recipe (ViT-S/16, 65 536 prototypes, 0.7 GB).
        folder: To write to, about six checkpoints at once; nothing is left there. By default a temporary one.
        threads: Of each process's matrix products.
        out: File for all figures, JSON.
    """
    comparisons: list[Comparison] = []
    tables: list[Table] = []
    figures: dict[str, Any] = {}
    for count in processes:
        found = measured_by(count, rounds, small, threads, folder)
        name = "one process" if count == 1 else f"{count} processes"
        comparisons += compared(name, found)
        figures[name] = summary(found)
        tables += shown(name, figures[name])
    report(comparisons, {}, None)
    for table in tables:
        Console(width=120).print(table)
    if out:
        content = {
            "machine": machine(),
            "comparisons": {comparison.title: comparison.figures() for comparison in comparisons},
            "figures": figures,
        }
        out.write_text(json.dumps(content, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------- processes


def measured_by(count: int, rounds: int, small: bool, threads: int, folder: Path | None) -> dict[str, Rounds]:
    """What so many fresh processes measure. Whatever happens, they are gone and the folder is as it was."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="benchmark-") as place:
        arguments = (count, free_port(), Path(place), rounds, small, threads)
        begun = mp.spawn(work, arguments, nprocs=count, join=False)
        try:
            while not begun.join():
                pass
        finally:
            for process in begun.processes:
                process.kill()  # nothing, where it has ended
                process.join()
        found: dict[str, Rounds] = json.loads(Path(place, RESULTS).read_text())
    return found


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port


def work(rank: int, count: int, port: int, place: Path, rounds: int, small: bool, threads: int) -> None:
    """One of the processes."""
    torch.set_num_threads(threads)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it tells of every checkpoint that it deletes
    if count > 1:  # as torchrun has it
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count), "LOCAL_RANK": str(rank),
        }  # fmt: skip
    training = Training(small, place)
    with timed_parts(training.parts):
        found = measured(training, rounds)
    if rank == 0:
        Path(place, RESULTS).write_text(json.dumps(found))
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


def measured(training: "Training", rounds: int) -> dict[str, Rounds]:
    saves = {BACKGROUND: training.save_behind, OURS: training.save_and_wait, THEIRS: training.save_theirs}
    backs = {"ours": training.load_ours, THEIRS: training.load_theirs}
    found = {"saves": in_turn(saves, rounds), "from memory": in_turn(backs, rounds)}
    training.evicts = True
    return found | {"from the disk": in_turn(backs, rounds)}


def in_turn(options: dict[str, Callable[[], Figures]], rounds: int) -> Rounds:
    """As measure.compare, for options that do their own measuring: what they do first and last does not count.

    A round more than was asked for: the first one, where memory is new, is put aside under "first: ...".
    """
    names = list(options)
    found: Rounds = {f"first: {name}": [options[name]()] for name in names} | {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(options[name]())
    return found


class Training:
    """A run without data: method, optimizer, Accelerate and our writer, as ssl_global/pretrain.py has them."""

    def __init__(self, small: bool, place: Path) -> None:
        self.run, theirs = place / "ours", place / "theirs"
        self.accelerator, _ = processes.start(cpu=True, precision="fp32", trackers=[], run=str(theirs))
        _, _, build = find("dino:demo" if small else "dino:recipe")
        recipe = build()
        # Its own way to keep as many checkpoints as we do.
        self.accelerator.project_configuration = ProjectConfiguration(
            project_dir=str(theirs), automatic_checkpoint_naming=True, total_limit=recipe.checkpoint.keep
        )
        torch.manual_seed(0)  # the same weights on every process
        self.method = recipe.method.build(recipe)
        self.optimizer = build_optimizer(self.method, recipe.optim)
        self.fill_optimizer()
        self.kept = {name: tensor.clone() for name, tensor in self.some_tensors().items()}
        engine.prepare(self.accelerator, self.method, self.optimizer, recipe)
        count = self.accelerator.num_processes
        layout = Layout(count, engine.name(self.accelerator), micro_batch=1, accumulate=1, workers=0)
        self.writer = Writer(self.run, recipe, layout)
        self.state = RunState()
        self.x, self.weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH) / WIDTH**0.5
        self.quiet_steps = 4  # before and after a save in the background: half as many as there were beside the last
        self.parts = Parts()
        self.evicts = False  # whether the files are on the disk only when they are read

    def fill_optimizer(self) -> None:
        """One step with gradients everywhere: all moments are there, as after the epoch that freezes prototypes."""
        for parameter in self.method.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def some_tensors(self) -> dict[str, torch.Tensor]:
        """The method's largest weight and its first moment, to see that what is loaded is what was saved."""
        weight = max(self.optimizer.state, key=torch.Tensor.numel)
        return {"weight": weight.detach(), "moment": self.optimizer.state[weight]["exp_avg"]}

    # ------------------------------------------------------------------------------------------------------------ steps

    def steps(self, enough: Callable[[int], bool]) -> list[float]:
        """Takes steps until there are enough on all processes; the seconds of each."""
        seconds: list[float] = []
        over = False
        while not over:
            begin = time.perf_counter()
            x = self.x
            for _ in range(PRODUCTS):
                x = torch.relu(x @ self.weight)
            over = slowest(0.0 if enough(len(seconds) + 1) else 1.0) == 0.0
            seconds.append(time.perf_counter() - begin)
        return seconds

    # ------------------------------------------------------------------------------------------------------------ saves

    def save_behind(self) -> Figures:
        """As training does it."""
        quiet = self.steps(lambda taken: taken >= self.quiet_steps)
        stall = self.timed(lambda: self.save(wait=False))
        beside = self.steps(lambda _: self.writer.ready())
        self.writer.settle(must=True)
        quiet += self.steps(lambda taken: taken >= self.quiet_steps)
        self.quiet_steps = max(4, len(beside) // 2)
        return {
            "seconds": stall + sum(beside),
            "stall": stall,
            "lost": stall + max(0.0, sum(beside) - len(beside) * fmean(quiet)),  # by standing still, by slower steps
            "quiet step": median(quiet),
            "step": median(beside),
            "longest quiet step": max(quiet),
            "longest step": max(beside),
            "bytes": size(newest_in(self.run)),
        }

    def save_and_wait(self) -> Figures:
        """As at a run's end, or at a signal."""
        self.parts.clear()
        seconds = self.timed(lambda: self.save(wait=True))
        parts = self.parts.seconds | {"the rest": seconds - sum(self.parts.seconds.values())}
        unsafe = seconds - parts["flush"] - parts["checksum"]
        return {"seconds": seconds, "unsafe": unsafe, "bytes": size(newest_in(self.run))} | parts

    def save(self, *, wait: bool) -> None:
        self.state.step += 1
        self.writer.save(self.method, self.optimizer, self.state, wait=wait)

    def save_theirs(self) -> Figures:
        seconds = self.timed(lambda: self.accelerator.save_state(safe_serialization=True))
        saved = newest_in(Path(self.accelerator.project_dir))
        # What it left in memory is flushed to see what that adds; the option after it would pay for it otherwise.
        flushing = self.timed(lambda: checkpoint.on_main(lambda: flush(saved)))
        return {"seconds": seconds, "flushed": seconds + flushing, "bytes": size(saved)}

    # ---------------------------------------------------------------------------------------------------------- loading

    def load_ours(self) -> Figures:
        self.forget(newest_in(self.run))
        self.parts.clear()
        seconds = self.timed(self.newest_of_ours)
        self.see()
        return {"seconds": seconds, "unsafe": seconds - self.parts.seconds["checksum"]}

    def newest_of_ours(self) -> None:
        found = checkpoint.newest(self.run)
        assert found is not None
        folder, record, _ = found
        checkpoint.load(folder, self.method, self.optimizer, record)

    def load_theirs(self) -> Figures:
        self.forget(newest_in(Path(self.accelerator.project_dir)))
        seconds = self.timed(lambda: self.accelerator.load_state())
        self.see()
        return {"seconds": seconds}

    def forget(self, saved: Path) -> None:
        """As a process that has just begun: another weight, an empty optimizer."""
        self.some_tensors()["weight"].zero_()
        self.optimizer.state.clear()
        if self.evicts:
            checkpoint.on_main(lambda: evict(saved))

    def see(self) -> None:
        """That it came back."""
        assert all(torch.equal(self.kept[name], tensor) for name, tensor in self.some_tensors().items())

    def timed(self, job: Callable[[], object]) -> float:
        """All begin together, the slowest counts."""
        if dist.is_initialized():
            dist.barrier()
        begin = time.perf_counter()
        job()
        return slowest(time.perf_counter() - begin)


def slowest(value: float) -> float:
    """The largest of all processes."""
    largest = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


# --------------------------------------------------------------------------------------------------------------- parts


class Parts:
    """Seconds of each part of this process's last save, those of parts inside it left out.

    Two threads take part, but never at once: training waits, or does nothing of this.
    """

    def __init__(self) -> None:
        self.inside = [0.0]  # for each part under way: seconds of parts inside it
        self.clear()

    def clear(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            self.inside.append(0.0)
            try:
                return work(*arguments, **named)
            finally:
                seconds = time.perf_counter() - begin
                self.seconds[part] += seconds - self.inside.pop()
                self.inside[-1] += seconds

        return timed


@contextmanager
def timed_parts(parts: Parts) -> Iterator[None]:
    with ExitStack() as patches:
        for part, places in PARTS.items():
            for owner, name in places:
                patches.enter_context(patch.object(owner, name, parts.timed(part, getattr(owner, name))))
        yield


# --------------------------------------------------------------------------------------------------------------- files


def newest_in(run: Path) -> Path:
    """The checkpoint of the highest number: ours are called step-00000012, Accelerate's checkpoint_12."""
    return max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name.replace("_", "-").split("-")[1]))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        checkpoint.flush(path)


def evict(folder: Path) -> None:
    """Out of the system's memory, where the system can be asked to: they are on the disk already."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------------------- tables


def column(rounds: list[Figures], figure: str) -> list[float]:
    return [each[figure] for each in rounds]


def compared(name: str, found: dict[str, Rounds]) -> list[Comparison]:
    """The times, each beside Accelerate's of the same round."""
    saves = found["saves"]
    behind, waited, theirs = saves[BACKGROUND], saves[OURS], saves[THEIRS]
    stalls = {
        THEIRS: column(theirs, "seconds"),
        BACKGROUND: column(behind, "stall"),
        "the same, and what its steps lost": column(behind, "lost"),
        OURS: column(waited, "seconds"),
        "the same, without flush and checksum": column(waited, "unsafe"),
        f"{THEIRS}, then flushed": column(theirs, "flushed"),
    }
    steps = {
        "nothing is saved": column(behind, "quiet step"),
        "ours is written": column(behind, "step"),
        "nothing is saved, the longest": column(behind, "longest quiet step"),
        "ours is written, the longest": column(behind, "longest step"),
    }
    comparisons = [
        Comparison(f"{name}: training stands still for a save", THEIRS, stalls),
        Comparison(f"{name}: a step while", "nothing is saved", steps),
    ]
    for whence in ("from memory", "from the disk"):
        ours, theirs = found[whence]["ours"], found[whence][THEIRS]
        backs = {THEIRS: column(theirs, "seconds"), "ours": column(ours, "seconds")}
        if whence == "from memory":  # else it is the checksum that brings the files into memory
            backs["the same, without checksum"] = column(ours, "unsafe")
        comparisons.append(Comparison(f"{name}: coming back, {whence}", THEIRS, backs))
    return comparisons


def summary(found: dict[str, Rounds]) -> dict[str, Any]:
    """What is not a comparison of times, and all rounds."""
    saves = found["saves"]
    writes = {
        BACKGROUND: (saves[BACKGROUND], "seconds"),
        OURS: (saves[OURS], "seconds"),
        f"{OURS}, without flush and checksum": (saves[OURS], "unsafe"),
        THEIRS: (saves[THEIRS], "seconds"),
        f"{THEIRS}, then flushed": (saves[THEIRS], "flushed"),
    }
    slower = [each["step"] / each["quiet step"] for each in saves[BACKGROUND]]
    waited = saves[OURS]
    return {
        "first_stall_seconds": saves[f"first: {BACKGROUND}"][0]["stall"],
        "step_times_longer_beside_a_save": median(slower),
        "bytes": {option: median(column(rounds, "bytes")) for option, (rounds, _) in writes.items()},
        "megabytes_per_second": {
            option: median(each["bytes"] / MEGABYTE / each[figure] for each in rounds)
            for option, (rounds, figure) in writes.items()
        },
        "parts_seconds": {part: median(column(waited, part)) for part in (*PARTS, "the rest")},
        "parts_share": {part: median(each[part] / each["seconds"] for each in waited) for part in (*PARTS, "the rest")},
        "rounds": found,
    }


def shown(name: str, figures: dict[str, Any]) -> list[Table]:
    writing = Table("", "MB on disk", "MB/s", title=f"{name}: the write", box=SIMPLE_HEAD)
    for option, speed in figures["megabytes_per_second"].items():
        writing.add_row(option, f"{figures['bytes'][option] / MEGABYTE:,.1f}", f"{speed:,.0f}")
    stall = 1e3 * figures["first_stall_seconds"]
    longer = figures["step_times_longer_beside_a_save"]
    writing.caption = f"the first save stalls {stall:.0f} ms; a step takes {longer:.2f} times as long beside a save"
    parts = Table("", "ms", "share", title=f"{name}: where the time of ours goes, waited for", box=SIMPLE_HEAD)
    for part, seconds in figures["parts_seconds"].items():
        parts.add_row(part, f"{1e3 * seconds:.1f}", f"{figures['parts_share'][part]:.0%}")
    return [writing, parts]
