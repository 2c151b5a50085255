"""The runs in a folder: how far each is, how good, and whether it could go on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_global.data.files import read_json_lines
from ssl_global.training.checkpoint import DAMAGE, checkpoints, verified
from ssl_global.training.folder import at_work


@dataclass(frozen=True)
class Listed:
    """One run, in words."""

    name: str
    recipe: str
    step: str
    knn: str
    checkpoint: str
    verdict: str  # of the newest checkpoint, or what the run has come to


def find_runs(directory: Path) -> list[Listed]:
    """Those in the folder and below it, by name. A run's folder has a run.json and is not looked into further."""
    found = []
    for path, folders, files in os.walk(directory):
        if "run.json" in files:
            folders.clear()
            found.append(Path(path))
    return [describe(run, directory) for run in sorted(found)]


def describe(run: Path, directory: Path) -> Listed:
    newest = next(iter(checkpoints(run)), None)
    record, verdict = check(newest) if newest else ({}, "no checkpoint yet")
    if (run / "summary.json").is_file():
        verdict = f"{verdict}, finished"
    elif at_work(run):
        verdict = f"{verdict}, at work"
    recipe = record.get("recipe", {})
    step = record.get("state", {}).get("step")
    return Listed(
        name=str(run.relative_to(directory)) if run != directory else run.name,
        recipe=" on ".join(str(recipe[part]) for part in ("method.kind", "encoder.name") if part in recipe) or "-",
        step="-" if step is None else str(step),
        knn=last_knn(run / "metrics.jsonl"),
        checkpoint=newest.name if newest else "-",
        verdict=verdict,
    )


def check(folder: Path) -> tuple[dict[str, Any], str]:
    try:
        return verified(folder), "yes"
    except DAMAGE as error:
        return {}, f"NO: {error}"


def last_knn(metrics: Path) -> str:
    figures = [line["knn"] for line in read_json_lines(metrics) if isinstance(line.get("knn"), float)]
    return f"{figures[-1]:.3f}" if figures else "-"
