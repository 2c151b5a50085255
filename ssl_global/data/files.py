"""Files that are there whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ssl_global.errors import UserError


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
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl; a line that is none, as the last one of a run that was killed may be, is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]
