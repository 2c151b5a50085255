"""What a page says of a run and of a backbone: sections made from a run's folder and from a model.

A run's folder may come from a stranger, or from a run that was killed. Nothing in it is run or trusted: what is no
number is not drawn, texts are shown as texts and cut where they are long, and a file that cannot be read is one line on
the page.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_global.attention.cost import cost
from ssl_global.data.files import read_json, read_json_lines
from ssl_global.evaluation import health
from ssl_global.explain.curves import HEALTH, LEARNING, OPTIMISATION, SPEED, charts, series
from ssl_global.explain.page import BEYOND, Code, Columns, Listing, Part, Section, Table, is_number, number

MOST_BYTES = 2**28  # ours, of a file that is read: the metrics of a million steps are fewer
LONGEST, MOST_ROWS = 400, 200  # ours: letters of a text, and rows of a table, that a stranger's file may fill

# Key of summary.json -> what it is called.
FIGURES = {
    "steps": "steps", "images": "images seen", "seconds": "seconds of training", "images_per_second": "images a second",
    "loss": "loss at the end", "rankme": "RankMe: directions used", "feature_std": "spread of the features",
    "top1": "top-1", "top5": "top-5", "mean_class_accuracy": "accuracy, mean of classes", "ece": "calibration error",
    "nll": "negative log-likelihood", "miou": "mIoU", "miou_untrained": "mIoU, untrained head",
    "pixel_accuracy": "share of pixels right",
}  # fmt: skip
JUDGES = {"knn": "k-NN", "linear": "linear probe"}


def of_run(folder: Path, recipe: Mapping[str, Any] | None = None) -> list[Section]:
    """Result, curves, health, optimisation, where it came from, and recipe: those of which the folder says something.

    folder  as pretrain.py or finetune.py wrote it; files may be damaged, missing or a stranger's
    recipe  flat names and values, as ssl_global.recipe.as_json gives and a checkpoint's record holds them
    """
    complaints: list[str] = []
    summary = read_object(folder / "summary.json", complaints, missing="the run has not come to its end")
    run = read_object(folder / "run.json", complaints, missing="no run that this program began")
    export = read_json(folder / "export" / "config.json") if small(folder / "export" / "config.json") else None
    metrics = read_metrics(folder / "metrics.jsonl", complaints)
    width = export.get("num_features") if isinstance(export, dict) else None
    width = float(width) if is_number(width) and 0 < width < 2**31 else None
    return [
        section
        for section in (
            result(summary),
            drawn("Training", "", charts(LEARNING, metrics, summary)),
            drawn("Health", verdicts(metrics, width), charts(HEALTH, metrics, thresholds(width))),
            drawn("Optimisation and speed", "", charts((*OPTIMISATION, *SPEED), metrics, summary)),
            provenance(run, summary),
            of_recipe(recipe or {}),
            Section("What could not be read", "\n\n".join(complaints)) if complaints else None,
        )
        if section is not None
    ]


def of_backbone(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    *,
    batch: int = 1,
    device: torch.device | None = None,
) -> Section:
    """What the model costs: parameters, operations, and the memory of a training step. See attention.cost."""
    try:
        found = cost(model, input_size, batch, device=device)
    except ValueError as error:
        return Section("Cost", cut(f"Not known: {error}"))
    images = "one image" if batch == 1 else f"a batch of {batch} images"
    rows = [
        ("parameters, millions", found.parameters / 1e6),
        *([("of these learning, millions", found.learning / 1e6)] if found.learning != found.parameters else []),
        ("forward pass, GFLOPs", found.flops / 1e9),
        ("activations kept for the backward pass, MB", found.activation_bytes / 1e6),
        ("training step with AdamW in float32, MB", found.training_bytes / 1e6),
    ]
    size = " × ".join(map(str, found.input_size))
    text = (
        f"Of {images} of {size} (channels, height, width). A multiply-add counts as two operations; papers that say "
        f"FLOPs often count it as one. Memory is {found.source}."
    )
    return Section("Cost", text, [Table((), rows)])


# ------------------------------------------------------------------------------------------------------------- reading


def read_object(file: Path, complaints: list[str], *, missing: str) -> dict[str, Any]:
    """What the JSON file holds; nothing, and a complaint, if it holds no object."""
    if not file.is_file():
        complaints.append(f"{file.name} is not there: {missing}.")
        return {}
    found = read_json(file) if small(file) else None
    if not isinstance(found, dict):
        complaints.append(f"{file.name} is damaged, or no file of a run: it holds no JSON object.")
        return {}
    return found


def read_metrics(file: Path, complaints: list[str]) -> dict[str, list[tuple[int, float]]]:
    try:
        metrics = series(read_json_lines(file)) if small(file) else {}
    except OSError:
        metrics = {}
    if not metrics:
        what = "holds no metrics that could be read" if file.is_file() else "is not there"
        complaints.append(f"{file.name} {what}: there are no curves.")
    return metrics


def small(file: Path) -> bool:
    return file.is_file() and file.stat().st_size <= MOST_BYTES


def cut(text: object) -> str:
    written = str(text)
    return written if len(written) <= LONGEST else f"{written[:LONGEST]}… ({number(len(written))} letters)"


# ------------------------------------------------------------------------------------------------------------ sections


def result(summary: Mapping[str, Any]) -> Section | None:
    judged, gains, before = [], [], "untrained"
    for judge, name in JUDGES.items():
        trained, untrained, start = (found(summary, judge + of) for of in ("", "_untrained", "_start"))
        if trained is not None:
            judged.append((name, trained, untrained if start is None else start, found(summary, f"{judge}_pixels")))
        if trained is not None and untrained is not None:
            points = f"{100 * (trained - untrained):+.1f} points over the untrained encoder's {untrained:.3f}"
            gains.append(f"{name} {trained:.3f}: {points}")
        if trained is not None and start is not None:
            points = f"{100 * (trained - start):+.1f} points over the {start:.3f} of the encoder that it began from"
            gains.append(f"{name} {trained:.3f}: {points}")
            before = "at the start"
    rows = [(name, value) for key, name in FIGURES.items() if (value := found(summary, key)) is not None]
    if (peak := found(summary, "peak_memory")) is not None:
        rows.append(("peak memory, MB", peak / 1e6))
    tables = [
        *([Table(("accuracy", "trained", before, "raw pixels"), judged, decimals=3)] if judged else []),
        *([Table((), rows)] if rows else []),
    ]
    return Section("Result", f"{'; '.join(gains)}." if gains else "", tables) if tables else None


def found(figures: Mapping[str, Any], key: str) -> float | None:
    """A number that can be reckoned with, or None."""
    value = figures.get(key)
    return float(value) if is_number(value) and abs(value) < BEYOND else None


def drawn(title: str, text: str, parts: Sequence[Part]) -> Section | None:
    return Section(title, text, [Columns(parts)]) if parts else None


def verdicts(metrics: Mapping[str, Sequence[tuple[int, float]]], width: float | None) -> str:
    """In words, of the last values."""
    last = {name: points[-1][1] for name, points in metrics.items()} | ({"width": width} if width else {})
    return " ".join(f"Warning: {said}." for said in health.verdicts(last)) or "At the end nothing speaks of a collapse."


def thresholds(width: float | None) -> dict[str, float]:
    """Where health.py begins to warn."""
    return {
        "feature_std_collapsed": health.FEATURE_STD_COLLAPSED,
        "teacher_uniform": health.TEACHER_UNIFORM,
        "teacher_one_hot": health.TEACHER_ONE_HOT,
        **({"rankme_low": health.RANKME_SHARE_LOW * width} if width else {}),
    }


def provenance(run: Mapping[str, Any], summary: Mapping[str, Any]) -> Section | None:
    command = run.get("command")
    words = [word for word in command if isinstance(word, str)] if isinstance(command, list) else []
    versions = run.get("versions")
    rows = [
        *((name, summary.get(name)) for name in ("recipe", "data", "export")),
        *((name, run.get(name)) for name in ("started", "commit")),
        *(versions.items() if isinstance(versions, dict) else ()),
    ]
    changed = run.get("changed_files")
    if isinstance(changed, list) and changed:
        rows.append(("changed since the commit", ", ".join(map(str, changed[:MOST_ROWS]))))
    shown = [(cut(name), Code(cut(value))) for name, value in rows if isinstance(value, str)][:MOST_ROWS]
    if not words and not shown:
        return None
    listing = [Listing(cut(shlex.join(words)))] if words else []
    return Section("Where it came from", "", [*listing, *([Table((), shown)] if shown else [])])


def of_recipe(recipe: Mapping[str, Any]) -> Section | None:
    """A small table for each part."""
    tables: dict[str, list[tuple[Code, Code]]] = {}
    for name, value in list(recipe.items())[:MOST_ROWS]:
        part, _, field = str(name).rpartition(".")
        tables.setdefault(part or "run", []).append((Code(cut(field)), Code(cut(written(value)))))
    if not tables:
        return None
    return Section(
        "Recipe", "", [Columns([Table((), rows, caption=cut(part)) for part, rows in sorted(tables.items())])]
    )


def written(value: object) -> str:
    """A field's value as one writes it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
