"""From positions in the data's order to batches: worker processes read, decode and cut; nothing random has a state.

A sample that cannot be read is replaced by the next one that can, the same on every run, and its name travels with the
batch, so that the run can count it, log it, and stop when there are too many.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_global.data.decode import BadImage, decode
from ssl_global.data.order import Order
from ssl_global.data.randomness import VIEWS, stream
from ssl_global.data.source import Source
from ssl_global.data.views import cut, draw, paint
from ssl_global.errors import UserError
from ssl_global.recipe import Data, Recipe, Views

REPLACEMENTS = 8  # samples tried in place of a bad one before the data as a whole is called bad (ours)


class Samples(Dataset):
    """Position -> the crops of a sample, the colours to paint them with, its seed, key and label."""

    def __init__(self, source: Source, order: Order, views: Views, channels: int) -> None:
        self.source = source
        self.order = order
        self.views = views
        self.channels = channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, sample = self.order[position]
        image, used, bad = read_or_replace(self.source, sample, self.channels)
        if lost := image is None:
            image = torch.zeros(self.channels, 1, 1, dtype=torch.uint8)  # the run stops at this batch
        random = stream(self.order.seed, VIEWS, epoch, sample)
        seed = int(random.integers(2**63))
        crops, colours = [], []
        for kind in self.views.groups().values():
            drawn = draw(kind, (image.shape[1], image.shape[2]), random)
            crops.append(cut(image, drawn, kind.pixels))
            colours.append(torch.from_numpy(drawn.colours))
        label = -1 if self.source.labels is None else int(self.source.labels[used])
        return {
            "crops": crops,
            "colours": colours,
            "seed": seed,
            "key": self.source.key(used),
            "label": label,
            "bad": bad,
            "lost": lost,
        }


def read_or_replace(source: Source, sample: int, channels: int) -> tuple[Tensor | None, int, list[tuple[str, str]]]:
    """(image, which sample it is, [(key, reason) of those that could not be read]).

    The image is None when the sample and all its replacements are bad: it is for all processes together to stop.
    """
    bad: list[tuple[str, str]] = []
    for tried in range(min(1 + REPLACEMENTS, len(source))):
        used = (sample + tried) % len(source)
        try:
            return decode(source.read(used), channels), used, bad
        except (BadImage, UserError) as error:  # of the image, of its shard
            bad.append((source.key(used), str(error)))
    return None, used, bad


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> {"crops": [uint8 (B, count, C, H, W) for each kind], "colours": [(B, count, numbers)...], ...}."""
    return {
        "crops": [torch.stack(kind) for kind in zip(*(s["crops"] for s in samples), strict=True)],
        "colours": [torch.stack(kind) for kind in zip(*(s["colours"] for s in samples), strict=True)],
        "seed": torch.tensor([s["seed"] for s in samples], dtype=torch.int64),
        "label": torch.tensor([s["label"] for s in samples], dtype=torch.int64),
        "key": [s["key"] for s in samples],
        "bad": [bad for s in samples for bad in s["bad"]],
        "lost": sum(s["lost"] for s in samples),
    }


def loader(
    source: Source, recipe: Recipe, positions: Iterator[list[int]], *, processes_here: int, pin: bool
) -> DataLoader[dict[str, Any]]:
    """Batches of samples at `positions`, in that order, whatever the number of workers.

    processes_here  training processes on this machine: they share its cores
    """
    order = Order(len(source), recipe.seed)
    return DataLoader(
        Samples(source, order, recipe.views, recipe.data.channels),
        batch_sampler=positions,  # any iterable of lists does
        collate_fn=collate,
        num_workers=num_workers(recipe.data, processes_here),
        worker_init_fn=outlive_signals,
        pin_memory=pin,
    )


@contextlib.contextmanager
def serving(batches: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The loader's batches; its workers are gone when this ends, however it ends.

    They ignore signals, and an error's traceback would keep the iterator, and so the workers, alive for ever.
    """
    iterator = iter(batches)
    try:
        yield iterator
    finally:
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def num_workers(data: Data, processes_here: int) -> int:
    """As the recipe says, or a share of this machine's cores, at least 1 and at most 8 (ours)."""
    if data.workers is not None:
        return data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // processes_here - 1, 1), 8)


def outlive_signals(worker: int) -> None:
    """A signal reaches the whole process group: workers must serve the step after which the run is saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def to_device(batch: dict[str, Any], data: Data, device: torch.device) -> dict[str, Any]:
    """A loaded batch as a method wants it: painted, normalised views on the device."""
    views: list[Tensor] = []
    for crops, colours in zip(batch["crops"], batch["colours"], strict=True):
        views += paint(crops.to(device, non_blocking=True), colours, data.mean, data.std)
    return {
        "views": views,
        "seed": batch["seed"].to(device, non_blocking=True),
        "label": batch["label"].to(device, non_blocking=True),
        "key": batch["key"],
    }
