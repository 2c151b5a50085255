"""Programs that begin where torch is imported already: a test of several processes costs a second, not twenty.

A Python that imports torch, timm and Accelerate and makes an optimizer has spent five seconds of a core before it has
done anything. multiprocessing's fork server does that once for each pytest process; what is started here is forked from
it, with arguments, environment and output of its own, and goes on as the script would. Several processes are started
and watched by torchrun's own agent, told to fork its workers instead of executing Python again.

What it cannot show: that a script works in a fresh Python, and that nothing hangs on the hash of a string, which forks
have in common. So some tests of each kind start the real program: tiny_runs.torchrun and subprocess.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[1]

# What a run imports sooner or later; the optimizer asks for torch._dynamo, an FSDP engine for the rest of torch.
IMPORTED = [
    "ssl_global.pretrain", "ssl_global.finetune", "ssl_global.cli", "ssl_global.predict", "benchmarks",
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.launcher.api", "torch.utils.tensorboard",
]  # fmt: skip

# One thread each: the processes share two cores with each other and with other tests.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
SERVER = multiprocessing.get_context("forkserver")


class Place(NamedTuple):
    """Where a program runs."""

    channels: list[str]  # files of what it says, and of its errors
    environment: dict[str, str]
    cwd: Path
    group: bool


class Started:
    """A process on its way, to be asked as subprocess.Popen is. What it says is kept in files."""

    def __init__(self, program: Callable[..., None], *given: int | str, cwd: Path = ROOT, group: bool = False) -> None:
        self.channels = [tempfile.NamedTemporaryFile("r+") for _ in range(2)]  # noqa: SIM115
        place = Place([channel.name for channel in self.channels], os.environ | ENVIRONMENT, cwd, group)
        self.process = SERVER.Process(target=begin, args=(program, given, place))
        ensure_serving()
        self.process.start()
        self.pid = self.process.pid
        RUNNING.append(self)

    def poll(self) -> int | None:
        self.process.join(0)
        return self.returncode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a process started by tests/warm.py", timeout or 0)
        out, error = (Path(channel.name).read_text() for channel in self.channels)
        return out, error

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


RUNNING: list[Started] = []


@atexit.register
def end_what_runs() -> None:
    """What a failed test has left; Python would wait for it."""
    for one in RUNNING:
        if one.poll() is None:
            launcher = psutil.Process(one.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                process.kill()


def ensure_serving() -> None:
    """The server begins with the first process, in the environment that a new Python would get."""
    before = dict(os.environ)
    os.environ |= ENVIRONMENT
    SERVER.set_forkserver_preload(IMPORTED)
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ |= before


def torchrun(words: Sequence[str], *, processes: int, max_restarts: int, script: Path) -> Started:
    """`torchrun --standalone --nproc_per_node PROCESSES --max_restarts MAX_RESTARTS SCRIPT WORDS`."""
    return Started(launch, processes, max_restarts, str(script), *words)


def python(*words: object, group: bool = False) -> Started:
    """`python WORDS`: SCRIPT ..., -m MODULE ... or -c PROGRAM ...; group: in a process group of its own."""
    return Started(run, *map(str, words), group=group)


def completed(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `python WORDS` has said, run in that folder."""
    process = Started(run, *map(str, words), cwd=cwd)
    out, error = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode or 0, out, error)


# ------------------------------------------------------------------------------------------------ in the new process


def begin(program: Callable[..., None], given: tuple, place: Place) -> None:
    if place.group:
        os.setsid()
    for number, name in enumerate(place.channels, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ |= place.environment
    os.chdir(place.cwd)
    program(*given)


def launch(processes: int, max_restarts: int, script: str, *words: str) -> None:
    """As torch.distributed.run does, but for the workers, which are forked."""
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=max_restarts, run_id=str(uuid.uuid4()),
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
    )  # fmt: skip
    record(elastic_launch(config, run))(script, *words)


def run(*words: str) -> None:
    """As Python does: signals are nobody's yet, an error is shown with its traceback, and the code is 1."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        match words:
            case ["-c", program, *rest]:
                sys.argv = ["-c", *rest]
                exec(program, {"__name__": "__main__"})
            case ["-m", module, *rest]:
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case [script, *_]:
                sys.argv = list(words)
                sys.path.insert(0, str(Path(script).parent))
                runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
