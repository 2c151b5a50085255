"""Work that is handed out to forked processes, one item at a time, which end when nobody listens any more."""

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, TypeAlias

from ssl_global.errors import UserError

Told: TypeAlias = Literal["next", "image"]  # by a worker: that it wants its next item; that an image is done


class Deserted(Exception):  # noqa: N818 - a worker's reason to end: nobody listens any more
    pass


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
