"""From any source to webdataset .tar shards, looking at every image once.

    NAME-000000.tar ...     000000000.jpg, 000000000.cls, ...: numbered as in the source
    classes.json            the labels' names, if the source has them
    NAME-summary.json       what was packed, what was broken and left out, what is there twice; mean and deviation
    NAME-pack.json          of which images and with which options: by it a later call sees that it is to go on

All bytes are a function of the source's images and of the options, not of the number of processes or of any stop in
between. A shard is there whole or not at all; its share of the summary is kept in a hidden file beside it until the
summary is written. Where every image that was meant for a shard is broken, there is no such shard, and its number is
left out.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

import numpy as np
import tifffile
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from rich.filesize import decimal
from torch import Tensor

from ssl_global.data.decode import FORMATS, BadImage, decode
from ssl_global.data.progress import report
from ssl_global.data.shards import BLOCK
from ssl_global.data.source import Source, counted
from ssl_global.data.workers import MOST_WORKERS, num_cores
from ssl_global.errors import UserError, wrong

QUALITY = 92  # of JPEG (ours)
MIN_RESIZE = 16  # pixels: one patch (ours)
IMAGES_TO_ESTIMATE = 64  # by which new sizes are foretold (ours)
MOST_LISTED = 1000  # broken images and duplicates named in the summary; all are counted (ours)
SECONDS_TO_WAIT = 10.0  # for the workers of a call that was killed: they end with the image at hand (ours)

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
GREY = frozenset(("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I", "F"))  # Pillow's modes
MAX_JPEG_SIDE = 65500  # libjpeg's JPEG_MAX_DIMENSION
TIFF_BANDS = 277  # the tag SamplesPerPixel

END_MARK = 2 * BLOCK  # of a .tar
SHARD_NUMBER = r"-\d{6,}\.tar"
MAX_NAME = 100  # characters: file systems take 255 (ours)
FEW = 3  # broken images and duplicates that are named to people (ours)


@dataclass(frozen=True)
class Packed:
    """What `pack` has made."""

    shards: list[Path]
    written: int  # of them in this call; the others were whole already
    num_images: int  # in them
    summary: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """All that a worker has to know."""

    source: Source
    out: Path
    name: str
    resize: int | None
    quality: int | None
    shards: list[range]  # the images that are meant for each

    def shard(self, number: int) -> Path:
        return self.out / f"{self.name}-{number:06d}.tar"

    def figures(self, number: int) -> Path:
        return self.out / f".{self.name}-{number:06d}.json"

    @property
    def summary(self) -> Path:
        return self.out / f"{self.name}-summary.json"


def pack(
    source: Source,
    out: Path,
    *,
    shard_bytes: int,
    processes: int | None = None,
    resize: int | None = None,
    quality: int | None = None,
    progress: bool = True,
) -> Packed:
    """Writes the source's images, in their order, to shards in the folder `out`.

    shard_bytes   a shard is closed before it would grow beyond this; one image that is larger gets its own. Kept only
                  about where images are written anew: by how much they shrink is estimated from a few
    processes     that read, decode and write, each a shard of its own; by default one a core, 16 at most
    resize        images whose shorter side is larger are shrunk to it and become JPEG; the others stay as they are
    quality       of those JPEG; without `resize`, every image becomes a JPEG of its own size

    After a stop, the same call goes on with the missing shards. Raises UserError if images or options are others than
    then, if `out` holds other shards or has no space, or if none of the images can be read.
    """
    check_options(shard_bytes, processes, resize, quality)
    name = name_of(source.path)
    note = out / f"{name}-pack.json"
    prepare_folder(source, out, name, note)
    with alone(note):
        settings = settings_of(source, shard_bytes, resize, quality)
        if (begun := read_json(note)) is not None:
            refuse_change(note, begun, settings)
            settings = begun
        else:
            remove_leftovers(out, name)
            (out / f"{name}-summary.json").unlink(missing_ok=True)
            if resize or quality:
                settings["ratio"] = estimate(source, resize, quality)
        sizes = tar_sizes(source, settings.get("ratio", 1.0))
        job = Job(source, out, name, resize, quality, plan(sizes, shard_bytes))
        missing = find_missing(job)
        if not (resize or quality):
            check_space(job, missing, sizes)
        if begun is None:
            with writing(note):
                note.write_bytes(as_json(settings))  # no new file in its place: this one is locked
        write_shards(job, missing, processes or min(num_cores(), MOST_WORKERS), progress)
        summary = finish(job, note)
    shards = {number: path for number in range(len(job.shards)) if (path := job.shard(number)).exists()}
    return Packed(list(shards.values()), len(shards.keys() & set(missing)), summary["images"], summary)


def check_options(shard_bytes: int, processes: int | None, resize: int | None, quality: int | None) -> None:
    if shard_bytes < 1:
        raise wrong("shard_bytes", shard_bytes, "at least 1; 256 MB is usual")
    if processes is not None and processes < 1:
        raise wrong("processes", processes, "at least 1")
    if resize is not None and resize < MIN_RESIZE:
        raise wrong("resize", resize, f"pixels of the shorter side, at least {MIN_RESIZE}")
    if quality is not None and not 1 <= quality <= 100:
        raise wrong("quality", quality, f"of JPEG, from 1 to 100; {QUALITY} is usual")


def name_of(path: str) -> str:
    """ "train" of "s3://bucket/train-{000..099}.tar": of characters that all file systems and globs take."""
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        path = re.sub(r"^[A-Za-z][\w+.-]*:|\{[^{}]*\}|\[[^\[\]]*\]|[*?{}\[\]]", "", path)
    last = os.path.basename(os.path.abspath(path)).removesuffix(".tar")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", last).strip("._-")[:MAX_NAME] or "images"


# ----------------------------------------------------------------------------------------------------------- beginning


def prepare_folder(source: Source, out: Path, name: str, note: Path) -> None:
    """Makes `out`, and refuses what somebody else has put there."""
    if os.path.realpath(out) == os.path.realpath(os.path.expanduser(source.path)):
        raise UserError(f"{out}: holds the images themselves; give another folder for the shards")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if not note.exists() and shards_named(out, name):
            raise UserError(f"{out}: holds {name}-*.tar from elsewhere; give another folder for the shards")
        classes = out / "classes.json"
        if source.labels is not None and classes.exists() and read_json(classes) != source.classes:
            raise UserError(f"{classes}: names other classes than these images; give another folder for the shards")


def shards_named(folder: Path, name: str) -> list[Path]:
    pattern = re.compile(re.escape(name) + SHARD_NUMBER)
    return sorted(folder / file for file in os.listdir(folder) if pattern.fullmatch(file))


@contextlib.contextmanager
def alone(note: Path) -> Iterator[None]:
    """Waits for workers that a killed call left, and keeps a second call out. Leaves no empty note behind."""
    with writing(note):
        file = note.open("ab")
    with file:
        lock(file, note)
        try:
            yield
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                note.unlink(missing_ok=True)


def lock(file: BinaryIO, note: Path) -> None:
    until = time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise UserError(f"{note}: another process is packing these images to here; wait for its end") from error
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return None


def settings_of(source: Source, shard_bytes: int, resize: int | None, quality: int | None) -> dict[str, Any]:
    labels = None if source.labels is None else hashlib.sha256(source.labels.astype("<i8").tobytes()).hexdigest()[:16]
    what = {"images": source.fingerprint, "labels": labels}
    return what | {"shard_bytes": shard_bytes, "resize": resize, "quality": quality}


def refuse_change(note: Path, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if begun.get(name) != value:
            other = f"{name} = {begun.get(name)}, not {value}"
            if name in ("images", "labels"):
                other = f"other {name} (has the source changed?)"
            raise UserError(f"{note}: packing was begun with {other}; give another folder for the shards")


def estimate(source: Source, resize: int | None, quality: int | None) -> float:
    """New bytes for each old one, of a few images spread over the source."""
    before = after = 0
    count = min(len(source), IMAGES_TO_ESTIMATE)
    for number in range(count):
        with contextlib.suppress(BadImage):
            data = source.read(number * len(source) // count)
            after += len(examine(data, resize, quality).data)
            before += len(data)
    return after / before if before else 1.0


def tar_sizes(source: Source, ratio: float) -> np.ndarray:
    """int64 (N,): bytes that each image takes in a .tar, with its label and their headers."""
    blocks = -(-np.ceil(source.sizes * ratio).astype(np.int64) // BLOCK)
    return (blocks + (1 if source.labels is None else 3)) * BLOCK


def plan(sizes: np.ndarray, shard_bytes: int) -> list[range]:
    """Which images go into which shard."""
    starts, filled = [0], 0
    for image, size in enumerate(sizes.tolist()):
        if filled and filled + size + END_MARK > shard_bytes:
            starts.append(image)
            filled = 0
        filled += size
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def find_missing(job: Job) -> list[int]:
    """Shards that are to be written. One of broken images alone has figures and no file."""
    numbers = range(len(job.shards))
    there = {number for number in numbers if job.shard(number).exists()}
    if summary := read_json(job.summary):
        return [] if len(there) == summary["shards"] else [number for number in numbers if number not in there]
    figures = {number: read_json(job.figures(number)) for number in numbers}
    return [n for n, known in figures.items() if known is None or (known["images"] and n not in there)]


def check_space(job: Job, missing: list[int], sizes: np.ndarray) -> None:
    shards = [int(sizes[job.shards[number].start : job.shards[number].stop].sum()) + END_MARK for number in missing]
    needed = sum(-(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE for size in shards)
    free = shutil.disk_usage(job.out).free
    if needed > free:
        raise UserError(f"{job.out}: {decimal(free)} are free there, but the shards need {decimal(needed)} more")


# ----------------------------------------------------------------------------------------------------------- one image


class Examined(NamedTuple):
    """An image as it will be packed."""

    data: bytes
    format: str
    mode: str  # as Pillow names it, or "13 bands"
    height: int  # upright
    width: int
    moments: np.ndarray | None  # (2, 3): mean of each channel in 0..1, and of its square; None if it has no colours


class Header(NamedTuple):
    format: str
    mode: str
    all_bands: bool  # whether Pillow sees all that the file has


def examine(data: bytes, resize: int | None, quality: int | None) -> Examined:
    """Decodes an image and shrinks it if it is to be. Raises BadImage."""
    header = read_header(data)
    if header is None:
        return examine_bands(data)
    pixels = decode(data, 1 if header.mode in GREY else 3)
    if header.all_bands and (size := new_size(pixels, resize, quality)):
        image = as_pillow(pixels)
        data = as_jpeg(image, size, quality or QUALITY)
        header, pixels = Header("JPEG", image.mode, True), decode(data, 3)
    height, width = pixels.shape[1:]
    return Examined(data, header.format, header.mode, height, width, moments(pixels))


def read_header(data: bytes) -> Header | None:
    """None if Pillow does not know it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd files
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # A TIFF of red, green, blue and infrared is RGB to Pillow.
                extra = isinstance(image, TiffImageFile) and image.tag_v2.get(TIFF_BANDS, 1) > len(image.getbands())
                # An MPO is a camera's JPEG with a preview behind it.
                return Header("JPEG" if image.format == "MPO" else str(image.format), image.mode, not extra)
    except Exception:  # on damaged bytes parsers raise whatever they stumble over; decode has the words for it
        return None


def examine_bands(data: bytes) -> Examined:
    """What is neither grey nor colour, such as a satellite's TIFF of 13 bands, is packed as it is."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            bands = int(file.pages.first.samplesperpixel)
    except Exception:
        bands = 3
    pixels = decode(data, bands)
    if bands in (1, 3):
        raise BadImage("its header cannot be read")
    height, width = pixels.shape[1:]
    return Examined(data, "TIFF", f"{bands} bands", height, width, None)


def new_size(pixels: Tensor, resize: int | None, quality: int | None) -> tuple[int, int] | None:
    """(width, height) of the JPEG that it becomes; None if it stays as it is."""
    height, width = pixels.shape[1:]
    shorter = min(height, width)
    if resize is not None and shorter > resize:
        width, height = (round(side * resize / shorter) for side in (width, height))
    elif resize is not None or quality is None:
        return None
    return (width, height) if max(width, height) <= MAX_JPEG_SIDE else None


def as_pillow(pixels: Tensor) -> Image.Image:
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def as_jpeg(image: Image.Image, size: tuple[int, int], quality: int) -> bytes:
    """With colours at full resolution (4:4:4): they were halved once in the camera, and views enlarge small parts."""
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:4:4")
    return file.getvalue()


def moments(pixels: Tensor) -> np.ndarray:
    """(2, 3): from how often each value occurs, so the sums are exact."""
    counts = np.array(as_pillow(pixels).histogram(), dtype=np.int64).reshape(-1, 256)
    values = np.arange(256)
    sums = np.stack([counts @ values, counts @ values**2])
    return np.broadcast_to(sums / (counts[0].sum() * np.array([[255], [255**2]])), (2, 3))


# ----------------------------------------------------------------------------------------------------------- one shard


@dataclass
class Figures:
    """A shard's share of the summary: sums over its images, in their order."""

    images: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    measured: int = 0  # images that have colours
    moments: list[list[float]] = field(default_factory=lambda: [[0.0] * 3, [0.0] * 3])
    digests: list[str] = field(default_factory=list)  # of the source's bytes, of each image that is not broken
    broken: list[tuple[int, str]] = field(default_factory=list)  # (number, reason)

    def add(self, image: Examined, digest: str, label: int | None) -> None:
        self.images += 1
        self.formats[image.format] += 1
        self.modes[image.mode] += 1
        self.widths[image.width] += 1
        self.heights[image.height] += 1
        if label is not None:
            self.labels[label] += 1
        if image.moments is not None:
            self.measured += 1
            self.moments = (np.array(self.moments) + image.moments).tolist()
        self.digests.append(digest)

    def join(self, later: "Figures") -> None:
        """Adds another shard's, read from its file, where a Counter's numbers have become words; no digests."""
        self.images += later.images
        self.measured += later.measured
        self.moments = (np.array(self.moments) + later.moments).tolist()
        self.formats.update(later.formats)
        self.modes.update(later.modes)
        for name in ("widths", "heights", "labels"):
            getattr(self, name).update({int(value): count for value, count in getattr(later, name).items()})
        self.broken += later.broken


def write_shard(job: Job, number: int, tell: Callable[[], None]) -> None:
    """A shard, if any of its images can be read, and before it takes its name, its figures."""
    figures = Figures()
    members = readable(job, job.shards[number], figures, tell)
    if (first := next(members, None)) is None:
        return write_whole(job.figures(number), vars(figures))
    with whole(job.shard(number)) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in chain([first], members):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        write_whole(job.figures(number), vars(figures))


def readable(job: Job, images: range, figures: Figures, tell: Callable[[], None]) -> Iterator[tuple[str, bytes]]:
    """The members of a shard, by name. A key is the image's number: safe in any file system, and sorted as it was."""
    source = job.source
    for number in images:
        try:
            data = source.read(number)
            if len(data) != source.sizes[number]:
                raise UserError(f"{source.path}: {printable(source.key(number))} changed while it was packed")
            image = examine(data, job.resize, job.quality)
        except BadImage as error:
            figures.broken.append((number, without_addresses(str(error))))
        else:
            label = None if source.labels is None else int(source.labels[number])
            figures.add(image, hashlib.blake2b(data, digest_size=16).hexdigest(), label)
            yield f"{number:09d}.{SUFFIXES[image.format]}", image.data
            if label is not None:
                yield f"{number:09d}.cls", str(label).encode()
        tell()


def without_addresses(reason: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", reason)  # they would be others in each run


# ----------------------------------------------------------------------------------------------------------- processes

Told: TypeAlias = Literal["next", "image"]  # by a worker: that it wants its next item; that an image is done


class Deserted(Exception):  # noqa: N818 - a worker's reason to end: nobody listens any more
    pass


def write_shards(job: Job, missing: list[int], processes: int, progress: bool) -> None:
    done_before = len(job.source) - sum(len(job.shards[number]) for number in missing)
    # The workers are forked before the bar has its thread.
    with (
        in_processes(partial(write_shard, job), missing, processes) as told,
        report("packed", len(job.source), visible=progress) as done,
    ):
        done(done_before)
        for count, _ in enumerate(told, done_before + 1):
            done(count)


@contextlib.contextmanager
def in_processes(
    function: Callable[[int, Callable[[], None]], None], items: Sequence[int], processes: int
) -> Iterator[Iterator[None]]:
    """`function(item, tell)` for every item, in forked processes; what is given yields each time one of them tells.

    They are gone when this ends, however it ends: each finds its pipe closed when next it tells. So they go, too, if
    this process is killed.
    """
    context = multiprocessing.get_context("fork")
    workers: dict[Connection, Any] = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C reaches all, and is for the parent
    try:
        for _ in range(min(processes, len(items))):
            here, there = context.Pipe()
            worker = context.Process(target=work, args=(function, there, [*workers, here]), daemon=True)
            worker.start()
            workers[here] = worker
            there.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield hand_out(items, workers)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for pipe in workers:
            pipe.close()
        for worker in workers.values():
            worker.join()


def hand_out(items: Sequence[int], workers: dict[Connection, Any]) -> Iterator[None]:
    waiting, busy = iter(items), dict(workers)
    while busy:
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            try:
                told = pipe.recv()
                if told == "next":
                    pipe.send(item := next(waiting, None))
                    if item is None:
                        del busy[pipe]
            except (EOFError, ConnectionError) as error:
                busy[pipe].join()
                hint = "-9: was the memory full? give fewer processes"
                raise UserError(
                    f"a worker process ended with code {busy[pipe].exitcode} ({hint}); the same call goes on"
                ) from error
            if isinstance(told, Exception):
                raise told
            if told == "image":
                yield


def work(function: Callable[[int, Callable[[], None]], None], pipe: Connection, others: list[Connection]) -> None:
    """A worker's life. `others` are the parent's ends of the pipes: while a copy is open, no end is noticed."""
    for other in others:
        other.close()
    with contextlib.suppress(Deserted):
        try:
            while (item := ask(pipe)) is not None:
                function(item, partial(tell, pipe, "image"))
        except UserError as error:
            tell(pipe, error)
        except Exception:
            tell(pipe, RuntimeError(traceback.format_exc()))


def ask(pipe: Connection) -> int | None:
    tell(pipe, "next")
    try:
        return pipe.recv()
    except (EOFError, ConnectionError) as error:
        raise Deserted from error


def tell(pipe: Connection, what: Told | Exception) -> None:
    try:
        pipe.send(what)
    except ConnectionError as error:
        raise Deserted from error


# ------------------------------------------------------------------------------------------------------------- summary


def finish(job: Job, note: Path) -> dict[str, Any]:
    """Writes what comes last, and takes the figures away."""
    summary = read_json(job.summary) or summarise(job)
    if not summary["images"]:
        remove_leftovers(job.out, job.name)
        note.write_bytes(b"")  # nothing was packed, so there is nothing to go on with
        image, reason = summary["broken"][0]["image"], summary["broken"][0]["reason"]
        none = f"none of its {counted(len(job.source), 'image')} can be read"
        raise UserError(f"{job.source.path}: {none}; {printable(image)}: {printable(reason)}")
    if job.source.classes:
        write_if_new(job.out / "classes.json", job.source.classes)
    write_if_new(job.summary, summary)
    remove_leftovers(job.out, job.name)
    return summary


def remove_leftovers(out: Path, name: str) -> None:
    """Shards' figures, and what a killed call left half-written."""
    name = re.escape(name)
    figures, unfinished = rf"\.{name}-\d{{6,}}\.json", rf"\.?{name}-(\d{{6,}}|summary)\.(tar|json)\.unfinished"
    for file in os.listdir(out):
        if re.fullmatch(f"{figures}|{unfinished}", file):
            (out / file).unlink(missing_ok=True)


def summarise(job: Job) -> dict[str, Any]:
    total, parts = Figures(), []
    for number, images in enumerate(job.shards):
        figures = Figures(**json.loads(job.figures(number).read_bytes()))
        left_out = {image for image, _ in figures.broken}
        digests = np.frombuffer(bytes.fromhex("".join(figures.digests)), dtype=">u8").reshape(-1, 2)
        parts.append((np.array([image for image in images if image not in left_out], dtype=np.int64), digests))
        total.join(figures)
    same = duplicates(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    shards = [path for number in range(len(job.shards)) if (path := job.shard(number)).exists()]
    mean, square = np.array(total.moments) / max(total.measured, 1)
    key = job.source.key
    return {
        "images": total.images,
        "shards": len(shards),
        "bytes": sum(path.stat().st_size for path in shards),
        "formats": dict(sorted(total.formats.items())),
        "modes": dict(sorted(total.modes.items())),
        "width": spread(total.widths),
        "height": spread(total.heights),
        "mean": mean.tolist() if total.measured else None,
        "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist() if total.measured else None,
        "classes": by_class(job.source, total.labels),
        "broken": [{"image": key(image), "reason": reason} for image, reason in total.broken[:MOST_LISTED]],
        "duplicates": [{"image": key(image), "same_as": key(first)} for image, first in same[:MOST_LISTED].tolist()],
        "num_broken": len(total.broken),
        "num_duplicates": len(same),
    }


def duplicates(images: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """int64 (M, 2): each image, int64 (N,), whose digest, uint64 (N, 2), an earlier one has, and the first of these."""
    order = np.lexsort(digests.T)  # stable: equal ones stay in the order of their images
    ordered = digests[order]
    again = np.append([False], (ordered[1:] == ordered[:-1]).all(axis=1))[: len(order)]
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    pairs = images[np.stack([order, order[first]], axis=1)[again]]
    return pairs[np.argsort(pairs[:, 0])]


def spread(counts: Counter[int]) -> dict[str, float] | None:
    if not counts:
        return None
    values = np.array(sorted(counts))
    median = float(np.median(np.repeat(values, [counts[value] for value in values.tolist()])))
    return {"min": int(values[0]), "median": median, "max": int(values[-1])}


def by_class(source: Source, labels: Counter[int]) -> dict[str, int] | None:
    if source.labels is None:
        return None
    if source.classes is None:
        return {str(label): labels[label] for label in sorted(labels)}
    return {name: labels[label] for label, name in enumerate(source.classes)}


def read_summary(shards: Sequence[str]) -> dict[str, Any] | None:
    """Number of images, mean and deviation of these shards, as `pack` wrote them down.

    None if one of them has no summary beside it, or if they are not all that it is of.
    """
    packs: dict[tuple[Path, str], set[Path]] = {}
    for shard in map(Path, map(os.path.abspath, shards)):
        if not (parts := re.fullmatch("(.+)" + SHARD_NUMBER, shard.name)):
            return None
        packs.setdefault((shard.parent, parts[1]), set()).add(shard)
    found = [summary_of(folder, name, members) for (folder, name), members in sorted(packs.items())]
    summaries = [summary for summary in found if summary is not None]
    if not summaries or len(summaries) < len(found):
        return None
    images = np.array([summary["images"] for summary in summaries])
    means, stds = (np.array([summary[name] for summary in summaries]) for name in ("mean", "std"))
    mean = images @ means / images.sum()
    # Each pack's deviation is around its own mean.
    std = np.sqrt(images @ (stds**2 + (means - mean) ** 2) / images.sum())
    return {"images": int(images.sum()), "mean": mean.tolist(), "std": std.tolist()}


def summary_of(folder: Path, name: str, shards: set[Path]) -> dict[str, Any] | None:
    """If it has colours, and is of just these shards and of their present sizes."""
    summary = read_json(folder / f"{name}-summary.json")
    try:
        if not summary or summary["mean"] is None or shards != set(shards_named(folder, name)):
            return None
        now = (len(shards), sum(shard.stat().st_size for shard in shards))
        return summary if now == (summary["shards"], summary["bytes"]) else None
    except (KeyError, OSError):
        return None


def describe(summary: dict[str, Any]) -> str:
    """For people, in a few lines."""
    formats, modes = (", ".join(f"{n} {kind}" for kind, n in summary[name].items()) for name in ("formats", "modes"))
    sides = [
        f"{name} {s['min']} to {s['max']}, median {s['median']:g}"
        for name in ("width", "height")
        if (s := summary[name])
    ]
    lines = [
        f"{counted(summary['images'], 'image')} in {counted(summary['shards'], 'shard')}, {decimal(summary['bytes'])}",
        f"formats: {formats}; modes: {modes}",
        "; ".join(sides),
    ]
    if summary["mean"]:
        mean, std = (" ".join(f"{value:.4f}" for value in summary[name]) for name in ("mean", "std"))
        lines.append(f"mean {mean}, std {std}")
    if summary["classes"]:
        sizes = summary["classes"].values()
        lines.append(f"{counted(len(sizes), 'class', 'classes')} of {min(sizes)} to {max(sizes)} images")
    broken = [f"{bad['image']} ({bad['reason']})" for bad in summary["broken"]]
    same = [f"{pair['image']} = {pair['same_as']}" for pair in summary["duplicates"]]
    if broken:
        lines.append(f"left out, broken: {first_few(broken, summary['num_broken'])}")
    if same:
        lines.append(f"there twice, kept: {first_few(same, summary['num_duplicates'])}")
    return "\n".join(lines)


def first_few(named: list[str], total: int) -> str:
    more = f", and {total - FEW} more" if total > FEW else ""
    return f"{total}: " + ", ".join(map(printable, named[:FEW])) + more


def printable(name: str) -> str:
    """A file's name may hold anything, also what no terminal takes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


# --------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with writing(path):
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def write_whole(path: Path, content: object) -> None:
    with whole(path) as file:
        file.write(as_json(content))


def write_if_new(path: Path, content: object) -> None:
    if read_json(path) != content:
        write_whole(path, content)


def as_json(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace")  # which JSON reads back


def read_json(path: Path) -> Any:
    """None if it is not there or not whole."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
