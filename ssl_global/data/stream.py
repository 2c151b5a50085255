"""webdataset's own streaming reader, for what cannot be indexed: pipes, and remote shards that no local disk holds.

    --data.reader stream --data.epoch-images 1281167 --data 'pipe:aws s3 cp s3://bucket/train-{000000..001281}.tar -'

What it cannot promise, and the indexed reader does: each process draws its shards at random, with replacement, so in an
epoch a sample may come twice or not at all; a resumed run draws anew, so it goes on with other samples than it would
have had; a shard that was cut short between two members ends without an error. What still holds: the same views are
drawn at the same place, a broken image is replaced and counted, and so is a shard that cannot be opened.

A `pipe:` address is a shell command and is run. A file is never taken for one, whatever its name.
"""

import glob
import os
import random
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import webdataset
from braceexpand import braceexpand

from ssl_global.data.decode import BadImage
from ssl_global.data.loader import REPLACEMENTS, Candidate
from ssl_global.data.shards import IMAGE_SUFFIXES, MAX_LABEL, NO_LABEL, label_in_json, whole_number
from ssl_global.data.source import counted
from ssl_global.errors import UserError

SHUFFLED = 2000  # samples that wait in memory, still encoded, to be drawn from (ours)
CANNOT_PROMISE = (
    "data.reader stream: shards are drawn at random with replacement, and a resumed run draws others than it would "
    "have had; only the indexed reader is exact"
)


class Stream:
    """Shards at `path` that are read as they come; `epoch_images` is how many are taken for an epoch."""

    def __init__(self, path: str, *, epoch_images: int, seed: int) -> None:
        self.path = path
        self.epoch_images = epoch_images
        self.seed = seed
        self.shards = expand(path)

    def __len__(self) -> int:
        return self.epoch_images

    def describe(self) -> str:
        return f"{counted(len(self.shards), 'streamed shard')}, {self.epoch_images} images an epoch by the recipe"

    def begin(self, *, process: int, step: int) -> "Streamed":
        """Endless samples; each process draws its own, and a run that goes on at another step others than before."""
        return Streamed(self, random.Random(f"{self.seed} {step} {process}").getrandbits(31))


class Streamed:
    """Endless samples, the same for the same seed as long as the shards answer the same."""

    def __init__(self, stream: Stream, seed: int) -> None:
        self.path = stream.path
        self.failed: list[tuple[str, Exception]] = []
        self.failed_in_a_row = 0
        self.empty_in_a_row = 0
        self.lock = threading.Lock()
        self.samples: Iterator[dict[str, Any]] = iter(
            webdataset.DataPipeline(
                webdataset.ResampledShards(stream.shards, seed=seed, worker_seed=lambda: 0, deterministic=True),
                self.not_empty_for_ever,
                webdataset.tarfile_to_samples(handler=self.note_failure),
                self.with_image,
                webdataset.shuffle(SHUFFLED, initial=min(SHUFFLED, len(stream)), rng=random.Random(seed)),
            )
        )

    def candidates(self, sample: int) -> Iterator[Candidate]:
        """Whatever comes next, whichever number is asked for."""
        for _ in range(1 + REPLACEMENTS):
            yield self.next()

    def next(self) -> Candidate:
        with self.lock:
            while True:
                if self.failed:
                    url, error = self.failed.pop()
                    return Candidate(url, -1, partial(refuse, error))
                sample = next(self.samples)
                self.failed_in_a_row = 0
                if image := image_of(sample):
                    return Candidate(f"{sample['__url__']}/{sample['__key__']}", label_of(sample), lambda: image)

    def not_empty_for_ever(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Shards as they are opened, until too many in a row held no image: the run would wait for ever."""
        for shard in shards:
            if self.empty_in_a_row > REPLACEMENTS:
                raise UserError(f"{self.path}: {self.empty_in_a_row} shards in a row hold no image")
            self.empty_in_a_row += 1
            yield shard

    def with_image(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            if image_of(sample):
                self.empty_in_a_row = 0
                yield sample

    def note_failure(self, error: Exception) -> bool:
        """A shard that cannot be read is passed over; when no shard can be, the run must not wait for ever."""
        self.failed_in_a_row += 1
        if self.failed_in_a_row > REPLACEMENTS:
            raise UserError(f"{self.path}: {self.failed_in_a_row} shards in a row cannot be read, the last: {error}")
        self.failed.append((str(getattr(error, "url", None) or error.args[-1]), error))
        return True


def expand(path: str) -> list[str]:
    words = list(braceexpand(path))
    shards = [name for word in words for name in expand_word(word)]
    if not shards:
        raise UserError(f"{path}: no shard matches")
    return shards


def expand_word(word: str) -> list[str]:
    """A file gets a folder before its name: a stranger's may be called "pipe:rm ..", and webdataset would run it."""
    if os.path.exists(word):
        return [os.path.join(".", word)]
    return [os.path.join(".", name) for name in sorted(glob.glob(word))] if glob.has_magic(word) else [word]


def image_of(sample: dict[str, Any]) -> bytes | None:
    return next((sample[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in sample), None)


def refuse(error: Exception) -> bytes:
    raise BadImage(f"shard cannot be read: {error}".splitlines()[0])


def label_of(sample: dict[str, Any]) -> int:
    for suffix in ("cls", "txt"):
        if suffix in sample and (label := whole_number(sample[suffix])) is not None and label <= MAX_LABEL:
            return max(label, NO_LABEL)
    return label_in_json(sample.get("json", b""))
