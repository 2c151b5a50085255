"""One process dies or hangs: the others end soon, and say which one it was.

Each process notes once a second in the processes' common store how far it is. One that has not moved for `timeout`
seconds reads the notes of the others and names who is behind, or silent, or out of reach; then it ends, whatever its
main thread is waiting for. A process that sees an error of its own leaves a note of that too. Before the first step and
in an evaluation a process may stand still for as long as it takes, but not fall silent.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from ssl_global.errors import UserError

NOTE_EVERY = 1.0  # seconds (ours)
SILENT_AFTER = 5.0  # seconds without a new note: the process, or its machine, is gone (ours)
STORE_ANSWERS_WITHIN = 10.0  # seconds (ours)
EXIT_CODE = 75  # sysexits.h, EX_TEMPFAIL: start it again


class Watch:
    """Watches from `begin()` on; `with watch:` around all that the processes do together."""

    def __init__(self, store: dist.Store | None, *, rank: int, num_processes: int, timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.num_processes = num_processes
        self.timeout = timeout
        self.who = f"process {rank} (machine {socket.gethostname()}, pid {os.getpid()})"
        self.step, self.doing, self.moves = 0, "start", 0
        self.moved_at = time.monotonic()
        self.begun = threading.Event()
        self.over = threading.Event()
        self.patient = 0
        self.heard: tuple[float, list[dict[str, Any]]] | None = None  # a patient one's last look at the notes

    # ------------------------------------------------------------------------------------------- what the loop tells it

    def begin(self) -> None:
        """From now on steps are expected: data are there, the model is compiled."""
        self.moved_at = time.monotonic()
        self.begun.set()

    def at(self, step: int, doing: str) -> None:
        """The run has moved: this is what it does now."""
        self.step, self.doing, self.moves = step, doing, self.moves + 1
        self.moved_at = time.monotonic()

    @contextlib.contextmanager
    def aside(self, doing: str) -> Iterator[None]:
        """Something that may take as long as it takes: an evaluation, a last checkpoint."""
        self.at(self.step, doing)
        self.patient += 1
        yield
        self.patient -= 1
        self.at(self.step, "the step")

    # ------------------------------------------------------------------------------------------------------ the threads

    def __enter__(self) -> "Watch":
        if self.store is not None:
            self.note()
            for work in (self.leave_notes, self.look):
                threading.Thread(target=work, daemon=True, name=f"watch {work.__name__}").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.over.set()
        if self.store is None or not isinstance(error, Exception) or isinstance(error, UserError):
            return
        with contextlib.suppress(Exception):
            self.store.set(f"failed {self.rank}", f"{type(error).__name__}: {error}"[:500])
        # An error of its own keeps its traceback; what a partner's end makes of this process is none.
        if is_echo(str(error)) and (gone := self.answered(self.gone)):
            self.end(f"the run ends at step {self.step}", gone)

    def leave_notes(self) -> None:
        while not self.over.wait(NOTE_EVERY):
            with contextlib.suppress(Exception):  # the machine that has the store may be out of reach
                self.note()

    def note(self) -> None:
        assert self.store is not None
        facts = {"who": self.who, "step": self.step, "doing": self.doing, "moves": self.moves, "at": time.time()}
        self.store.set(f"note {self.rank}", json.dumps(facts))

    def look(self) -> None:
        while not self.over.wait(min(NOTE_EVERY, self.timeout / 4)):
            stuck = time.monotonic() - self.moved_at
            place = f"in {self.doing} of step {self.step + 1}"
            if stuck <= self.timeout:
                self.heard = None
                continue
            if self.begun.is_set() and not self.patient:
                what, why = f"no move for {stuck:.0f} s {place}", self.answered(self.behind)
            else:
                what, why = f"the run ends {place}", self.answered(self.silent)
            if why and not self.over.is_set():
                self.end(what, why)

    def end(self, what: str, why: list[str]) -> None:
        tell(f"{self.who}: {what}: {'; '.join(why)}. {GO_ON}")
        if any(line.startswith(self.who) for line in why):
            tell(f"{self.who} hangs here:\n{main_thread_stack()}")
        leave()

    # ------------------------------------------------------------------------------------------------ whose fault it is

    def answered(self, question: Callable[[], list[str]]) -> list[str]:
        """What `question()` gives, or that nobody can be asked: a store on a lost machine blocks whoever does."""
        answers: list[list[str]] = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                answers.append(question())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(STORE_ANSWERS_WITHIN + SILENT_AFTER)
        return answers[0] if answers else [NO_ANSWER]

    def notes(self) -> list[dict[str, Any]]:
        assert self.store is not None
        self.note()
        keys = [f"note {rank}" for rank in range(self.num_processes)]
        unknown = {"step": -1, "moves": -1, "doing": "nothing yet", "at": 0.0}
        return [
            json.loads(self.store.get(key)) if self.store.check([key]) else unknown | {"who": f"process {rank}"}
            for rank, key in enumerate(keys)
        ]

    def silent(self) -> list[str]:
        """Who has left no note since this was last asked, `timeout` ago: thousands must not ask every second."""
        if self.heard is not None and time.monotonic() - self.heard[0] <= max(self.timeout, SILENT_AFTER):
            return []
        before, self.heard = self.heard, (time.monotonic(), self.notes())
        return self.same(before[1], self.heard[1]) if before else []

    def gone(self) -> list[str]:
        """Who has an error of its own, or leaves no notes any more."""
        assert self.store is not None
        first = self.notes()
        failed = self.failed(first)
        if failed:
            return failed
        time.sleep(SILENT_AFTER)
        return self.failed(first) or self.same(first, self.notes())

    def same(self, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
        """Whose note is still the same, whatever the machines' clocks say."""
        return [
            f"{note['who']} is gone, last heard of at step {note['step']}" if note["at"] else f"{note['who']} {NEVER}"
            for rank, note in enumerate(before)
            if rank != self.rank and note["at"] == now[rank]["at"]
        ]

    def failed(self, notes: list[dict[str, Any]]) -> list[str]:
        """Who has noted an error that is not the echo of another's end."""
        assert self.store is not None
        found = []
        for rank, note in enumerate(notes):
            if rank != self.rank and self.store.check([f"failed {rank}"]):
                said = self.store.get(f"failed {rank}").decode()
                if not is_echo(said):
                    found.append(f"{note['who']} failed: {said}")
        return found

    def behind(self) -> list[str]:
        """Those that moved least, and what they do."""
        notes = self.notes()
        least = min(note["moves"] for note in notes)
        if all(note["moves"] == least for note in notes):
            return self.gone() or ["all processes wait in the same place"]
        return [
            f"{note['who']} is behind, in {note['doing']} of step {note['step'] + 1}, "
            f"last heard of {max(time.time() - note['at'], 0):.0f} s ago"
            if note["at"]
            else f"{note['who']} {NEVER}"
            for note in notes
            if note["moves"] == least
        ]


NEVER = "was never heard of"
NO_ANSWER = "the store of the processes does not answer: the machine that has it, or the way to it, is gone"
GO_ON = "The same command goes on from the last checkpoint"

# What gloo and NCCL say on processes whose partner is gone.
ECHOES = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "nccl", "SaveError")


def is_echo(said: str) -> bool:
    return any(word in said for word in ECHOES)


def main_thread_stack() -> str:
    ident = threading.main_thread().ident
    assert ident is not None
    return "".join(traceback.format_stack(sys._current_frames()[ident])[-4:]).rstrip()


def tell(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def leave() -> None:
    """At once: the main thread may wait for a message that never comes."""
    sys.stdout.flush()
    os._exit(EXIT_CODE)
