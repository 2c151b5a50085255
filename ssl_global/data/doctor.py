"""Everything of a source is read once: which samples are bad, and how fast the rest can be served.

A run only counts and replaces what it cannot read; here each bad sample is named with its shard, its byte and the
reason. A damaged shard, with which no run would begin, is reported and the others are looked at all the same.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ssl_global.data.decode import BadImage, decode
from ssl_global.data.loader import Indexed, Loader
from ssl_global.data.order import Order
from ssl_global.data.progress import report
from ssl_global.data.source import ShardSource, Source, list_shards, open_source
from ssl_global.data.workers import in_order, num_cores, num_workers, workers
from ssl_global.errors import UserError
from ssl_global.recipe import Data, Recipe

SECONDS = 3.0  # for which each number of workers is timed, at least (ours)
MICRO_BATCH = 32  # images at once while it is timed (ours)


@dataclass(frozen=True)
class Finding:
    """Something that cannot be used."""

    place: str  # shard and byte, or file
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    described: str
    num_images: int  # that were read
    damaged_shards: list[Finding]
    bad_images: list[Finding]
    images_per_second: dict[int, float]  # of the recipe's views, by number of workers; empty: nothing to read


def diagnose(path: str, recipe: Recipe, *, progress: bool = True) -> Diagnosis:
    """Reads and decodes every image at `path`, then times the recipe's views of the good ones."""
    source, damaged = open_what_is_whole(path)
    if source is None:
        return Diagnosis(f"no shard of {path} is whole", 0, damaged, [], {})
    bad = dict(bad_images(source, recipe.data, progress=progress))
    rates = {}
    if len(bad) < len(source):
        most = recipe.data.workers or num_cores()
        rates = {count: images_per_second(source, recipe, count) for count in sorted({1, most})}
    found = [Finding(source.place(index), reason) for index, reason in bad.items()]
    return Diagnosis(source.describe(), len(source), damaged, found, rates)


def open_what_is_whole(path: str) -> tuple[Source | None, list[Finding]]:
    """The source, without its damaged shards."""
    shards = list_shards(path)
    if shards is None:
        return open_source(path), []
    whole, damaged = [], []
    for shard in shards:
        try:
            ShardSource(shard, [shard])
            whole.append(shard)
        except UserError as error:
            damaged.append(Finding(shard, str(error).removeprefix(f"{shard}: ")))
    return (ShardSource(path, whole) if whole else None), damaged


def bad_images(source: Source, data: Data, *, progress: bool) -> Iterator[tuple[int, str]]:
    """(index, reason) of each image that cannot be used."""

    def reason(index: int) -> str | None:
        try:
            decode(source.read(index), data.channels, data.max_pixels)
        except (BadImage, UserError) as error:
            return str(error)
        return None

    count = num_workers(data, processes_here=1)
    with (
        workers(replace(data, worker_kind="threads"), count, reason) as submit,
        report("read", len(source), visible=progress) as done,
    ):
        for index, said in enumerate(in_order(submit, range(len(source)), ahead=4 * count)):
            done(index + 1)
            if said is not None:
                yield index, said


def images_per_second(source: Source, recipe: Recipe, count: int) -> float:
    """How fast `count` workers serve the recipe's views, over and over, from a warm cache."""
    timed = replace(recipe, data=replace(recipe.data, workers=count, last_batch="carry", repeats=1))
    images = (range(first, first + MICRO_BATCH) for first in range(0, 2**62, MICRO_BATCH))
    loader = Loader(Indexed(source), Order.of(source.bounds, timed), timed, images, micro_batch=MICRO_BATCH)
    with loader.serving() as served:
        for _ in range(len(loader.ring)):  # what was begun before the clock
            next(served)
        begin, taken = time.monotonic(), 0
        while time.monotonic() - begin < SECONDS:
            next(served)
            taken += MICRO_BATCH
        return taken / (time.monotonic() - begin)


def advice(diagnosis: Diagnosis, gpu_images_per_second: float) -> list[str]:
    """What the measured speed means for a machine with GPUs."""
    if not diagnosis.images_per_second:
        return []
    alone = diagnosis.images_per_second[1]
    most, together = max(diagnosis.images_per_second.items())
    by_more = f", {together:.0f} by {most}" if most > 1 else ""
    lines = [f"views    {alone:.0f} images/s by one worker{by_more}"]
    needed = math.ceil(gpu_images_per_second / alone)
    feeds = together / most * num_cores() / gpu_images_per_second
    lines.append(
        f"feeding  a GPU that takes {gpu_images_per_second:g} images/s needs {needed} workers; this machine's "
        f"{num_cores()} cores feed {feeds:.1f} of them"
    )
    return lines
