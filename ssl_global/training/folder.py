"""A run's folder: opened by one run at a time, for one recipe and one data set, and what is found in it.

OUT/.lock       held by the main process as long as it lives; it says who holds it
OUT/run.json    the command, versions, commit
OUT/data.json   a hash of each shard or folder, of images and of masks
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl_global.data.files import read_json
from ssl_global.data.masks import Masks
from ssl_global.data.source import Source, difference, hash_of
from ssl_global.data.stream import Stream
from ssl_global.errors import UserError
from ssl_global.recipe import Recipe, as_json, refuse_changes
from ssl_global.training import checkpoint
from ssl_global.training.processes import on_main_for_all


@contextlib.contextmanager
def held(out: Path, *, fresh: bool) -> Iterator[None]:
    """The folder, made if need be, and this run the only one in it. Raises UserError on all processes if it cannot be.

    fresh  move a run that is there aside
    """
    with contextlib.ExitStack() as lock:

        def take() -> None:
            try:
                out.mkdir(parents=True, exist_ok=True)
                refuse_links(out)
                lock.enter_context(alone(out))
                if fresh and any(file.name != ".lock" for file in out.iterdir()):
                    move_aside(out)
            except OSError as error:
                raise UserError(
                    f"--out {out}: {error.strerror}; a folder that can be written to would be right"
                ) from error

        on_main_for_all(take)
        yield


def refuse_links(out: Path) -> None:
    """A run writes to files of its own: in a stranger's folder metrics.jsonl may be a link to one of the user's."""
    for file in out.iterdir():
        if file.is_symlink() and not file.is_dir():
            raise UserError(f"--out {out}: {file.name} is a link to {os.readlink(file)}; a run writes to its own files")


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Raises UserError, naming the other, if another run works in this folder."""
    with (out / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"--out {out}: another run is at work there ({file.read().strip() or 'it does not say which'}); "
                "wait for its end, or give another --out"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def at_work(out: Path) -> bool:
    """Whether a run holds the folder, as far as this machine can tell."""
    try:
        with (out / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def move_aside(out: Path) -> None:
    """All but the lock, which is held."""
    aside = out.with_name(f"{out.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    for file in list(out.iterdir()):
        if file.name != ".lock":
            file.rename(aside / file.name)
    print(f"--fresh: the run that was in {out} is now in {aside}")


def find_checkpoint(
    out: Path, recipe: Recipe, data: Source | Stream, masks: Masks | None, provenance: dict[str, Any]
) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest whole checkpoint, its record, and why newer ones were passed over, if it goes on with recipe and data.

    All processes call it. Raises UserError if it is of another recipe or other data.
    """
    found = checkpoint.newest(out)

    def check() -> None:
        if found is None:
            write_json(out / "run.json", provenance)
            write_json(out / "data.json", parts_of(data, masks))
            return
        _, record, _ = found
        refuse_changes(record["recipe"], json.loads(json.dumps(as_json(recipe))), where=f"--out {out}")
        refuse_other_data(record["state"]["data"], data, masks, out)

    on_main_for_all(check)
    return found


def refuse_other_data(begun_with: str, data: Source | Stream, masks: Masks | None, out: Path) -> None:
    """A run goes on with the samples that it was begun with, or its place among them means nothing."""
    if fingerprint(data, masks) == begun_with:
        return
    before = read_json(out / "data.json")
    known = isinstance(data, Source) and isinstance(before, dict)
    said = f": {difference(before, parts_of(data, masks))}" if known else ""
    raise UserError(
        f"--data {data.path}: not the samples that the run in {out} was begun with{said} ({data.describe()} now); "
        "give the same data to go on, or --fresh to begin anew"
    )


def fingerprint(data: Source | Stream, masks: Masks | None) -> str:
    if not isinstance(data, Source):
        return f"stream {data.path}"
    return hash_of({"images": data.fingerprint, "masks": masks.source.fingerprint}) if masks else data.fingerprint


def parts_of(data: Source | Stream, masks: Masks | None) -> dict[str, str]:
    """A hash of each part; a stream's are not known."""
    of_images = data.parts() if isinstance(data, Source) else {}
    return of_images | (masks.parts() if masks else {})


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(file)
