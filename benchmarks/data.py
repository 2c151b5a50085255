"""The data river against the published pipelines: views, end to end, reading, coming back, and a second core.

    python -m benchmarks data --images photos/ --out data.json

Everything is on the CPU, one thread unless said. What DINO's colours cost on the device is not part of it: the
published pipeline does them on the CPU, ours where the model is.
"""

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchcodec.decoders import decode_jpeg

from benchmarks.images import write_photographs, write_tiny_shards
from benchmarks.measure import Comparison, compare, report
from benchmarks.reference import views as reference
from ssl_global.command_line import find
from ssl_global.data.decode import FORMATS
from ssl_global.data.loader import Candidate, Decoder, Indexed, Loader, Task
from ssl_global.data.order import Order
from ssl_global.data.pack import pack
from ssl_global.data.source import ShardSource, Source, open_source
from ssl_global.recipe import Data, Recipe, Train

BATCH = 64
BATCHES = 10  # of a round
PARTS = ("views", "loader", "reading", "resume", "cores")


def main() -> None:
    tyro.cli(run, prog="python -m benchmarks data")


def run(
    images: Path | None = None,
    rounds: int = 9,
    samples: int = 1_000_000,
    parts: tuple[str, ...] = PARTS,
    out: Path | None = None,
) -> None:
    """Compares the data river with the published pipelines.

    Args:
        images: Folder of JPEGs; by default 160 are cut from scikit-image's photographs.
        rounds: Of each comparison.
        samples: Of the epoch in which a run is stopped at nine tenths.
        parts: Of the benchmark: views, loader, reading, resume, cores.
        out: File for all figures, JSON.
    """
    torch.set_num_threads(1)
    comparisons: list[Comparison] = []
    bars: dict[str, tuple[float, float]] = {}
    with photographs(images) as folder:
        source = open_source(str(folder))
        for part in parts:
            measured = {"views": views, "loader": loader, "reading": reading, "resume": resume, "cores": cores}[part]
            found, promised = measured(source, rounds, samples)
            comparisons += found
            bars |= promised
    report(comparisons, bars, out)


Result = tuple[list[Comparison], dict[str, tuple[float, float]]]


def views(source: Source, rounds: int, _: int) -> Result:
    """One image's views in memory, from its bytes in memory: what a core does for an image."""
    files = [source.read(index) for index in range(len(source))]
    comparisons, bars = [], {}
    for name, transform, bar in (("dino", reference.dino, 8.0), ("mae", reference.mae, 2.0)):
        decoder = Loader(InMemory(files), order(source), recipe(name), [], micro_batch=BATCH).decoder
        options = {
            "reference": partial(each, files, partial(transformed, transform)),
            "ours": partial(each, range(len(files)), partial(filled, decoder)),
            "decoding alone": partial(each, files, decode_jpeg),
        }
        comparison = compare(f"{name}: views of an image, CPU part", options, rounds=rounds)
        comparisons.append(comparison)
        bars[f"{name}: images/s over the reference's"] = (comparison.ratio("ours"), bar)
        share = comparison.ratio("decoding alone") / comparison.ratio("ours")
        print(f"{name}: ours takes {share:.2f} times as long as decoding the whole JPEG alone")
    return comparisons, bars


def loader(source: Source, rounds: int, _: int) -> Result:
    """MAE's batches, from files on the disk: ImageFolder and DataLoader against the ring, with as many workers."""
    comparisons, bars = [], {}
    for workers in (1, 2):
        sampler = RandomSampler(Files(source), num_samples=BATCHES * BATCH, replacement=True)
        theirs = DataLoader(
            Files(source), batch_size=BATCH, sampler=sampler, num_workers=workers, persistent_workers=True
        )
        options = {"reference": partial(gone_through, theirs), "ours": partial(drained, source, recipe("mae", workers))}
        comparison = compare(f"mae: batches, {workers} worker(s) or thread(s)", options, rounds=rounds)
        comparisons.append(comparison)
        bars[f"mae: batches with {workers} over the reference's"] = (comparison.ratio("ours"), 2.2)
    return comparisons, bars


def reading(source: Source, rounds: int, _: int) -> Result:
    """The bytes of shards, shuffled: webdataset's reader against ours."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        copies = Path(folder, "copies")
        copies.mkdir()
        for number in range(8):
            for index in range(len(source)):
                (copies / f"{number}-{index:05d}.jpg").write_bytes(source.read(index))
        packed = pack(open_source(str(copies)), shards, shard_bytes=20_000_000, processes=1, progress=False)
        indexed = open_source(str(shards))
        places = order(indexed)
        names = [str(path) for path in packed.shards]

        def streamed() -> int:
            dataset = webdataset.WebDataset(names, shardshuffle=len(names), seed=0).shuffle(1000)
            return sum(1 for _ in dataset)

        def at_random() -> int:
            return each(range(len(indexed)), lambda place: indexed.read(places[place][1]))

        comparison = compare(
            "reading a shuffled epoch's bytes", {"webdataset": streamed, "ours": at_random}, rounds=rounds
        )
    return [comparison], {"reading: samples/s over webdataset's": (comparison.ratio("ours"), 1.0)}


def resume(_: Source, rounds: int, samples: int) -> Result:
    """From the start of a process's data to the first batch at nine tenths of an epoch of `samples`."""
    stopped_at = samples * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_shards(Path(folder), samples, per_shard=10_000)
        names = sorted(str(path) for path in Path(folder).glob("*.tar"))
        small = recipe("mae")
        ShardSource(folder, names)  # the indexes are beside the shards, as they are when a run comes back

        def skipped() -> int:
            dataset = webdataset.WebDataset(names, shardshuffle=len(names), seed=0).shuffle(1000)
            for sample in islice(dataset, stopped_at, stopped_at + BATCH):
                reference.mae(opened(sample["jpg"]))
            return 1

        def looked_up() -> int:
            source = open_source(folder)
            assert source.fingerprint
            begin = stopped_at // BATCH * BATCH
            return one(Loader(Indexed(source), order(source), small, [range(begin, begin + BATCH)], micro_batch=BATCH))

        options = {"webdataset": skipped, "ours": looked_up}
        comparison = compare(f"first batch at 90 % of {samples} samples", options, rounds=min(rounds, 3), warm_up=False)
    return [comparison], {"resume: first batch, times faster": (comparison.ratio("ours"), 10.0)}


def cores(source: Source, rounds: int, _: int) -> Result:
    """DINO's views with one thread and with two."""
    options = {
        name: partial(drained, source, recipe("dino", workers))
        for workers, name in ((1, "one thread"), (2, "two threads"))
    }
    comparison = compare("dino: batches by a second thread", options, rounds=rounds)
    return [comparison], {"cores: two threads over twice one": (comparison.ratio("two threads") / 2, 0.9)}


# --------------------------------------------------------------------------------------------------------------- parts


class InMemory:
    """Samples whose bytes are there already."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def candidates(self, sample: int) -> Iterator[Candidate]:
        yield Candidate("", -1, lambda: self.files[sample])


class Files(Dataset[torch.Tensor]):
    """As torchvision's ImageFolder, of the source's files."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.source.place(index), formats=FORMATS) as image:
            return reference.mae(image.convert("RGB"))


def recipe(name: str, workers: int = 0) -> Recipe:
    _, _, build = find(f"{name}:recipe")
    return replace(build(), data=Data(workers=workers), train=Train(steps=1, global_batch=BATCH))


def order(source: Source) -> Order:
    return Order(source.bounds, 0, block=8, window=1024)


def drained(source: Source, made: Recipe) -> int:
    """Begun and ended within the measured time: no batch waits from before."""
    images = [range(first, first + BATCH) for first in range(0, BATCHES * BATCH, BATCH)]
    with Loader(Indexed(source), order(source), made, images, micro_batch=BATCH).serving() as served:
        return sum(len(batch["key"]) for batch in served)


def one(loader: Loader) -> int:
    with loader.serving() as served:
        next(served)
    return 1


def gone_through(batches: DataLoader[torch.Tensor]) -> int:
    return sum(len(batch) for batch in batches)


def filled(decoder: Decoder, number: int) -> None:
    assert not decoder.fill(Task(0, number % BATCH, 0, number)).lost


def transformed(transform: Callable[[Image.Image], object], data: bytes) -> None:
    transform(opened(data))


def each(items: Sequence[Any], work: Callable[[Any], object]) -> int:
    for item in items:
        work(item)
    return len(items)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")


@contextmanager
def photographs(images: Path | None) -> Iterator[Path]:
    if images:
        yield images
        return
    folder = Path(tempfile.mkdtemp())
    try:
        write_photographs(folder, 160)
        yield folder
    finally:
        shutil.rmtree(folder)
