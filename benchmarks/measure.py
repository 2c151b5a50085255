"""Fair comparisons on a machine that others use too: options take turns, ratios are taken within a round.

A round runs every option once, each round beginning with another one. An option's figure is its median over the
rounds; a ratio is the median of the rounds' ratios, so a slow minute slows both sides of it.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import ssl_global


@dataclass
class Comparison:
    """Seconds per item of each option in each round."""

    title: str
    reference: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, option: str) -> float:
        """How many times faster than the reference."""
        return median(a / b for a, b in zip(self.seconds[self.reference], self.seconds[option], strict=True))

    def figures(self) -> dict[str, Any]:
        return {
            option: {
                "milliseconds": 1e3 * median(seconds),
                "spread": [1e3 * value for value in (min(seconds), max(seconds))],
                "per_second": 1 / median(seconds),
                "times_reference": self.ratio(option),
            }
            for option, seconds in self.seconds.items()
        }

    def table(self) -> Table:
        table = Table("", "ms", "least", "most", "per second", f"x {self.reference}", title=self.title, box=SIMPLE_HEAD)
        for option, figure in self.figures().items():
            least, most = figure["spread"]
            numbers = [figure["milliseconds"], least, most, figure["per_second"], figure["times_reference"]]
            forms = ["{:.3f}", "{:.3f}", "{:.3f}", "{:,.3g}" if figure["per_second"] < 100 else "{:,.0f}", "{:.2f}"]
            table.add_row(option, *[form.format(number) for form, number in zip(forms, numbers, strict=True)])
        return table


def compare(title: str, options: Mapping[str, Callable[[], int]], *, rounds: int, warm_up: bool = True) -> Comparison:
    """Runs each option `rounds` times; an option does its work and returns how many items it did. The first is the
    reference."""
    names = list(options)
    if warm_up:
        for option in options.values():
            option()
    comparison = Comparison(title, names[0], {name: [] for name in names})
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            items = options[name]()
            comparison.seconds[name].append((time.perf_counter() - begin) / items)
    return comparison


def report(comparisons: list[Comparison], bars: dict[str, tuple[float, float]], out: Path | None) -> None:
    """Tables, then each figure that was promised beside what was promised; all of it to `out` as JSON."""
    console = Console(width=120)
    for comparison in comparisons:
        console.print(comparison.table())
    promised = Table("figure", "measured", "promised", title="what is promised", box=SIMPLE_HEAD)
    for name, (measured, bar) in bars.items():
        promised.add_row(name, f"{measured:.3f}", f"at least {bar:g}", style="" if measured >= bar else "red")
    if bars:
        console.print(promised)
    if out:
        content = {
            "machine": machine(),
            "comparisons": {comparison.title: comparison.figures() for comparison in comparisons},
            "promised": {name: {"measured": measured, "bar": bar} for name, (measured, bar) in bars.items()},
        }
        out.write_text(json.dumps(content, indent=2) + "\n")


def alone(work: Callable[..., int], *arguments: object) -> int:
    """The work's result, in a process that has done nothing before but import what it needs."""
    context = get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(work, *arguments).result()


def resident(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far.

    resource.getrusage would do on other systems too, but begins with what the parent had in memory.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def machine() -> dict[str, str]:
    return {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ssl_global": str(Path(ssl_global.__file__).parent),
    }


def processor() -> str:
    """Its name, where the system says it (Linux), or its kind."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
