"""The index of each shard, kept beside it, so that its headers are read once and not at the start of every run.

    train-000000.tar
    train-000000.tar.index.npz      keys, places, sizes and labels; size and time of the shard that they are of

An index whose shard has changed since is built anew. Where the shards' folder cannot be written to, the index is kept
in the user's cache folder.
"""

import contextlib
import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from ssl_global.data.cache import alone, cache_folder
from ssl_global.data.several import Sets
from ssl_global.data.shards import MAX_LABEL, SEVERAL, Names, ShardIndex, Stamp, index_shard, stamp_of
from ssl_global.data.workers import MOST_WORKERS, num_cores
from ssl_global.errors import UserError

VERSION = 2  # of the file's fields and of what index_shard finds
SUFFIX = ".index.npz"
WORTH_PROCESSES = 16  # shards without an index: fewer are read sooner than processes are started (ours)


def indexes(shards: list[str]) -> list[ShardIndex]:
    """Of each shard, from its file or from its headers. Raises UserError for the first shard that is damaged."""
    if sum(read(shard) is None for shard in shards) >= WORTH_PROCESSES and num_cores() > 1:
        with alone(cache_folder() / "indexes" / ".lock"):  # several training processes would all do the same
            index_many([shard for shard in shards if read(shard) is None])
    return [read(shard) or index(shard) for shard in shards]


def index_many(shards: list[str]) -> None:
    console = Console(stderr=True)
    with ProcessPoolExecutor(min(num_cores(), MOST_WORKERS)) as pool:
        done = pool.map(index, shards, chunksize=4)
        for _ in track(done, "indexing shards", len(shards), console=console, disable=not console.is_terminal):
            pass


def index(shard: str) -> ShardIndex:
    """From the shard's headers, and kept."""
    found = index_shard(shard)
    for place in places(shard):
        with contextlib.suppress(OSError):
            write(place, found)
            break
    return found


def places(shard: str) -> tuple[Path, Path]:
    """Beside the shard, or in the user's cache folder."""
    name = hashlib.sha256(os.path.realpath(shard).encode(errors="surrogateescape")).hexdigest()[:24]
    return Path(shard + SUFFIX), cache_folder() / "indexes" / f"{name}{SUFFIX}"


def read(shard: str) -> ShardIndex | None:
    """None if there is no index, or it is of another state of the shard."""
    try:
        stamp = stamp_of(shard)
    except OSError as error:
        raise UserError(f"{shard}: cannot be read: {error.strerror}") from error
    for place in places(shard):
        try:
            with place.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                if kept["version"].tolist() == VERSION and kept["stamp"].tolist() == list(stamp):
                    keys = Names(kept["keys"], kept["key_ends"])
                    sets = Sets(kept["set_members"], kept["set_ends"])
                    index = ShardIndex(keys, kept["offsets"], kept["sizes"], kept["labels"], stamp, sets)
                    if makes_sense(index):
                        return index
        except Exception:  # not there, or damaged: the zip's parser raises whatever it stumbles over
            continue
    return None


def makes_sense(index: ShardIndex) -> bool:
    """Whether each number is one that `index_shard` could have found: an index may come with the shards of a stranger.

    Raises UnicodeDecodeError for keys that are no text.
    """
    keys, numbers = index.keys, (index.keys.ends, index.offsets, index.sizes, index.labels)
    if any(array.dtype != np.int64 or array.shape != (len(keys),) for array in numbers) or not len(keys):
        return False
    if keys.joined.dtype != np.uint8 or keys.joined.ndim != 1 or keys.ends[-1] != len(keys.joined):
        return False
    if not (np.diff(keys.ends, prepend=0) > 0).all() or (keys.joined[keys.ends[:-1]] & 0xC0 == 0x80).any():
        return False  # a key that is empty, or begins within a letter
    if not sets_make_sense(index):
        return False
    keys.joined.tobytes().decode()
    return bool(
        (index.offsets >= 0).all()
        and (index.sizes >= 0).all()
        and (index.sizes <= index.stamp.size - index.offsets).all()
        and (index.labels >= SEVERAL).all()
        and (index.labels <= MAX_LABEL).all()
    )


def sets_make_sense(index: ShardIndex) -> bool:
    members, ends = index.sets.members, index.sets.ends
    if any(array.dtype != np.int64 or array.ndim != 1 for array in (members, ends)):
        return False
    if len(ends) != (len(index.labels) if (index.labels == SEVERAL).any() else 0):
        return False
    in_order = bool((np.diff(ends, prepend=0) >= 0).all()) and (ends[-1] if len(ends) else 0) == len(members)
    return in_order and bool(((members >= 0) & (members <= MAX_LABEL)).all())


def write(place: Path, index: ShardIndex) -> None:
    """Whole or not at all; of several processes at once one is the last, and all have the same."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with temporary.open("xb") as file:  # never through a link that lies there
            np.savez(
                file,
                version=np.array(VERSION),
                stamp=np.array(index.stamp, dtype=np.int64),
                keys=index.keys.joined,
                key_ends=index.keys.ends,
                offsets=index.offsets,
                sizes=index.sizes,
                labels=index.labels,
                set_members=index.sets.members,
                set_ends=index.sets.ends,
            )
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def is_current(stamp: Stamp, descriptor: int) -> bool:
    """Whether the open shard is still the file that was indexed."""
    return stamp_of(descriptor) == stamp
