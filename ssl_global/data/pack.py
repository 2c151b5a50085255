"""From any source to webdataset .tar shards, looking at every image once.

    NAME-000000.tar ...     000000000.jpg, 000000000.cls, ...: numbered as in the source; of images with any number of
                            classes 000000000.json
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
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.filesize import decimal

from ssl_global.data.decode import BadImage
from ssl_global.data.examine import QUALITY, examine
from ssl_global.data.files import as_json, read_json, whole, write_if_new, write_whole, writing
from ssl_global.data.forked import in_processes
from ssl_global.data.progress import report
from ssl_global.data.shards import BLOCK
from ssl_global.data.source import Source, counted
from ssl_global.data.summary import Figures, by_class, duplicates, printable, shards_named, spread
from ssl_global.data.workers import MOST_WORKERS, num_cores
from ssl_global.errors import UserError, wrong

MIN_RESIZE = 16  # pixels: one patch (ours)
IMAGES_TO_ESTIMATE = 64  # by which new sizes are foretold (ours)
MOST_LISTED = 1000  # broken images and duplicates named in the summary; all are counted (ours)
SECONDS_TO_WAIT = 10.0  # for the workers of a call that was killed: they end with the image at hand (ours)

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}

END_MARK = 2 * BLOCK  # of a .tar
MAX_NAME = 100  # characters: file systems take 255 (ours)


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
        if (source.labels is not None or source.sets) and classes.exists() and read_json(classes) != source.classes:
            raise UserError(f"{classes}: names other classes than these images; give another folder for the shards")


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
    if source.sets is not None:
        labels = source.sets.digest(source.classes or [])
    what = {"images": source.fingerprint, "labels": labels}
    return what | {"shard_bytes": shard_bytes, "resize": resize, "quality": quality}


def refuse_change(note: Path, begun: Any, settings: dict[str, Any]) -> None:
    if not isinstance(begun, dict):
        raise UserError(f"{note}: does not say which images are packed here; give another folder for the shards")
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
    if source.sets is not None:
        said = np.array([len(as_json(of_several(source.sets[n]))) for n in range(len(source))], dtype=np.int64)
        return (blocks + 2 - (-said // BLOCK)) * BLOCK
    return (blocks + (1 if source.labels is None else 3)) * BLOCK


def of_several(labels: np.ndarray) -> dict[str, list[int]]:
    return {"labels": labels.tolist()}


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


# ----------------------------------------------------------------------------------------------------------- one shard


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
            labels = [] if label is None else [label]
            if source.sets is not None:
                labels = source.sets[number].tolist()
            figures.add(image, hashlib.blake2b(data, digest_size=16).hexdigest(), labels)
            yield f"{number:09d}.{SUFFIXES[image.format]}", image.data
            if label is not None:
                yield f"{number:09d}.cls", str(label).encode()
            if source.sets is not None:
                yield f"{number:09d}.json", as_json(of_several(source.sets[number]))
        tell()


def without_addresses(reason: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", reason)  # they would be others in each run


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
