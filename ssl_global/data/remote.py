"""Shards at s3://, gs://, hf://, https:// and wherever else fsspec reaches: brought to a local folder, then read there.

    CACHE/shards/<hash>-<folder>/train-000000.tar          whole, or not there
    CACHE/shards/<hash>-<folder>/train-000000.tar.remote   what the server said of it: by it a changed one is known
    CACHE/shards/<hash>-<folder>/url.txt                   where the folder's files are from

All shards of a run must fit on the disk, because a shuffled epoch touches them all from its first batch on; for what
does not fit there is `--data.reader stream`. A later run downloads only what is new or has changed.
"""

import contextlib
import hashlib
import json
import os
import platform
import posixpath
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # its types lack the error
from fsspec import AbstractFileSystem
from fsspec.callbacks import DEFAULT_CALLBACK, Callback
from fsspec.core import url_to_fs
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ssl_global.data.cache import alone, cache_folder
from ssl_global.errors import UserError

AT_ONCE = 8  # downloads (ours)
QUESTIONS_AT_ONCE = 32  # for a file's size: all waiting, no bytes (ours)
TRIES = 3  # of each (ours)
PAUSE_SECONDS = 1.0  # before the second try, and double that before the third (ours)
SILENT_SECONDS = 60  # of a connection, until it counts as broken (ours)
VERSIONS = ("ETag", "etag", "md5Hash", "checksum", "blob_id", "mtime", "LastModified", "last_modified", "created")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
PLACES = ("host", "port", "account_name", "endpoint_url")  # what some schemes take out of the address
BESIDE = ("classes.json", "*-summary.json")  # small files of the shards' folder that are wanted too

T = TypeVar("T")


@dataclass(frozen=True)
class Remote:
    """A file that is wanted."""

    url: str
    system: AbstractFileSystem
    path: str  # in that system
    local: Path
    size: int | None  # bytes; None where the server does not say
    version: str  # as the server has it, or ""

    @property
    def note(self) -> Path:
        return self.local.with_name(f"{self.local.name}.remote")

    def said(self) -> dict[str, Any]:
        return {"size": self.size, "version": self.version}

    def is_here(self) -> bool:
        try:
            same_size = self.size in (None, self.local.stat().st_size)
            return same_size and json.loads(self.note.read_text()) == self.said()
        except (OSError, ValueError):
            return False


def fetch(pattern: str, cache: Path | None = None, *, progress: bool = True) -> list[str]:
    """Local paths of the shards that `pattern` names, in its order.

    pattern   braces name files that must be there, a glob those that are, a folder's address all .tar files in it

    Raises UserError, one line with the address, for what cannot be found, listed, downloaded or stored.
    """
    if pattern.startswith("pipe:"):
        raise UserError(f"{pattern}: a pipe cannot be indexed; read it with --data.reader stream")
    folder = (cache or cache_folder()) / "shards"
    try:
        words = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise UserError(f"{pattern}: a brace is not closed; write {{000..099}}") from error
    named_by_words = [name for word in words for name in wanted(word)]
    with ThreadPoolExecutor(QUESTIONS_AT_ONCE, "ask") as pool:
        shards = list(pool.map(lambda name: look(name[0], name[1], folder), named_by_words))
    refuse_twice(pattern, shards)
    one_of_each_folder = {shard.local.parent: shard for shard in shards}.values()
    extras = [extra for shard in one_of_each_folder for extra in beside(shard, folder)]
    missing = [file for file in dict.fromkeys([*shards, *extras]) if not file.is_here()]
    if missing:
        check_space(missing, folder)
        download_all(missing, visible=progress)
    return [str(shard.local) for shard in shards]


# ------------------------------------------------------------------------------------------------------------- looking


@contextlib.contextmanager
def named(url: str) -> Iterator[None]:
    """Whatever a file system raises, as one line with the address."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except ImportError as error:
        scheme = url.partition(":")[0]
        package = PACKAGES.get(scheme, f"fsspec's package for {scheme}")
        raise UserError(f"{url}: needs the package {package}; pip install {package}") from error
    except Exception as error:
        cause = underlying(error)
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) == 404:
            raise UserError(f"{url}: there is no such file") from error
        if "Protocol not known" in str(cause):
            known = ", ".join(sorted(PACKAGES))
            raise UserError(f"{url}: an unknown scheme; there are {known} and what fsspec knows") from error
        said = getattr(cause, "message", "") if hasattr(cause, "status") else str(cause)
        status = f" {getattr(cause, 'status', '')}".rstrip()
        raise UserError(f"{url}: {type(cause).__name__}{status}: {said}".splitlines()[0]) from error


def underlying(error: BaseException) -> BaseException:
    """fsspec says FileNotFoundError whatever an http server answers, and if none does; the cause knows better."""
    while isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__
    return error


def is_final(error: UserError) -> bool:
    """Another try would end the same way."""
    cause = error.__cause__ and underlying(error.__cause__)
    status = getattr(cause, "status", 0)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in (408, 425, 429)
    return isinstance(cause, FileNotFoundError | PermissionError | ImportError)


def several_tries(action: Callable[[], T]) -> T:
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except UserError as error:
            if is_final(error):
                raise
            if attempt == TRIES:
                raise UserError(f"{error} (tried {TRIES} times)") from error
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("the last try returns or raises")


def refuse_twice(pattern: str, shards: list[Remote]) -> None:
    seen: set[Path] = set()
    for shard in shards:
        if shard.local in seen:
            raise UserError(f"{pattern}: names {shard.url} twice")
        seen.add(shard.local)


def find_system(word: str) -> tuple[AbstractFileSystem, str]:
    scheme = word.partition("://")[0]
    if scheme not in ("http", "https"):
        return url_to_fs(word)
    import aiohttp

    # aiohttp's own limit is five minutes for a whole file, and it would not ask the environment for a proxy.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
    headers = {"Accept-Encoding": "identity"}
    return url_to_fs(word, client_kwargs={"timeout": timeout, "trust_env": True, "headers": headers})


def without_query(url: str) -> str:
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def wanted(word: str) -> list[tuple[AbstractFileSystem, str]]:
    """The files, each in its system, that one word of the pattern, after its braces, stands for."""
    with named(word):
        system, path = find_system(word)
        if re.search(r"[*?\[]", without_query(word)):
            return [(system, found) for found in listed(system, path, word)]
        if without_query(word).endswith(".tar"):
            return [(system, path)]
        return [(system, found) for found in listed(system, f"{path.rstrip('/')}/*.tar", word)]


def listed(system: AbstractFileSystem, path: str, word: str) -> list[str]:
    try:
        found = sorted(system.glob(path))
    except Exception as error:
        raise UserError(f"{word}: cannot be listed ({error}); write braces, like {{000..099}}.tar") from error
    if not found:
        raise UserError(f"{word}: no shard there, or it cannot be listed; write braces, like {{000..099}}.tar")
    return [str(name) for name in found]


def look(system: AbstractFileSystem, path: str, folder: Path) -> Remote:
    url = system.unstrip_protocol(path)
    folder_url, _, name = without_query(url).rpartition("/")
    if not name or name.startswith(".") or "\\" in name or "\0" in name:
        raise UserError(f"{url}: {name!r} is no name for a local file")

    def ask() -> dict[str, Any]:
        with named(url):
            said: dict[str, Any] = system.info(path)
            return said

    info = several_tries(ask)
    said = info.get("size")
    size = said if type(said) is int and said >= 0 else None  # a server may say anything
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return Remote(url, system, path, folder / local_folder(system, folder_url) / name, size, version)


def local_folder(system: AbstractFileSystem, url: str) -> str:
    """Of two addresses never the same, and readable: "3f2a9c01-bucket-imagenet"."""
    url = without_password(url)
    place = "\0".join([url, *(str(system.storage_options.get(name, "")) for name in PLACES)])
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2]).strip("-.")[-60:]
    return f"{hashlib.sha256(place.encode()).hexdigest()[:12]}-{readable}"


def without_password(url: str) -> str:
    return re.sub(r"://([^/@:]*):[^/@]*@", r"://\1@", url)


def beside(shard: Remote, folder: Path) -> list[Remote]:
    """The small files there; where they are not or cannot be listed, the shards do without them."""
    found = []
    for name in BESIDE:
        with contextlib.suppress(Exception):
            path = f"{posixpath.dirname(without_query(shard.path))}/{name}"
            paths = shard.system.glob(path) if "*" in name else [path]
            found += [look(shard.system, str(one), folder) for one in paths]
    return found


# --------------------------------------------------------------------------------------------------------- downloading


def check_space(missing: list[Remote], folder: Path) -> None:
    needed = sum(file.size or 0 for file in missing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}; set XDG_CACHE_HOME") from error
    if needed > free:
        raise UserError(
            f"{folder}: {decimal(free)} are free there, but the shards need {decimal(needed)} more; set XDG_CACHE_HOME "
            "to a larger disk, or read them with --data.reader stream"
        )


def download_all(missing: list[Remote], *, visible: bool) -> None:
    total = sum(file.size or 0 for file in missing)
    console = Console(stderr=True, quiet=not visible)
    columns = (TextColumn("fetching"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    if not console.is_terminal:
        console.print(f"fetching {len(missing)} files, {decimal(total)}, from {posixpath.dirname(missing[0].url)}")
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(AT_ONCE, "fetch") as pool,
    ):
        task = bar.add_task("fetching", total=total or None)
        begun = [pool.submit(download, file, lambda count: bar.advance(task, count)) for file in missing]
        try:
            for done in as_completed(begun):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def download(file: Remote, tell: Callable[[int], object]) -> None:
    """Once on this machine: another process that wants the same file waits, and finds it."""
    try:
        file.local.parent.mkdir(parents=True, exist_ok=True)
        (file.local.parent / "url.txt").write_text(f"{without_password(posixpath.dirname(without_query(file.url)))}\n")
        with alone(file.local.with_name(f".{file.local.name}.lock")):
            if not file.is_here():
                try_to_download(file, tell)
    except OSError as error:
        raise UserError(f"{file.local}: cannot be written: {error.strerror or error}") from error


def try_to_download(file: Remote, tell: Callable[[int], object]) -> None:
    """Under a name of this process until it is whole: where there are no locks, others may be at it too."""
    unfinished = file.local.with_name(f"{file.local.name}.unfinished-{platform.node()}-{os.getpid()}")
    try:
        several_tries(lambda: copy(file, unfinished, tell))
        file.note.unlink(missing_ok=True)
        unfinished.rename(file.local)
        file.note.write_text(json.dumps(file.said()))
    finally:
        unfinished.unlink(missing_ok=True)


class Told(Callback):
    def __init__(self, tell: Callable[[int], object]) -> None:
        super().__init__()
        self.tell = tell

    def relative_update(self, inc: int = 1) -> None:
        self.value += inc
        self.tell(inc)

    def absolute_update(self, value: int) -> None:
        self.relative_update(value - self.value)


def copy(file: Remote, unfinished: Path, tell: Callable[[int], object]) -> None:
    """All bytes, flushed to the disk. Trouble on the way is a UserError."""
    # Of one answer, not block by block. For hf:// only this callback leaves the hub's own, faster way in use.
    told = DEFAULT_CALLBACK if file.url.startswith("hf://") else Told(tell)
    try:
        with named(file.url):
            file.system.get_file(file.path, str(unfinished), callback=told)
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
            copied = os.fstat(written.fileno()).st_size
        if file.size not in (None, copied):
            raise UserError(f"{file.url}: {copied} bytes came, the server says it has {file.size}")
    except BaseException:
        tell(-told.value)
        raise
