"""From the order of samples to batches on the device: workers read, decode and cut into a ring of reused memory.

order -> a task for each sample -> worker: read, look, draw, decode, cut -> its rows of the ring -> device -> painted

The ring has room for a few micro-batches, uint8, pinned where there is a GPU: nothing is collated, no float is made on
the CPU, and the memory is known before the run begins. A sample that cannot be read is replaced by the next one that
can, the same on every run, and its name travels with the batch, so that the run can count it, log it, and stop when
there are too many. A failure in a worker travels the same way, so that all processes stop at the same step.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ssl_global.data.decode import BadImage, Encoded, look
from ssl_global.data.masks import Masks, cut_mask
from ssl_global.data.order import Order
from ssl_global.data.randomness import VIEWS, stream
from ssl_global.data.source import Source, counted
from ssl_global.data.views import Drawn, augment, cut, cut_shrunk, draw, erase, paint, shrink_of
from ssl_global.data.workers import Submit, num_workers, workers
from ssl_global.errors import UserError
from ssl_global.recipe import Crops, Recipe

REPLACEMENTS = 8  # samples tried in place of a bad one before the data as a whole is called bad (ours)
AHEAD = 2  # micro-batches that wait, ready or in the making, beside the one in use (ours)
SAMPLES_AHEAD = 2  # for each worker, at least: where micro-batches are small, more of them wait (ours)
SAMPLES_AT_ONCE = 8  # that a worker takes, at most: to hand out each by itself costs a tenth of a millisecond (ours)

Batch = dict[str, Any]


class Candidate(NamedTuple):
    """A sample that may be read."""

    key: str
    label: int | np.ndarray  # -1: none; uint8 (K,): 1 for each class that it has
    read: Callable[[], bytes]
    mask: Callable[[], np.ndarray] | None = None  # of the sample's pixels: uint8 (H, W)


class Samples(Protocol):
    """Where samples come from: an indexed source, or a stream."""

    def candidates(self, sample: int) -> Iterator[Candidate]:
        """The sample, then those that may take its place."""


class Indexed:
    """The samples of a source; the neighbours behind a sample may take its place."""

    def __init__(self, source: Source, masks: Masks | None = None) -> None:
        self.source, self.masks = source, masks

    def candidates(self, sample: int) -> Iterator[Candidate]:
        source = self.source
        for tried in range(min(1 + REPLACEMENTS, len(source))):
            used = (sample + tried) % len(source)
            label: int | np.ndarray = -1 if source.labels is None else int(source.labels[used])
            if source.sets is not None:
                label = source.sets.target(used, len(source.classes or ()))
            mask = None if self.masks is None else partial(self.masks.read, used)
            yield Candidate(source.key(used), label, partial(source.read, used), mask)


class Task(NamedTuple):
    """A sample to be decoded once and cut into views `repeats` times."""

    slot: int  # of the ring
    row: int  # of the slot, the first
    epoch: int
    sample: int


@dataclass
class Filled:
    """What is known of a sample besides its pixels, which lie in the ring."""

    key: str = ""
    label: int | np.ndarray = -1
    seeds: list[int] = field(default_factory=list)  # of each repeat
    colours: list[list[np.ndarray]] = field(default_factory=list)  # by kind of crops, by repeat: (count, numbers)
    bad: list[tuple[str, str]] = field(default_factory=list)  # (key, reason) of what could not be read
    lost: str = ""  # why nothing could take its place: the run stops at this batch


class Decoder:
    """What a worker does: one sample into its rows of the ring."""

    def __init__(self, samples: Samples, recipe: Recipe, ring: list[list[Tensor]]) -> None:
        self.samples = samples
        self.data = recipe.data
        self.seed = recipe.seed
        self.kinds = list(recipe.views.groups().values())
        self.ring = ring

    def fill_all(self, tasks: list[Task]) -> list[Filled]:
        return [self.fill(task) for task in tasks]

    def fill(self, task: Task) -> Filled:
        """Never raises: whatever goes wrong is told in the batch, so that all processes stop at the same step."""
        filled = Filled()
        try:
            for filled.key, filled.label, read, mask in self.samples.candidates(task.sample):
                try:
                    return self.views_of(read(), task, filled, mask)
                except BadImage as reason:
                    filled.bad.append((filled.key, str(reason)))
        except UserError as error:  # the data is no longer what it was: no other sample helps
            return self.lost(filled, task, str(error))
        except Exception as error:  # memory is full, a fault of ours
            return self.lost(filled, task, f"{filled.key}: {error!r}")
        first, said = filled.bad[0]
        others = f", nor any of the {len(filled.bad) - 1} samples behind it" if len(filled.bad) > 1 else ""
        return self.lost(filled, task, f"{first} cannot be read ({said}){others}")

    def views_of(self, data: bytes, task: Task, filled: Filled, read_mask: Callable[[], np.ndarray] | None) -> Filled:
        image = look(data, self.data.channels, self.data.max_pixels)
        drawn = self.draw(image.size, task, filled)
        self.cut(image, drawn, task)
        if read_mask is not None:
            mask = read_mask()
            if mask.shape != image.size:
                raise UserError(f"{filled.key}: {image.size} pixels high and wide, and its mask {mask.shape}")
            for row, once in enumerate(drawn, start=task.row):
                cut_mask(mask, once[0], self.ring[task.slot][-1][row])
        for kind, into in zip(self.kinds, self.ring[task.slot], strict=False):
            if kind.augment:
                for row, seed in enumerate(filled.seeds, start=task.row):
                    augment(into[row], kind.augment, self.data.normalisation[0], seed)
        return filled

    def draw(self, size: tuple[int, int], task: Task, filled: Filled) -> list[list[Drawn]]:
        """What chance says of the views, by repeat and kind; seeds and colours are noted."""
        drawn, filled.seeds = [], []
        for repeat in range(self.data.repeats):
            random = stream(self.seed, VIEWS, task.epoch * self.data.repeats + repeat, task.sample)
            filled.seeds.append(int(random.integers(2**63)))
            drawn.append([draw(kind, size, random) for kind in self.kinds])
        filled.colours = [[once[kind].colours for once in drawn] for kind in range(len(self.kinds))]
        return drawn

    def cut(self, image: Encoded, drawn: list[list[Drawn]], task: Task) -> None:
        pixels = [kind.pixels for kind in self.kinds]
        by = shrink_of([pair for once in drawn for pair in zip(once, pixels, strict=True)]) if image.can_shrink else 1
        whole, small = (image.pixels(), None) if by == 1 else (None, image.shrunk(by))
        for row, once in enumerate(drawn, start=task.row):
            for crops, into in zip(once, self.ring[task.slot], strict=False):
                if whole is not None:
                    cut(whole, crops, into[row])
                elif small is not None:
                    cut_shrunk(small, image.size, crops, into[row])

    def lost(self, filled: Filled, task: Task, why: str) -> Filled:
        """Black views: the batch is whole, and the run stops at it, on all processes."""
        for into in self.ring[task.slot]:
            into[task.row : task.row + self.data.repeats] = 0
        self.draw((1, 1), task, filled)
        filled.lost = why
        return filled


class Loader:
    """The batches of one process, in the order of `micro_batches`, whatever the number and kind of workers.

    micro_batches   the images (places in the endless row, times data.repeats) of each
    processes_here  training processes on this machine: they share its cores
    pin             whether the ring is pinned memory, from which a GPU copies by itself
    masks           whether the samples have masks: the last room of a slot is for those of the global views
    """

    def __init__(
        self, samples: Samples, order: Order, recipe: Recipe, micro_batches: Iterable[range], *,
        micro_batch: int, processes_here: int = 1, pin: bool = False, masks: bool = False,
    ) -> None:  # fmt: skip
        self.order = order
        self.data = recipe.data
        self.micro_batches = micro_batches
        self.num_workers = num_workers(recipe.data, processes_here)
        ahead = max(AHEAD, math.ceil(SAMPLES_AHEAD * self.num_workers * recipe.data.repeats / micro_batch))
        num_slots = 1 + (ahead if self.num_workers else 0)
        self.ring = [self.slot(recipe, micro_batch, pin, masks) for _ in range(num_slots)]
        self.decoder = Decoder(samples, recipe, self.ring)

    def slot(self, recipe: Recipe, micro_batch: int, pin: bool, masks: bool) -> list[Tensor]:
        """Room for a micro-batch: uint8 (B, count, C, H, W) for each kind, the channels side by side in memory."""
        shared = self.num_workers > 0 and recipe.data.worker_kind == "processes"

        def room(kind: Crops, channels: int = recipe.data.channels) -> Tensor:
            shape = (micro_batch, kind.count, kind.pixels, kind.pixels, channels)
            memory = torch.zeros(shape, dtype=torch.uint8, pin_memory=pin and not shared)
            return (memory.share_memory_() if shared else memory).permute(0, 1, 4, 2, 3)

        rooms = [room(kind) for kind in recipe.views.groups().values()]
        return [*rooms, room(recipe.views.globals, channels=1)] if masks else rooms

    def describe(self) -> str:
        """One line: "2 threads into a ring of 3 x 64 images, 101 MB"."""
        size = sum(room.numel() for slot in self.ring for room in slot)
        one = {"threads": "thread", "processes": "process"}[self.data.worker_kind]
        by = counted(self.num_workers, one, self.data.worker_kind) if self.num_workers else "the training process"
        return f"{by} into a ring of {len(self.ring)} x {len(self.ring[0][0])} images, {size / 1e6:.0f} MB"

    @contextlib.contextmanager
    def serving(self) -> Iterator[Iterator[Batch]]:
        """The batches; the workers are gone when this ends, however it ends.

        A batch's crops lie in the ring: they are good until the next batch is asked for.
        """
        with workers(self.data, self.num_workers, self.decoder.fill_all) as submit:
            yield self.batches(submit)

    def batches(self, submit: Submit) -> Iterator[Batch]:
        free, begun = deque(range(len(self.ring))), deque[tuple[int, list[tuple[list[Task], Future[list[Filled]]]]]]()
        coming = iter(self.micro_batches)
        while True:
            while free and (images := next(coming, None)) is not None:
                slot = free.popleft()
                begun.append((slot, [(tasks, submit(tasks)) for tasks in self.tasks(slot, images)]))
            if not begun:
                return
            slot, promised = begun.popleft()
            yield self.batch(slot, [filled for some in promised for filled in self.outcome(*some)])
            free.append(slot)

    def tasks(self, slot: int, images: range) -> Iterator[list[Task]]:
        """The samples of a micro-batch, in such parts that each worker gets several."""
        repeats = self.data.repeats
        tasks = [Task(slot, row, *self.order[images[row] // repeats]) for row in range(0, len(images), repeats)]
        part = min(max(len(tasks) // (2 * max(self.num_workers, 1)), 1), SAMPLES_AT_ONCE)
        for first in range(0, len(tasks), part):
            yield tasks[first : first + part]

    def outcome(self, tasks: list[Task], promised: Future[list[Filled]]) -> list[Filled]:
        try:
            return promised.result()
        except BrokenExecutor:
            why = "a decoding process was killed; is there enough memory?"
            return [self.decoder.lost(Filled(), task, why) for task in tasks]

    def batch(self, slot: int, filled: list[Filled]) -> Batch:
        """{"crops": [uint8 (B, count, C, H, W) for each kind, and masks], "colours": [(B, count, numbers)...], ...}."""
        repeats = self.data.repeats
        kinds = range(len(self.decoder.kinds))
        return {
            "crops": self.ring[slot],
            "colours": [torch.from_numpy(np.stack([c for f in filled for c in f.colours[kind]])) for kind in kinds],
            "seed": torch.tensor([seed for f in filled for seed in f.seeds], dtype=torch.int64),
            "label": stacked([f.label for f in filled for _ in range(repeats)]),
            "key": [f.key for f in filled for _ in range(repeats)],
            "bad": [bad for f in filled for bad in f.bad],
            "lost": [f.lost for f in filled if f.lost],
        }


def stacked(labels: list[int | np.ndarray]) -> Tensor:
    """int64 (B,), or uint8 (B, K) of sets of classes, without any where a sample was lost."""
    rows = [label for label in labels if isinstance(label, np.ndarray)]
    if not rows:
        return torch.tensor(labels, dtype=torch.int64)
    return torch.from_numpy(np.stack([x if isinstance(x, np.ndarray) else np.zeros_like(rows[0]) for x in labels]))


def ahead_on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches with their crops on the device: while one is used, the next is copied beside the work."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    ready: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            crops = [kind.to(device, non_blocking=True) for kind in batch["crops"]]
            copied = side.record_event()
        if ready is not None:
            yield ready
        copied.synchronize()  # long past: it was begun a step ago. From here on the ring's memory may be written again
        for kind in crops:
            kind.record_stream(torch.cuda.current_stream(device))
        ready = batch | {"crops": crops}
    if ready is not None:
        yield ready


def to_device(batch: Batch, recipe: Recipe, device: torch.device) -> Batch:
    """A loaded batch as a method wants it: painted, normalised views on the device."""
    views: list[Tensor] = []
    seeds = batch["seed"].tolist()
    kinds = recipe.views.groups().values()
    for kind, crops, colours in zip(kinds, batch["crops"], batch["colours"], strict=False):  # masks have no colours
        painted = paint(crops.to(device, non_blocking=True), colours, *recipe.data.normalisation)
        if kind.erase:
            for view in painted:
                erase(view, kind.erase, seeds)
        views += painted
    return {
        "views": views,
        "seed": batch["seed"].to(device, non_blocking=True),
        "seeds": seeds,
        "label": batch["label"].to(device, non_blocking=True),
        "key": batch["key"],
        "mask": batch["crops"][-1][:, 0, 0].to(device).long() if len(batch["crops"]) > len(kinds) else None,
    }
