"""What a person sees while many images, or tensors, are gone through."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal (ours)


@contextlib.contextmanager
def report(verb: str, total: int, *, what: str = "images", visible: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function to be told how many are done: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True, quiet=not visible)
    if not console.is_terminal:
        yield lines(verb, total, what, console)
        return
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda done: bar.update(task, completed=done)


def lines(verb: str, total: int, what: str, console: Console) -> Callable[[int], None]:
    last = time.monotonic()

    def print_now_and_then(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"{verb} {done} of {total} {what}")

    return print_now_and_then
