"""Who decodes: threads of this process, processes of their own, or nobody but the caller.

Decoding and resizing release Python's lock, so threads are the rule: they write straight into the batch's memory. A
worker process costs a copy and a start of its own; it is for decoders that hold the lock.
"""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch

from ssl_global.recipe import Data

MOST_WORKERS = 16  # by default (ours)
Submit: TypeAlias = Callable[..., Future[Any]]


def num_workers(data: Data, processes_here: int) -> int:
    """As the recipe says, or a share of this machine's cores, at least 1 and at most 16.

    processes_here  training processes on this machine: they share its cores
    """
    if data.workers is not None:
        return data.workers
    return min(max(num_cores() // processes_here - 1, 1), MOST_WORKERS)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def workers(data: Data, count: int, function: Callable[..., Any]) -> Iterator[Submit]:
    """`count` workers that know `function`: gives what takes its arguments and promises its result.

    They are gone when this ends, however it ends.
    """
    if count == 0:
        yield lambda *arguments: done_here(function, arguments)
    elif data.worker_kind == "threads":
        with closing(decoding_threads(count)) as pool:
            yield lambda *arguments: pool.submit(function, *arguments)
    else:
        context = torch.multiprocessing.get_context()
        with closing(ProcessPoolExecutor(count, context, initializer=begin_process, initargs=(function,))) as pool:
            yield lambda *arguments: pool.submit(call_known, *arguments)


def in_order(submit: Submit, items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """The results for the items, in their order; at most `ahead` are begun before they are asked for."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def done_here(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Future[Any]:
    done: Future[Any] = Future()
    try:
        done.set_result(function(*arguments))
    except Exception as error:
        done.set_exception(error)
    return done


@contextlib.contextmanager
def closing(pool: ThreadPoolExecutor | ProcessPoolExecutor) -> Iterator[ThreadPoolExecutor | ProcessPoolExecutor]:
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def decoding_threads(count: int) -> ThreadPoolExecutor:
    """A pool of torch's own threads for each decoder would only get in the others' way, so each gets one."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "decoder", initializer=torch.set_num_threads, initargs=(1,))
    all_here = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(all_here.wait)
    all_here.wait()
    torch.set_num_threads(before)  # torch takes the last number set for threads that begin later
    return pool


_known: Callable[..., Any]  # in a worker process: what it is there for


def begin_process(function: Callable[..., Any]) -> None:
    """A signal reaches the whole process group: workers must serve the step after which the run is saved."""
    global _known
    _known = function
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def call_known(*arguments: Any) -> Any:
    return _known(*arguments)
