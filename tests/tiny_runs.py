"""Helpers of the tests of runs: a tiny run's command line, and what it leaves."""

import json
from pathlib import Path

import torch

from ssl_global.training.sharded import Sharded

# A dozen steps take a second: 16-pixel views, two blocks, 64 prototypes. Half an epoch of the 24 images is a step.
TINY = {
    "dino": [
        "--views.globals.pixels=16", "--views.locals.pixels=8", "--views.locals.count=2", "--method.prototypes=64",
        "--method.head-hidden=32", "--method.head-bottleneck=16", "--method.freeze-prototypes-epochs=1",
        "--encoder.patch=8",
    ],
    "mae": ["--views.globals.pixels=16", "--method.decoder-width=32", "--method.decoder-depth=1", "--encoder.patch=4"],
}  # fmt: skip
EVERY = [
    "--encoder.width=32", "--encoder.heads=2", "--encoder.depth=2", "--train.global-batch=12", "--train.epochs=None",
    "--train.steps=8", "--optim.warmup-epochs=1", "--log.every=1", "--eval.every=100", "--checkpoint.every=3",
    "--data.workers=0", "--device=cpu", "--log-with=",
]  # fmt: skip


def arguments(method: str, data: Path | str, out: Path, *more: str) -> list[str]:
    every = [word for word in EVERY if word != "--log-with="]
    return [f"--recipe={method}:demo", f"--data={data}", f"--out={out}", *every, *TINY[method], *more, "--log-with"]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds: the method's and the optimizer's tensors."""
    newest = max((run / "checkpoints").glob("step-*"))
    with Sharded(newest) as kept:
        return {name: kept.read(name) for name in kept.names()}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
