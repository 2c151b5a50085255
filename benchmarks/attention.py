"""What each 2D attention module costs, beside its paper's formula in the plain form (reference/attention_forms.py).

    python -m benchmarks attention --out attention.json
    python -m benchmarks attention --write docs/attention.md

A step is forward and backward, in float32, of one image's features, on one thread of the CPU. Module and plain form
take turns, fewer the slower they are (MOST_SECONDS). Memory is that of one step, in a process of its own (Linux);
"kept" is what autograd keeps from forward for backward: it is counted in a dry run and has no noise.

With 256 channels a machine of 24 GB can run the plain forms at 64 x 64, all but one, and those with one head at
128 x 128. One that keeps more than MOST_KEPT is not run, only counted: at its peak it takes three times that. One that
takes less than APART times the module's arithmetic and memory is the same work, and is not run either.

`--write` also makes the table of all modules, in which nothing depends on the machine (tests/attention/test_docs.py).
"""

import importlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from math import ceil, log10
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Comparison, alone, compare, machine, report, resident
from benchmarks.reference.attention_forms import form
from ssl_global import attention
from ssl_global.attention.base import Attention
from ssl_global.attention.cost import Cost, cost

OURS, PLAIN = "module", "plain form"
CHANNELS = 256
APART = 1.5
MOST_KEPT = 4e9  # bytes, of a plain form that is run
MOST_SECONDS = 6.0  # of a comparison's rounds, the first aside: as many as fit, up to those asked for, but one
EMPTY = f"Empty: a plain form that is the same work, or keeps more than {MOST_KEPT / 1e9:g} GB, was not run."
PLACE_BY_PLACE = 4  # bytes of a number in a map of all places by all
DRY = torch.device("cpu")  # costs are counted, whatever the machine has

# Of the table of all modules.
SIDE = 64
ODD = (13, 17)  # rows and columns, where the errors are measured
ANY_SIZES = ((1, 1), (1, 9), (2, 3), (7, 5), ODD)
FEW_CHANNELS = 64
FORMULA = 1e-12  # an error of the largest value that is rounding in float64


# ---------------------------------------------------------------------------------------------- modules and their forms


@dataclass(frozen=True)
class Case:
    """A module with options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return ", ".join([self.name, *map(str, self.options.values())])

    def built(self, channels: int, *, plain: bool) -> nn.Module:
        torch.manual_seed(0)
        module = attention.build(self.name, channels, **self.options)
        return PlainForm(self.name, module) if plain else module


class PlainForm(nn.Module):
    """The module's formula, with the module's parameters."""

    def __init__(self, name: str, module: Attention) -> None:
        super().__init__()
        self.name, self.module = name, module

    def forward(self, x: Tensor) -> Tensor:
        return form(self.name)(self.module, x)


def cases(names: Iterable[str]) -> list[Case]:
    """Each module as it is by default, and non_local in all of its modes."""
    modes = [Case("non_local", {"mode": mode}) for mode in ("gaussian", "dot", "concat")]
    return [case for name in names for case in (Case(name), *(mode for mode in modes if mode.name == name))]


def moved(name: str, channels: int, **options: Any) -> Attention:
    """The module in float64, in evaluation, as it may be after some training: all parameters are elsewhere."""
    torch.manual_seed(0)
    module = attention.build(name, channels, **options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


# --------------------------------------------------------------------------------------------- the table of all modules


@dataclass(frozen=True)
class Row:
    """What is true of a module anywhere."""

    name: str
    papers: str
    form: str
    error: float  # of the module beside its form, as a share of the largest value
    identical: bool
    any_size: bool
    cost: Cost

    HEAD = (
        "module", "paper", "compared with", "error", "identical at the start", "any size", "parameters", "MFLOPs",
        "kept, MB",
    )  # fmt: skip

    @property
    def cells(self) -> tuple[str, ...]:
        bound = 10.0 ** max(-14, ceil(log10(10 * self.error)) if self.error else -14)
        numbers = (f"{self.cost.parameters:,}", short(self.cost.flops / 1e6), short(self.cost.activation_bytes / 1e6))
        claims = ("yes" if self.identical else "NO", "yes" if self.any_size else "NO")
        return (f"`{self.name}`", self.papers, self.form, f"< {bound:.0e}", *claims, *numbers)


def module_rows() -> list[Row]:
    return [module_row(name) for name in attention.names()]


def module_row(name: str) -> Row:
    compared = (form(name).__doc__ or "").splitlines()[0]
    errors = {size: error(name, size) for size in ANY_SIZES}
    return Row(
        name=name,
        papers=papers(name),
        form=compared,
        error=errors[ODD],
        identical=all(begins_identical(name, size) for size in ANY_SIZES),
        any_size=max(errors.values()) < FORMULA,
        cost=cost(attention.build(name, CHANNELS), (CHANNELS, SIDE, SIDE), device=DRY),
    )


def papers(name: str) -> str:
    """Those that the module's file begins with, as links."""
    text = " ".join((importlib.import_module(f"ssl_global.attention.{name}").__doc__ or "").split())
    found = re.findall(r"([A-Z][\w ]+?(?: et al\.)? \d{4})\b[^()]*?(https://arxiv\.org/abs/[\d.]+\d)", text)
    return ", ".join(f"[{who}]({where})" for who, where in found) or "none"


def error(name: str, size: tuple[int, int]) -> float:
    module = moved(name, FEW_CHANNELS)
    x = torch.randn(2, FEW_CHANNELS, *size, dtype=torch.float64)
    with torch.no_grad():
        said, meant = module(x), form(name)(module, x)
    return ((said - meant).abs().max() / meant.abs().max()).item() if said.shape == meant.shape else float("inf")


def begins_identical(name: str, size: tuple[int, int]) -> bool:
    module = attention.build(name, FEW_CHANNELS)
    x = torch.randn(2, FEW_CHANNELS, *size)
    return all(torch.equal(module.train(training)(x), x) for training in (True, False))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines; all columns but those of words to the right."""
    words = ("module", "paper", "compared with")
    return [
        f"| {' | '.join(line)} |"
        for line in (head, ["---" if title in words else "---:" for title in head], *rows)
    ]  # fmt: skip


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------------- measured


@dataclass
class Measured:
    """A module and its plain form on a map of side x side."""

    case: Case
    channels: int
    side: int
    costs: dict[str, Cost]
    peak: dict[str, int]  # bytes, of those that were run
    steps: Comparison

    def more(self, of: str) -> float | None:
        """How many times what the module takes its plain form takes; None where it is not known."""
        if of == "time":
            return 1 / self.steps.ratio(PLAIN) if PLAIN in self.steps.seconds else None
        if of == "peak":
            return self.peak[PLAIN] / self.peak[OURS] if PLAIN in self.peak else None
        return self.costs[PLAIN].activation_bytes / self.costs[OURS].activation_bytes

    @property
    def milliseconds(self) -> float:
        return 1e3 * median(self.steps.seconds[OURS])

    def figures(self) -> dict[str, Any]:
        return {
            which: {
                "flops": found.flops,
                "kept_bytes": found.activation_bytes,
                "peak_bytes": self.peak.get(which),
                "time": self.steps.figures().get(which),
            }
            for which, found in self.costs.items()
        }


def main() -> None:
    tyro.cli(run, prog="python -m benchmarks attention")


def run(
    maps: tuple[int, ...] = (32, 64, 128),
    channels: int = CHANNELS,
    names: tuple[str, ...] | None = None,
    rounds: int = 5,
    out: Path | None = None,
    write: Path | None = None,
) -> None:
    """Measures the 2D attention modules.

    Args:
        maps: Sides of the maps, at least two; growth is told from the last but one to the last.
        channels: Of the maps.
        names: Of the modules; all by default.
        rounds: Of each comparison.
        out: File for all figures, JSON.
        write: Markdown file; what it has between <!-- modules --> and <!-- /modules -->, and between
            <!-- measured --> and <!-- /measured -->, is replaced with tables.
    """
    if len(set(maps)) < 2:
        raise SystemExit("--maps: at least two, for what grows with them")
    torch.set_num_threads(1)
    if write:
        text = between(write.read_text(), "measured", [])  # before minutes are spent
        write.write_text(between(text, "modules", markdown(Row.HEAD, [row.cells for row in module_rows()])))
    found = {
        case.label: [measure(case, channels, side, rounds) for side in sorted(set(maps))]
        for case in cases(names or attention.names())
    }
    report([], promised(found), out)
    for title, (head, *rows) in tables(found).items():
        table = Table(*head, title=title, box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        Console(width=160).print(table)
    print(EMPTY)
    if out:
        figures = {label: {each.side: each.figures() for each in of} for label, of in found.items()}
        out.write_text(json.dumps(json.loads(out.read_text()) | {"figures": figures}, indent=2) + "\n")
    if write:
        write.write_text(between(write.read_text(), "measured", measured_lines(found, channels)))


def measure(case: Case, channels: int, side: int, rounds: int) -> Measured:
    built = {which: case.built(channels, plain=which == PLAIN) for which in (OURS, PLAIN)}
    costs = {which: cost(module, (channels, side, side), device=DRY) for which, module in built.items()}
    both = is_apart(costs) and costs[PLAIN].activation_bytes <= MOST_KEPT
    running = [OURS, PLAIN] if both else [OURS]
    steps = {which: Step(built[which], channels, side) for which in running}
    return Measured(
        case, channels, side, costs,
        peak={which: alone(peak_bytes, case, channels, side, which == PLAIN) for which in running},
        steps=repeated(f"{case.label} at {side} x {side}, {channels} channels", steps, rounds),
    )  # fmt: skip


def is_apart(costs: dict[str, Cost]) -> bool:
    """Whether the plain form is more work than the module."""
    ours, plain = costs[OURS], costs[PLAIN]
    return plain.flops >= APART * ours.flops > 0 or plain.activation_bytes >= APART * ours.activation_bytes


def repeated(title: str, steps: dict[str, "Step"], rounds: int) -> Comparison:
    """The first round is for warming up, or all there is where it takes too long."""
    first = compare(title, steps, rounds=1, warm_up=False)
    seconds = sum(of[0] for of in first.seconds.values())
    if seconds > MOST_SECONDS:
        return first
    return compare(title, steps, rounds=min(rounds, int(MOST_SECONDS / seconds)), warm_up=False)


class Step:
    """Forward and backward of one image's features, within a network: they get a gradient too."""

    def __init__(self, module: nn.Module, channels: int, side: int) -> None:
        self.module = module.train()
        self.x = torch.randn(1, channels, side, side, requires_grad=True)

    def __call__(self) -> int:
        self.module(self.x).sum().backward()
        self.module.zero_grad()
        self.x.grad = None
        return 1


def peak_bytes(case: Case, channels: int, side: int, plain: bool) -> int:
    """By how much the memory rises in a step; its gradients are part of it, the parameters are not."""
    torch.set_num_threads(1)
    module = case.built(channels, plain=plain)
    Step(module, channels, side=2)()  # what is loaded once is not the step's
    step = Step(module, channels, side)
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def promised(found: dict[str, list[Measured]]) -> dict[str, tuple[float, float]]:
    """From the last map but one to the last, by name of what is promised: what was found, and the least of it."""
    bars: dict[str, tuple[float, float]] = {}
    for label, of in found.items():
        small, large = of[-2:]
        sides = f"{small.side}² over {large.side}²"
        if small.case.name in ("non_local", "dual"):
            a_place = [each.costs[OURS].activation_bytes / each.side**2 for each in (small, large)]
            bars[f"{label}: bytes kept for a place, {sides} (1: linear in N)"] = (a_place[0] / a_place[1], 0.95)
            whole_map = PLACE_BY_PLACE * large.side**4
            bars[f"{label}: a map of N x N over all memory of a step at {large.side}²"] = (
                whole_map / large.peak[OURS], 2.0
            )  # fmt: skip
        if small.case.name == "criss_cross":
            a_pair = [attention_flops(e.case, e.channels, e.side) / e.side**3 for e in (small, large)]
            bars[f"{label}: its attention's multiply-adds over N (H + W), {sides} (1: as promised)"] = (
                a_pair[0] / a_pair[1], 0.95
            )  # fmt: skip
    return bars


def attention_flops(case: Case, channels: int, side: int) -> int:
    """Of the module's forward pass without convolutions; on the meta device operations are called, and none is done."""
    module = case.built(channels, plain=False).to("meta").requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        module(torch.empty(1, channels, side, side, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if operation is not torch.ops.aten.convolution)


def tables(found: dict[str, list[Measured]]) -> dict[str, list[list[str]]]:
    """Their rows, the heads first, by title."""
    sides = [each.side for each in next(iter(found.values()))]
    steps = [["module", *(f"{what}, {side}²" for what in ("ms", "peak MB") for side in sides)]]
    plain = [["module", *(f"{what}, {side}²" for what in ("time", "kept", "peak") for side in sides)]]
    growth = [["module", "kept", "its plain form's", "FLOPs", "its plain form's"]]
    for label, of in found.items():
        steps.append([label, *(short(e.milliseconds) for e in of), *(short(e.peak[OURS] / 1e6) for e in of)])
        if any(is_apart(each.costs) for each in of):
            ratios = [each.more(what) for what in ("time", "kept", "peak") for each in of]
            plain.append([label, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
            grown = [
                getattr(of[-1].costs[which], figure) / getattr(of[-2].costs[which], figure)
                for figure in ("activation_bytes", "flops") for which in (OURS, PLAIN)
            ]  # fmt: skip
            growth.append([label, *(f"{times:.2f}" for times in grown)])
    return {
        "a step of each module": steps,
        "what the plain form takes, times the module's": plain,
        f"growth from {sides[-2]}² to {sides[-1]}²": growth,
    }


def measured_lines(found: dict[str, list[Measured]], channels: int) -> list[str]:
    of = machine()
    lines = [f"Measured on {date.today()}: one thread of {of['processor']}, torch {of['torch']}, {channels} channels."]
    for title, (head, *rows) in tables(found).items():
        lines += ["", f"**{title[0].upper()}{title[1:]}**", "", *markdown(head, rows)]
    return [*lines, "", EMPTY]


def between(text: str, name: str, lines: Sequence[str]) -> str:
    """The text with these lines between its markers of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"no place to write to: {begin.strip()} and {end}, each on a line of its own, once")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return before + begin + "\n" + "\n".join(lines) + "\n\n" + end + after
