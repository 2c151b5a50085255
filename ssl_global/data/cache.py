"""Where files are kept that can be made again: the built-in sample, fetched shards, indexes."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/ssl_global, or ~/.cache/ssl_global; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_global"


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process of this machine at a time, however long it takes: a barrier of the training processes would time out.

    Where there can be no lock, all work at once: what they write is renamed when whole, and the same.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX)
        yield
