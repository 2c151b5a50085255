"""pretrain.py that meets a fault: `torchrun ... tests/faulty_pretrain.py KIND:PLACE:TIME:PROCESS ARGUMENTS`.

KIND     kill (SIGKILL), hang (for an hour), raise (an error of its own), nan (a loss; at a step only)
PLACE    step, or a point of saving: see POINTS
TIME     which step (counted from 0), or the how many-th save (from 1)
PROCESS  its rank; what only the main process does takes 0

A process that torchrun has restarted meets none.
"""

import os
import signal
import sys
import time
from pathlib import Path

from ssl_global import pretrain
from ssl_global.training import checkpoint, loop

# Before or after which function of training/checkpoint.py.
POINTS = {
    "before-data": ("before", "write_data"),
    "after-data": ("after", "write_data"),
    "in-commit": ("before", "flush_record"),
    "before-rename": ("before", "put_in_place"),
    "after-rename": ("after", "put_in_place"),
    "in-prune": ("before", "prune"),
}


def meet(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(3600)
    raise RuntimeError("a fault of this process alone")


def at_step(kind: str, number: int, rank: int) -> None:
    seed_step = loop.seed_step

    def seed(run_seed, step, process):
        if step == number and process == rank:
            meet(kind)
        seed_step(run_seed, step, process)

    loop.seed_step = seed


def nan_from(number: int, count: int = 4) -> None:
    """The losses of these steps, on the last process, the first time that they are taken."""
    agree, taken = loop.agree, []

    def agreed(loss, gradient_norm, **flags):
        taken.append(loss)
        if number < len(taken) <= number + count and int(os.environ.get("RANK", "0")) == 1:
            loss = loss * float("nan")
        return agree(loss, gradient_norm, **flags)

    loop.agree = agreed


def while_saving(kind: str, place: str, number: int) -> None:
    when, name = POINTS[place]
    calls = []
    if name == "flush_record":
        function, name = checkpoint.flush, "flush"
        here = lambda path, *_: Path(path).name == checkpoint.RECORD  # noqa: E731
    else:
        function = getattr(checkpoint, name)
        here = lambda *_: True  # noqa: E731

    def wrapped(*given):
        if here(*given):
            calls.append(given)
        at_last = len(calls) == number and here(*given)
        if at_last and when == "before":
            meet(kind)
        result = function(*given)
        if at_last and when == "after":
            meet(kind)
        return result

    setattr(checkpoint, name, wrapped)


if __name__ == "__main__":
    kind, place, number, rank = sys.argv[1].split(":")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if kind == "nan":
            nan_from(int(number))
        elif place == "step":
            at_step(kind, int(number), int(rank))
        elif os.environ.get("RANK", "0") == rank:
            while_saving(kind, place, int(number))
    pretrain.main(sys.argv[2:])
