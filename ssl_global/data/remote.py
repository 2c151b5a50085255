"""Shards that lie elsewhere (s3://, gs://, hf://, https://, any scheme of fsspec): copied once, then read as local ones.

    fetch("s3://bucket/train-{000..099}.tar")     each must be there
    fetch("gs://bucket/train-*.tar")              those that are there, sorted; over http only if the server lists them
    fetch("hf://datasets/user/name/shards")       a folder: all .tar in it, sorted

classes.json and *-summary.json beside the shards come along. What was fetched lies in

    CACHE/shards/HASH-BUCKET_FOLDER/    one for each remote folder; url.txt says which
        train-000.tar
        train-000.tar.json              what the other side said of it; a file that has changed there is fetched again
        train-000.tar.lock              so that one process fetches and the others wait

A name from elsewhere becomes a local name only if it is a plain one. Nothing half-written has a shard's name.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # its types lack the error
from fsspec.callbacks import DEFAULT_CALLBACK, Callback
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ssl_global.data.cache import cache_folder
from ssl_global.data.shards import SECONDS_BETWEEN_LINES
from ssl_global.errors import UserError

DOWNLOADS_AT_ONCE = 8  # (ours)
QUESTIONS_AT_ONCE = 32  # for size and version of a file: all waiting, no bytes (ours)
PAUSES = (1.0, 4.0)  # seconds before the second and the third try (ours)
SILENT_SECONDS = 60  # of a connection, until it counts as broken (ours)
SECONDS_BETWEEN_LOOKS = 0.2  # at a shard that another process is fetching (ours)
LEFT_BEHIND_SECONDS = 3600  # a part that nobody wrote to for so long is of a process that was killed (ours)

# Under these names file systems tell one content of a file from another, the surest first.
VERSIONS = (
    "ETag", "etag", "md5Hash", "Content-MD5", "blob_id",
    "Last-Modified", "LastModified", "last_modified", "mtime", "modificationTime", "created",
)  # fmt: skip
PLACES = ("host", "port", "account_name", "endpoint_url")  # options that some schemes take out of the URL
PASSING_STATUS = (408, 425, 429)  # of HTTP's 4xx, those that a later try may not get
PLAIN_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    url: str
    size: int | None  # bytes; None: the other side does not say
    version: str | None  # of its content; None: the other side does not say
    local: Path

    @property
    def note(self) -> Path:
        return self.local.with_name(f"{self.local.name}.json")

    def is_here(self) -> bool:
        try:
            noted, size = json.loads(self.note.read_bytes()), self.local.stat().st_size
        except (OSError, ValueError):
            return False
        return self.size in (None, size) and noted == {"size": size, "version": self.version}

    def leave_note(self) -> None:
        self.note.write_text(json.dumps({"size": self.local.stat().st_size, "version": self.version}))


def fetch(pattern: str, cache: Path | None = None, *, progress: bool = True) -> list[str]:
    """The local paths of the shards at `pattern` (see the head of this file), in its order; what is missing is fetched.

    Raises UserError, one line naming the URL, if a shard is not there or cannot be fetched, or the disk is too small.
    """
    files = open_file_system(pattern)
    place = (cache or cache_folder()) / "shards"
    urls = [url for word in expand_braces(pattern) for url in expand_word(files, pattern, word)]
    beside = find_summaries(files, urls)  # before the questions, which then are answered from this listing
    shards = ask_all(files, pattern, urls, place)
    refuse_twice(pattern, shards)
    wanted = [*shards, *look_up_beside(files, urls, beside, place)]
    missing = [file for file in wanted if not file.is_here()]
    if missing:
        download_all(files, pattern, missing, place, progress=progress)
    return [str(shard.local) for shard in shards]


# ---------------------------------------------------------------------------------------------------- what is out there


def open_file_system(pattern: str) -> Any:
    """A file system of its own for each call: a listing that an earlier call kept could be out of date."""
    if pattern.startswith("pipe:"):
        raise UserError(f"{pattern}: commands are run with data.reader=stream only")
    scheme, separator, _ = pattern.partition("://")
    if not separator or "::" in pattern:
        raise UserError(f"{pattern}: is no single URL; write SCHEME://PLACE/NAME.tar")
    if scheme in ("file", "local"):
        raise UserError(f"{pattern}: is a local file; write its path without {scheme}://")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = (getattr(error.__cause__, "name", None) or scheme).partition(".")[0]
        raise UserError(f"{pattern}: needs the package {package}; pip install {package}") from error
    except ValueError as error:
        known = "s3://, gs://, hf://, https:// and the other schemes of fsspec"
        raise UserError(f"{pattern}: {scheme}:// is not known; what works: {known}") from error
    try:
        return fsspec.core.url_to_fs(pattern, skip_instance_cache=True, **options(scheme))[0]
    except Exception as error:  # file systems come from many packages, each with errors of its own
        raise UserError(f"{pattern}: {reason(error)}") from error


def options(scheme: str) -> dict[str, object]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp  # fsspec's own requirement for these two, and only for these

    # aiohttp's own limit is five minutes for a whole file, and it would not ask the environment for a proxy.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}}


def expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError as error:
        raise UserError(f"{pattern}: a brace is not closed; write {{000..099}}") from error


def expand_word(files: Any, pattern: str, word: str) -> list[str]:
    """The URLs of the shards that one word means, after the braces."""
    if has_magic(word):
        found = list_names(files, pattern, lambda: files.glob(word))
        if not found:
            raise UserError(f"{pattern}: no shard matches {word}{advice(word)}")
    elif split_url(word)[1].endswith(".tar"):
        found = [full_url(files, word)]
    else:
        folder = full_url(files, word).rstrip("/")
        listed = list_names(files, pattern, lambda: files.ls(folder, detail=False))
        found = [url for url in listed if split_url(url)[0] == folder and split_url(url)[1].endswith(".tar")]
        if not found:
            raise UserError(f"{pattern}: no .tar in {word}{advice(word)}")
    for url in found:
        if not split_url(url)[1].endswith(".tar"):
            raise UserError(f"{pattern}: {url} is no .tar file; give .tar shards, not compressed")
    return found


def has_magic(word: str) -> bool:
    return bool(re.search(r"[*\[]" if is_http(word) else r"[*?\[]", word))  # over http a ? begins the query


def advice(word: str) -> str:
    return "; if the server gives no list, name the shards by braces, {000..099}" if is_http(word) else ""


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def list_names(files: Any, pattern: str, listing: Callable[[], list[str]]) -> list[str]:
    try:
        return sorted(files.unstrip_protocol(name) for name in listing())
    except Exception as error:
        hint = "name the shards by braces, {000..099}"
        raise UserError(f"{pattern}: cannot be listed: {reason(error)}; {hint}") from error


def full_url(files: Any, word: str) -> str:
    """In the one way of writing that listings use too: memory://a is memory:///a."""
    return str(files.unstrip_protocol(files._strip_protocol(word)))


def split_url(url: str) -> tuple[str, str]:
    """Folder and name; a query (https://host/x.tar?token=...) belongs to neither."""
    bare = urlsplit(url)._replace(query="", fragment="").geturl() if is_http(url) else url
    folder, _, name = bare.rpartition("/")
    return folder, name


def find_summaries(files: Any, urls: list[str]) -> list[str]:
    """The *-summary.json beside the shards, as far as the folders can be listed."""
    found: list[str] = []
    for folder in folders_of(urls):
        with contextlib.suppress(Exception):
            listed = sorted(files.unstrip_protocol(name) for name in files.ls(folder, detail=False))
            found += [url for url in listed if url.endswith("-summary.json") and split_url(url)[0] == folder]
    return found


def folders_of(urls: list[str]) -> list[str]:
    return list(dict.fromkeys(split_url(url)[0] for url in urls))


def ask_all(files: Any, pattern: str, urls: list[str], place: Path) -> list[RemoteFile]:
    def ask(url: str) -> RemoteFile:
        local = local_path(files, url, place)
        try:
            return several_tries(url, lambda: look_up(files, url, local))
        except UserError as error:
            if "{" in pattern and is_absent(error.__cause__):
                raise UserError(f"{pattern}: shard {url} is missing") from error
            raise

    with ThreadPoolExecutor(QUESTIONS_AT_ONCE) as threads:
        return list(threads.map(ask, urls))


def look_up_beside(files: Any, urls: list[str], summaries: list[str], place: Path) -> list[RemoteFile]:
    found = []
    for url in [*(f"{folder}/classes.json" for folder in folders_of(urls)), *summaries]:
        with contextlib.suppress(Exception):  # such a file need not be there, and servers have many ways to say so
            found.append(look_up(files, url, local_path(files, url, place)))
    return found


def look_up(files: Any, url: str, local: Path) -> RemoteFile:
    said = files.info(url)
    if said.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, "is a folder")
    version = next((str(said[key]) for key in VERSIONS if said.get(key)), None)
    size = None if said.get("size") is None else int(said["size"])
    return RemoteFile(url=url, size=size, version=version, local=local)


def local_path(files: Any, url: str, place: Path) -> Path:
    folder, name = split_url(url)
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{url}: {name!r} is no plain file name; rename the shard")
    where = [folder, *(str(files.storage_options.get(key)) for key in PLACES)]
    digest = hashlib.sha256("\0".join(where).encode(errors="surrogateescape")).hexdigest()[:12]
    last_parts = "_".join(without_password(folder).rstrip("/").split("/")[-2:])
    return place / f"{digest}-{re.sub(r'[^A-Za-z0-9.-]', '_', last_parts)[-60:]}" / name


def without_password(url: str) -> str:
    return re.sub(r"://([^/@:]*):[^/@]*@", r"://\1@", url)


def refuse_twice(pattern: str, shards: list[RemoteFile]) -> None:
    seen: set[Path] = set()
    for shard in shards:
        if shard.local in seen:
            raise UserError(f"{pattern}: names {shard.url} twice")
        seen.add(shard.local)


# ------------------------------------------------------------------------------------------------------------ bringing it


class StoppedError(Exception):
    """Another download failed, or the user pressed Ctrl-C."""


class Meter:
    """Bytes that have come, over all threads. Once `stopped` is set, every download ends at its next block."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self.stopped = threading.Event()
        self._show = show
        self._lock = threading.Lock()
        self._done = 0

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._show(self._done)


class CountBytes(Callback):  # type: ignore[misc]  # fsspec has no types
    """Tells a meter of each block that fsspec writes."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def relative_update(self, inc: int = 1) -> None:
        if self.meter.stopped.is_set():
            raise StoppedError
        self.value += inc
        self.meter.add(inc)

    def absolute_update(self, value: int) -> None:
        self.relative_update(value - self.value)


def download_all(files: Any, pattern: str, missing: list[RemoteFile], place: Path, *, progress: bool) -> None:
    try:
        prepare_folders(missing)
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written") from error
    needed = sum(file.size or 0 for file in missing)
    if needed > free:
        raise UserError(
            f"{pattern}: {decimal(needed)} are to be fetched, but {place} has {decimal(free)} free; "
            "set XDG_CACHE_HOME to a folder on a larger disk"
        )
    total = None if any(file.size is None for file in missing) else needed
    with report(total, Console(stderr=True, quiet=not progress)) as show:
        run_downloads(files, missing, Meter(show))


def prepare_folders(missing: list[RemoteFile]) -> None:
    for folder, url in {file.local.parent: split_url(file.url)[0] for file in missing}.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "url.txt").write_text(f"{without_password(url)}\n")


def run_downloads(files: Any, missing: list[RemoteFile], meter: Meter) -> None:
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as threads:
        downloads = [threads.submit(download, files, file, meter) for file in missing]
        try:
            for finished in as_completed(downloads):
                finished.result()
        except BaseException:
            meter.stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def download(files: Any, file: RemoteFile, meter: Meter) -> None:
    """Brings one file, unless another process did so meanwhile. It is there whole or not at all."""
    unfinished = file.local.with_name(f"{file.local.name}.unfinished-{platform.node()}-{os.getpid()}")
    try:
        with alone(file.local.with_name(f"{file.local.name}.lock"), meter.stopped):
            if file.is_here():
                meter.add(file.size or 0)
                return
            clear_left_behind(file.local)
            several_tries(file.url, lambda: bring(files, file, unfinished, meter), meter.stopped)
            file.note.unlink(missing_ok=True)  # the old one must never stand beside new content
            unfinished.rename(file.local)
            file.leave_note()
    except OSError as error:
        raise UserError(f"{file.local}: cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: Path, stopped: threading.Event) -> Iterator[None]:
    """One process of this machine at a time, by a lock that goes with its process, however that ends."""
    with path.open("ab") as lock:
        while not is_locked(lock):
            if stopped.wait(SECONDS_BETWEEN_LOOKS):
                raise StoppedError
        yield


def is_locked(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks have no locks: then a shard may be fetched twice, each time under its own name
        return True
    return True


def clear_left_behind(local: Path) -> None:
    for part in local.parent.iterdir():
        if part.name.startswith(f"{local.name}.unfinished-"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > LEFT_BEHIND_SECONDS:
                    part.unlink()


def bring(files: Any, file: RemoteFile, unfinished: Path, meter: Meter) -> None:
    # For hf:// only this callback leaves the Hub's own, faster way of downloading in use.
    counting = DEFAULT_CALLBACK if file.url.startswith("hf://") else CountBytes(meter)
    try:
        files.get_file(file.url, str(unfinished), callback=counting)
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
            size = os.fstat(written.fileno()).st_size
        if file.size not in (None, size):
            raise EOFError(f"{size} of {file.size} bytes came")
    except BaseException:
        meter.add(-counting.value)
        raise
    meter.add(size - counting.value)


@contextlib.contextmanager
def report(total: int | None, console: Console) -> Iterator[Callable[[int], None]]:
    """Gives a function to be told how many bytes have come: a bar on a terminal, else a line now and then."""
    if not console.is_terminal:
        yield lines(total, console)
        return
    columns = (TextColumn("fetched"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("fetched", total=total)
        yield lambda done: bar.update(task, completed=done)


def lines(total: int | None, console: Console) -> Callable[[int], None]:
    last = time.monotonic()

    def print_now_and_then(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"fetched {decimal(done)}" + ("" if total is None else f" of {decimal(total)}"))

    return print_now_and_then


# ------------------------------------------------------------------------------------------------------- when it goes wrong


def several_tries(url: str, action: Callable[[], T], stopped: threading.Event | None = None) -> T:
    """What `action` gives, tried again after a pause unless that is bound to fail; then UserError, from the cause."""
    for pause in (*PAUSES, None):
        try:
            return action()
        except StoppedError:
            raise
        except Exception as error:  # file systems come from many packages, each with errors of its own
            if pause is None or is_final(error):
                raise UserError(f"{url}: {reason(error)}") from error
        if (stopped or threading.Event()).wait(pause):
            raise StoppedError
    raise AssertionError("the last try returns or raises")


def underlying(error: BaseException) -> BaseException:
    """fsspec says FileNotFoundError for whatever an http server answers; the cause knows better."""
    while isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__
    return error


def http_status(error: BaseException) -> int | None:
    """From aiohttp's errors, or from httpx's and requests', which the Hub's are."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_absent(error: BaseException | None) -> bool:
    cause = error and underlying(error)
    return cause is not None and (isinstance(cause, FileNotFoundError) or http_status(cause) == 404)


def is_final(error: Exception) -> bool:
    cause = underlying(error)
    if status := http_status(cause):
        return 400 <= status < 500 and status not in PASSING_STATUS
    local = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EISDIR)
    return local or isinstance(cause, (FileNotFoundError, PermissionError))


def reason(error: Exception) -> str:
    """In a few words, on one line."""
    cause = underlying(error)
    if is_absent(cause):
        return "is not there"
    if status := http_status(cause):
        return f"the server answers {status} {getattr(cause, 'message', '')}".strip()
    said = (str(cause).strip().splitlines() or [""])[0]
    return said if isinstance(cause, EOFError) else f"{type(cause).__name__}: {said}".removesuffix(": ")
