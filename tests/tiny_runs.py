"""Helpers of the tests of runs: a tiny run's command line, processes that do it, and what it leaves."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
import warm
from recipes_under_test import load_recipe

from ssl_global.data.files import read_json_lines
from ssl_global.encoders.vit import Vit, VitConfig
from ssl_global.export import export
from ssl_global.training.sharded import Sharded

ROOT = warm.ROOT

# A dozen steps take a second: 16-pixel views, small encoders, 64 prototypes. Half an epoch of the 24 images is a step.
VIT = ["--encoder.width=32", "--encoder.heads=2", "--encoder.depth=2"]
SWIN = [
    "--encoder.patch=2", "--encoder.width=8", "--encoder.depths", "1", "1", "2", "--encoder.heads", "1", "2", "2",
    "--encoder.window=4", "--encoder.tokens=2",
]  # fmt: skip
DINO = [
    "--views.globals.pixels=16", "--views.locals.pixels=8", "--views.locals.count=2", "--method.prototypes=64",
    "--method.head-hidden=32", "--method.head-bottleneck=16", "--method.freeze-prototypes-epochs=1",
]  # fmt: skip
MAE = ["--views.globals.pixels=16", "--method.decoder-width=32", "--method.decoder-depth=1"]
DINOV2 = [
    *DINO, "--method.koleo-images=2", "--method.centring=sinkhorn", "--method.separate-heads",
    "--method.layer-decay=0.8", "--method.gram-weight=2", "--method.gram-every-steps=3",
]  # fmt: skip
TINY = {
    "dino": [*DINO, *VIT, "--encoder.patch=8"],
    "mae": [*MAE, *VIT, "--encoder.patch=4"],
    "dino_swin": [*DINO, *SWIN, "--method.region-loss"],
    "dinov2": [*DINOV2, *VIT, "--encoder.patch=4"],
    "mae_swin": [*MAE, *SWIN, "--method.secondary-ratio=0.25"],
}
# Methods that test_distill_runs.py and test_consistency_runs.py walk, and no other.
FURTHER = {
    "consistency": [
        *DINO[:3],
        *VIT,
        "--encoder.patch=8",
        "--method.projector-hidden=32",
        "--method.projector-width=16",
    ],
    "distill": [*DINO[:-1], *VIT, "--encoder.patch=8"],
}
EVERY = [
    "--train.global-batch=12", "--train.epochs=None", "--train.steps=8", "--optim.warmup-epochs=1", "--log.every=1",
    "--eval.every=100", "--checkpoint.every=3", "--data.workers=0", "--device=cpu",
]  # fmt: skip


def arguments(method: str, data: Path | str, out: Path, *more: str) -> list[str]:
    return [
        f"--recipe={method}:demo",
        f"--data={data}",
        f"--out={out}",
        *EVERY,
        *(TINY | FURTHER)[method],
        *more,
        "--log-with",
    ]


def tiny_teacher(folder: Path, *, seed: int = 0) -> Path:
    """An export to distil from: a ViT of four patches a side at 16 pixels, of another width than the tiny students."""
    torch.manual_seed(seed)
    config = VitConfig(name="vit_tiny_patch16_224", patch=4, width=48, depth=1, heads=3)
    recipe = load_recipe("dino", "demo")
    return export(Vit(config, pixels=16, channels=3), folder, recipe=recipe, summary={}, what="teacher")


def start(words, *, processes=2, max_restarts=0, script="pretrain.py"):
    """Real processes over gloo, watched by torchrun's agent; they begin where torch is imported already."""
    return warm.torchrun(words, processes=processes, max_restarts=max_restarts, script=ROOT / script)


def torchrun(words, *, processes=2, script="pretrain.py"):
    """The same by torchrun itself, in a fresh Python each: slower by fifteen seconds of a core."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*command, str(ROOT / script), *words],
        env=os.environ | warm.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, *, seconds=120):
    """Its code, and what it said on both channels."""
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        out, error = process.communicate()
        raise AssertionError(f"not at an end after {seconds} s:\n{out[-1500:]}\n{error[-3000:]}") from None
    return process.returncode, out, error


def kill_all(process) -> None:
    """torchrun and its workers, which may have sessions of their own."""
    launcher = psutil.Process(process.pid)
    for one in [*launcher.children(recursive=True), launcher]:
        one.kill()


def wait_for_step(process, run: Path, step: int) -> None:
    """Until the run has logged that step, or its process has ended."""
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.02)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds: the method's and the optimizer's tensors."""
    newest = max((run / "checkpoints").glob("step-*"))
    with Sharded(newest) as kept:
        return {name: kept.read(name) for name in kept.names()}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def metrics(run: Path) -> list[dict]:
    return read_json_lines(run / "metrics.jsonl")


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
