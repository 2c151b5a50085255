"""Lines over a run's steps, as SVG that stands in a page: no library, no script, colours from page.css.

Ticks stand at round numbers (1, 2 or 5 times a power of ten). A line of many points is thinned to the first, lowest,
highest and last value of each of a hundred columns, so that no peak is lost: M4, Jugel et al. 2014, "M4: A
Visualization-Oriented Time Series Data Aggregation", https://doi.org/10.14778/2732951.2732953. The paper takes a column
for each pixel of the screen; here a column is three units of the drawing.

A value that is not finite is a gap in its line and is counted in the words beside it. All that the drawing says is said
in these words too, and no two lines differ by their colour alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ssl_global.explain.page import BEYOND, escaped, is_number, number, short

Series = Sequence[tuple[int, float]]  # (step, value); steps in any order

WIDTH, HEIGHT, RIGHT, TOP, BOTTOM = 360, 190, 16, 8, 24  # units of the drawing: about pixels on a phone
DIGIT_WIDTH, LEAST_LEFT = 6.2, 44  # the same, of a tick's label and of the room for it
COLUMNS, MOST_POINTS = 100, 400  # ours: a line of more points is thinned to that many columns
DOTTED = 30  # ours: a line of fewer values shows each as a dot
MOST_TICKS = 5  # ours
NEARLY_EQUAL = 1e-9  # ours: of the value; lines that vary by less are drawn as constant


@dataclass(frozen=True)
class Chart:
    """Lines over one axis of steps, which begins at 0; baselines are levels to compare with."""

    title: str
    lines: Mapping[str, Series]
    baselines: Mapping[str, float] = field(default_factory=dict)

    def html(self) -> str:
        """A figure; without any finite value only its words, and nothing if there is no value at all."""
        lines = {name: arrays(points) for name, points in self.lines.items() if len(points)}
        if not lines:
            return ""
        levels = {name: value for name, value in self.baselines.items() if drawable(value)}
        alone = len(lines) + len(levels) == 1
        said = {name: words(name, *line, alone=alone) for name, line in lines.items()}
        said |= {name: f"{name} {number(value)}" for name, value in levels.items()}
        styles = dict(zip(said, styles_of(len(lines), len(levels)), strict=True))
        key = "".join(f"<li>{'' if alone else sample(styles[name])}{escaped(text)}</li>" for name, text in said.items())
        drawing = draw(lines, levels, styles, label=f"{self.title} over steps: {'; '.join(said.values())}")
        caption = f'<figcaption><b>{escaped(self.title)}</b><ul class="key">{key}</ul></figcaption>'
        return f'<figure class="chart">{caption}{drawing}</figure>'


def words(name: str, steps: np.ndarray, values: np.ndarray, *, alone: bool) -> str:
    finite = np.flatnonzero(np.isfinite(values))
    gaps = len(values) - len(finite)
    missing = f"{number(gaps)} of {number(len(values))} values not finite"
    named = "" if alone else f"{name} "
    if not len(finite):
        return f"{named}{missing}"
    last = finite[-1]
    low, high = number(float(values[finite].min())), number(float(values[finite].max()))
    said = f"{named}{number(float(values[last]))} at step {number(int(steps[last]))}"
    said += f", range {low} to {high}" if low != high else ""
    return f"{said}; {missing}" if gaps else said


def styles_of(num_lines: int, num_levels: int) -> list[str]:
    """Classes of page.css. There are four of each; more would be more than a drawing can tell apart."""
    return [f"line-{i % 4 + 1}" for i in range(num_lines)] + [f"level-{i % 4 + 1}" for i in range(num_levels)]


def sample(style: str) -> str:
    return f'<svg viewBox="0 0 26 8" aria-hidden="true"><path class="{style}" d="M1 4H25"/></svg>'


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    levels: Mapping[str, float],
    styles: Mapping[str, str],
    *,
    label: str,
) -> str:
    values = np.concatenate([*(values for _, values in lines.values())])
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    low, high = widened(*span_of([*levels.values(), values.min(), values.max()]))
    last = max(1, *(int(steps[-1]) for steps, _ in lines.values()))
    gap, step_gap = round_gap(high - low), max(1.0, round_gap(last))
    ticks = np.arange(math.floor(low / gap + 1e-6), math.ceil(high / gap - 1e-6) + 1) * gap
    step_ticks = np.arange(math.floor(last / step_gap + 1e-6) + 1) * step_gap
    names = [tick_label(tick, gap, max(abs(ticks))) for tick in ticks]

    left = max(LEAST_LEFT, 8 + DIGIT_WIDTH * max(map(len, names)))
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def x(steps: Any) -> Any:
        return left + np.asarray(steps) * ((right - left) / last)

    def y(values: Any) -> Any:
        return bottom - (np.asarray(values) - ticks[0]) * ((bottom - TOP) / (ticks[-1] - ticks[0]))

    grid = "".join(f"M{left:.1f} {at:.1f}H{right}" for at in y(ticks))
    marks = "".join(f"M{at:.1f} {bottom}v4" for at in x(step_ticks))
    shapes = [f'<path class="grid" d="{grid}"/>', f'<path class="axis" d="M{left:.1f} {bottom}H{right}{marks}"/>']
    for at, name in zip(y(ticks), names, strict=True):
        shapes.append(f'<text class="y" x="{left - 6:.1f}" y="{at:.1f}" dy=".33em">{escaped(name)}</text>')
    for at, tick in zip(x(step_ticks), step_ticks, strict=True):
        shapes.append(f'<text class="x" x="{at:.1f}" y="{HEIGHT - 7}">{step_label(tick, last)}</text>')
    shapes.append(f'<text class="y" x="{left - 14:.1f}" y="{HEIGHT - 7}">step</text>')
    for name, level in levels.items():
        shapes.append(f'<path class="{styles[name]}" d="M{left:.1f} {y(level):.1f}H{right}"/>')
    for name, line in lines.items():
        steps, kept = thinned(*line)
        shapes.append(f'<path class="{styles[name]}" d="{path(x(steps), y(kept))}"/>')
        if len(kept) <= DOTTED:
            shapes.append(f'<path class="{styles[name]} dots" d="{dots(x(steps), y(kept))}"/>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(label)}"'
    return f"<svg {box}>{''.join(shapes)}</svg>"


def path(x: np.ndarray, y: np.ndarray) -> str:
    """Through all points; anew after one that is not finite. A point between two such is a dot."""
    holes = np.flatnonzero(~np.isfinite(y))
    pieces = [(begin + 1, end) for begin, end in pairwise([-1, *holes, len(y)]) if end > begin + 1]
    written = ("L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[i:j], y[i:j], strict=True)) for i, j in pieces)
    return "".join(f"M{points}{'' if 'L' in points else 'h0'}" for points in written)


def dots(x: np.ndarray, y: np.ndarray) -> str:
    return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True) if math.isfinite(b))


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In each column the first, lowest, highest and last finite value; a gap if there is none."""
    if len(values) <= MOST_POINTS:
        return steps, values
    width = max(steps[-1] - steps[0], 1) / COLUMNS
    column = np.minimum((steps - steps[0]) / width, COLUMNS - 1).astype(int)
    edges = [0, *(np.flatnonzero(np.diff(column)) + 1), len(values)]
    kept: list[int] = []
    for begin, end in pairwise(edges):
        finite = begin + np.flatnonzero(np.isfinite(values[begin:end]))
        of = values[finite]
        kept += sorted({finite[0], finite[of.argmin()], finite[of.argmax()], finite[-1]}) if len(of) else [begin]
    return steps[kept], values[kept]


# ----------------------------------------------------------------------------------------------------------------- axes


def span_of(values: Iterable[float]) -> tuple[float, float]:
    found = [float(value) for value in values]
    return min(found), max(found)


def widened(low: float, high: float) -> tuple[float, float]:
    """A range that a line can be drawn in, also where all values are the same."""
    largest = max(abs(low), abs(high))
    if high - low > NEARLY_EQUAL * largest and high - low > 1 / BEYOND:
        return low, high
    room = largest / 2 if largest > 1 / BEYOND else 0.5
    return low - room, high + room


def round_gap(span: float) -> float:
    """Between ticks: 1, 2 or 5 times a power of ten, the smallest that has no more than MOST_TICKS in the span."""
    power = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
    return next(times * power for times in (1, 2, 5, 10) if span <= times * power * MOST_TICKS * (1 + 1e-9))


def tick_label(tick: float, gap: float, largest: float) -> str:
    """With as many digits as tell it from its neighbours."""
    decimals = -math.floor(math.log10(gap) + 1e-9)
    if abs(tick) < gap / 2:
        return "0"
    if largest >= 1e5 or gap < 1e-6 or (gap < 1e-3 and largest < 1e-2):
        return short(f"{tick:.{max(0, math.floor(math.log10(abs(tick)) + 1e-9) + decimals)}e}")
    return f"{tick:.{max(0, decimals)}f}"


def step_label(step: float, last: int) -> str:
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if last >= 10 * scale and step > 0:
            return f"{step / scale:g}{unit}"
    return f"{step:g}" if step < 1e6 else short(f"{step:.3e}")


# ------------------------------------------------------------------------------------------------------ a run's metrics


@dataclass(frozen=True)
class Wanted:
    """A chart of a run: keys of metrics.jsonl, or of summary.json, and what they are called."""

    title: str
    lines: dict[str, str]
    baselines: dict[str, str] = field(default_factory=dict)


LEARNING = (
    Wanted(
        "Loss",
        {"loss": "loss", "view_loss": "of views", "region_loss": "of regions", "patch_loss": "of hidden patches"},
    ),
    Wanted(
        "Accuracy of k-NN and linear probe",
        {"knn": "k-NN", "linear": "linear probe"},
        {
            "knn_untrained": "k-NN, untrained",
            "knn_pixels": "k-NN, raw pixels",
            "linear_untrained": "linear probe, untrained",
            "knn_start": "k-NN, where it began",
            "linear_start": "linear probe, where it began",
        },
    ),
    Wanted("Accuracy", {"top1": "top-1", "top5": "top-5", "train_top1": "top-1 in training"}),
    Wanted(
        "Segmentation",
        {"miou": "mIoU", "pixel_accuracy": "pixels right", "mean_class_accuracy": "mean of classes"},
        {"miou_untrained": "mIoU, untrained head"},
    ),
    Wanted("Calibration error", {"ece": "calibration error"}),
)
# Where health.py begins to warn is drawn too: it says how far away that is.
HEALTH = (
    Wanted("Directions that the features use (RankMe)", {"rankme": "RankMe"}, {"rankme_low": "collapsing below"}),
    Wanted(
        "Spread of the features, 1 = all directions alike",
        {"feature_std": "feature std"},
        {"feature_std_collapsed": "collapsed below"},
    ),
    Wanted(
        "Entropy of the teacher, share of log K",
        {"teacher_entropy_share": "entropy"},
        {"teacher_uniform": "nearly uniform above", "teacher_one_hot": "nearly certain below"},
    ),
    Wanted("Student's divergence from the teacher, nats", {"teacher_kl": "KL"}),
)
OPTIMISATION = (
    Wanted("Learning rate", {"lr": "lr"}),
    Wanted("Gradient norm, before clipping", {"gradient_norm": "norm"}),
)
SPEED = (
    Wanted("Images per second", {"images_per_second": "images/s"}),
    Wanted("Share of time spent waiting for data", {"waiting_for_data": "waiting"}),
)
KEYS = {key for wanted in (*LEARNING, *HEALTH, *OPTIMISATION, *SPEED) for key in wanted.lines}


def series(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """What there is of each key, by step; of two values at a step the later one. Other things are left out."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        step = line.get("step")
        if type(step) is not int or not 0 <= step < 2**53:
            continue
        for key in line.keys() & KEYS:
            if is_number(line[key]):
                found.setdefault(key, {})[step] = line[key] if drawable(line[key]) else math.nan
    return {key: sorted(values.items()) for key, values in found.items()}


def charts(wanted: Iterable[Wanted], metrics: Mapping[str, Series], baselines: Mapping[str, Any]) -> list[Chart]:
    """Those of which there is a value at all."""
    found = []
    for one in wanted:
        lines = {name: metrics[key] for key, name in one.lines.items() if metrics.get(key)}
        levels = {name: baselines[key] for key, name in one.baselines.items() if drawable(baselines.get(key))}
        if lines:
            found.append(Chart(one.title, lines, levels))
    return found


def drawable(value: Any) -> bool:
    return is_number(value) and abs(value) < BEYOND  # False for NaN


def arrays(points: Series) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, in the order of steps; what cannot be drawn is NaN."""
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([value for _, value in points], dtype=np.float64)
    order = np.argsort(steps, kind="stable")
    values[~(np.abs(values) < BEYOND)] = math.nan
    return steps[order], values[order]
