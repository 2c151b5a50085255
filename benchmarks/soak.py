"""Whether memory stays flat: 200 000 tiny images through the loader, resident memory every few thousand.

python -m benchmarks soak
"""

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.images import write_tiny_shards
from ssl_global.command_line import find
from ssl_global.data.loader import Indexed, Loader, to_device
from ssl_global.data.order import Order
from ssl_global.data.source import open_source
from ssl_global.recipe import Crops, Data, Views

BATCH = 64
MEGABYTE = 2**20


def main() -> None:
    tyro.cli(run, prog="python -m benchmarks soak")


def run(
    samples: int = 200_000,
    workers: int = 2,
    worker_kind: Literal["threads", "processes"] = "threads",
    out: Path | None = None,
) -> None:
    """Serves many samples and watches this process's memory.

    Args:
        samples: To be served, over and over from a tenth as many.
        workers: Threads or processes.
        worker_kind: Which of them.
        out: File for the figures, JSON.
    """
    torch.set_num_threads(1)
    _, _, build = find("dino:demo")
    views = Views(globals=Crops(count=2, pixels=16, jitter=0.8, grey=0.2, blur=(0.5,)))
    data = Data(workers=workers, worker_kind=worker_kind)
    recipe = replace(build(), views=views, data=data)
    seen: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_shards(Path(folder), samples // 10, per_shard=2000)
        source = open_source(folder)
        order = Order(source.bounds, 0, block=data.shuffle_block, window=data.shuffle_window)
        images = (range(first, first + BATCH) for first in range(0, samples, BATCH))
        begin = time.monotonic()
        with Loader(Indexed(source), order, recipe, images, micro_batch=BATCH).serving() as served:
            for number, batch in enumerate(served):
                to_device(batch, recipe, torch.device("cpu"))
                if (number + 1) * BATCH % max(samples // 20 // BATCH * BATCH, BATCH) == 0:
                    seen.append(((number + 1) * BATCH, resident_bytes() / MEGABYTE))
        seconds = time.monotonic() - begin
    show(seen, seconds, samples, out)


def resident_bytes() -> int:
    """Of this process, now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def show(seen: list[tuple[int, float]], seconds: float, samples: int, out: Path | None) -> None:
    settled = np.array(seen[len(seen) // 5 :])  # caches of the first epochs are full
    growth = float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0]) * 1e6 if len(settled) > 1 else 0.0
    table = Table("samples", "resident MB", title=f"{samples} samples in {seconds:.0f} s", box=SIMPLE_HEAD)
    for count, megabytes in seen:
        table.add_row(f"{count:,}", f"{megabytes:.1f}")
    console = Console(width=100)
    console.print(table)
    console.print(f"growth after the first fifth: {growth:+.2f} MB a million samples")
    if out:
        figures = {"samples": samples, "seconds": seconds, "resident_mb": seen, "growth_mb_per_million": growth}
        out.write_text(json.dumps(figures, indent=2) + "\n")
