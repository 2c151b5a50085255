"""What a run says of itself in words: at its start, at its end, and in run.json."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssl_global.recipe import Recipe, as_json, flatten
from ssl_global.training.checkpoint import Layout, versions
from ssl_global.training.optim import peak_lr
from ssl_global.training.plan import Plan


def resolved(recipe: Recipe, name: str, overridden: dict[str, object]) -> list[str]:
    """The recipe as it is run, a line for each part; what the command line changed has the recipe's value behind it."""
    parts: dict[str, list[str]] = {}
    for path, value in flatten(recipe).items():
        part, _, field = path.rpartition(".")
        was = f" (recipe: {overridden[path]})" if path in overridden else ""
        parts.setdefault(part or "run", []).append(f"{field} {value}{was}")
    width = max(map(len, parts))
    return [f"recipe {name}", *(f"  {part:{width}}  {'  '.join(fields)}" for part, fields in parts.items())]


def arithmetic(plan: Plan, recipe: Recipe) -> list[str]:
    """How batch, length and learning rate come about."""
    optim = recipe.optim
    processes = "1 process" if plan.num_processes == 1 else f"{plan.num_processes} processes"
    peak = f"{optim.lr_per_256_images:g} x {plan.global_batch} / 256 = {peak_lr(optim, plan.global_batch):.4g}"
    left_out = f" (of {plan.num_images})" if plan.epoch_images < plan.num_images else ""
    epochs = f"{plan.num_steps / plan.steps_per_epoch:.4g} epochs of {plan.epoch_images} images{left_out}"
    return [
        f"batch  {processes} x {plan.accumulate} x {plan.micro_batch} images = {plan.global_batch} a step",
        f"length {plan.num_steps} steps = {epochs} ({plan.steps_per_epoch:.4g} steps each)",
        f"lr     {peak} at its peak, after {optim.warmup_epochs:g} epochs",
    ]


def resumed(folder: Path, record: dict[str, Any], damaged: list[str], layout: Layout, recipe: Recipe) -> list[str]:
    """A short table: what was restored, what is different now, what was refused."""
    state, before = record["state"], record["layout"] | record["recipe"]
    now = asdict(layout) | json.loads(json.dumps(as_json(recipe)))
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if value != before.get(name)]
    size = sum(file["bytes"] for file in record["files"].values())
    rows = [
        ("restored", f"step {state['step']}, {state['images']} images seen, {len(record['tensors'])} tensors"),
        ("", f"{len(record['files'])} shards of {record['layout']['engine']}, {size / 1e6:.1f} MB, checksums right"),
        ("changed", "; ".join(changed) or "nothing"),
        *(("refused", f"{line}; the one before it serves") for line in damaged),
    ]
    return [f"going on from {folder}", *(f"  {word:8}  {text}" for word, text in rows)]


def baselines(figures: dict[str, float]) -> str:
    """What there is to beat."""
    if not figures:
        return "judge  no labels to judge with (--val): only the health of the features is measured\n"
    names = {
        "knn_untrained": "k-NN of the untrained encoder",
        "knn_pixels": "k-NN of raw pixels",
        "linear_untrained": "linear probe of the untrained encoder",
        "knn_start": "k-NN of the encoder that it begins from",
        "linear_start": "linear probe of the encoder that it begins from",
        "rankme_start": "RankMe of the encoder that it begins from",
    }
    return f"before training: {', '.join(f'{names[key]} {value:.3f}' for key, value in figures.items())}\n"


def summary(figures: dict[str, Any]) -> list[str]:
    """What came of it."""
    lines = [f"done: {figures['steps']} steps, {figures['images']} images in {figures['seconds']:.0f} s of training"]
    for judge, name in (("knn", "k-NN"), ("linear", "linear probe")):
        if figures.get(judge) is not None:
            gain = over_start(figures, judge)
            pixels = f", raw pixels {figures['knn_pixels']:.3f}" if judge == "knn" else ""
            lines.append(f"{name} {figures[judge]:.3f}: {gain}{pixels}")
    export = figures["export"]
    return [*lines, f'export {export}: timm.create_model("local-dir:{export}", pretrained=True)']


def over_start(figures: dict[str, Any], judge: str) -> str:
    """What the run added to what it began with."""
    began = figures.get(f"{judge}_start")
    start = figures[f"{judge}_untrained"] if began is None else began
    points = f"{100 * (figures[judge] - start):+.1f} points over"
    if began is None:
        return f"{points} the untrained encoder's {start:.3f}"
    return f"{points} the {start:.3f} of the encoder that it began from"


def provenance() -> dict[str, Any]:
    """What ran here: the command, the versions, and the commit if this is a checkout."""

    def git(*words: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "commit": git("rev-parse", "HEAD"),
        "changed_files": (git("status", "--porcelain") or "").splitlines(),
    }
