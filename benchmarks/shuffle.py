"""How well the order shuffles class-sorted shards, against a true permutation: the figures in ssl_global/data/order.py.

python -m benchmarks shuffle
"""

from pathlib import Path

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ssl_global.data.order import Order
from ssl_global.recipe import Data

CLASSES = 1000
BATCH = 512
MEASURED_BATCHES = 400


def main() -> None:
    tyro.cli(run, prog="python -m benchmarks shuffle")


def run(shards: int = 1281, per_shard: int = 1000, seed: int = 0, out: Path | None = None) -> None:
    """Measures the order of samples that lie in their shards class by class.

    Args:
        shards: Number of shards.
        per_shard: Samples in each.
        seed: Of the order.
        out: File for the table, as text.
    """
    total = shards * per_shard
    data = Data()
    order = Order(np.arange(shards + 1) * per_shard, seed, block=data.shuffle_block, window=data.shuffle_window)
    count = min(BATCH * MEASURED_BATCHES, total // BATCH * BATCH)
    ours = figures(np.array([order[place][1] for place in range(count)]), total, per_shard)
    true = figures(np.random.default_rng(seed).permutation(total)[:count], total, per_shard)
    title = f"{shards} shards of {per_shard}, {CLASSES} classes in a row, batches of {BATCH}"
    table = Table("", "ours", "a true permutation", title=title, box=SIMPLE_HEAD)
    for name in ours:
        table.add_row(name, f"{ours[name]:.4g}", f"{true[name]:.4g}")
    console = Console(width=120, record=True)
    console.print(table)
    if out:
        out.write_text(console.export_text())


def figures(samples: np.ndarray, total: int, per_shard: int) -> dict[str, float]:
    """Of the first samples of an epoch."""
    batches = (samples * CLASSES // total).reshape(-1, BATCH)
    shard = samples // per_shard
    return {
        "rank correlation of the order with the data's": rank_correlation(samples),
        "share of neighbours that are of one shard": float((shard[1:] == shard[:-1]).mean()),
        "share of neighbours that were neighbours": float((np.abs(np.diff(samples)) == 1).mean()),
        "classes in a batch": float(np.mean([len(np.unique(batch)) for batch in batches])),
        "images of a batch's most frequent class": float(np.mean([np.bincount(batch).max() for batch in batches])),
    }


def rank_correlation(samples: np.ndarray) -> float:
    """Spearman's, between when a sample comes and where it lies."""
    ranks = samples.argsort().argsort()
    return float(np.corrcoef(ranks, np.arange(len(samples)))[0, 1])
