"""Kill a run again and again, and see that nothing is lost: `python -m tests.kill_runs --times 30`.

One run is left alone. Then, each time, another begins with the same command and is killed (SIGKILL): one process or
all of them, at a random moment, or at a chosen point of saving a checkpoint. The same command goes on, is killed once
more, and goes on to the end. Its weights, teacher, centre and optimizer must then be those of the run that was left
alone, bit for bit. Prints how long each restart took to its first step. Ends with 1 if anything was lost.
"""

import argparse
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from faulty_pretrain import POINTS
from tiny_runs import arguments, finish, kill_all, losses, tensors, torchrun

from ssl_global.data.sample import built_in_sample

STEPS = ["--train.steps=300", "--checkpoint.every=20", "--encoder.drop-path=0.2", "--optim.warmup-epochs=0.1"]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--times", type=int, default=30)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--method", choices=("dino", "mae"), default="dino")
    options.add_argument("--seed", type=int, default=0, help="of the moments and the points")
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_runs-"))
    frozen = ["--method.freeze-prototypes-epochs=0.1"] if given.method == "dino" else []
    words = lambda out: arguments(given.method, built_in_sample()[0], out, *STEPS, *frozen)  # noqa: E731
    began = time.monotonic()
    code, _, error = finish(torchrun(words(folder / "whole"), processes=given.processes))
    whole_seconds = time.monotonic() - began
    if code:
        sys.exit(f"the run that is left alone fails: {error[-2000:]}")
    print(f"left alone: {whole_seconds:.1f} s, {given.processes} processes, {len(losses(folder / 'whole'))} steps")
    draw, lost, restarts = random.Random(given.seed), 0, []
    for number in range(given.times):
        out = folder / f"killed-{number}"
        said = [kill(words(out), out, given.processes, draw) for _ in range(2)]
        seconds, complaint = go_on(words(out), out, given.processes)
        restarts.append(seconds)
        complaint = complaint or differs(folder / "whole", out)
        lost += complaint is not None
        to_step = f"first step after {seconds:.1f} s" if seconds else "was finished"
        print(f"{number + 1}/{given.times}  {'; '.join(said)}; {to_step}: {complaint or 'bit-equal'}", flush=True)
        shutil.rmtree(out)
    shutil.rmtree(folder)
    median = statistics.median([seconds for seconds in restarts if seconds] or [0])
    print(f"{given.times - lost} of {given.times} bit-equal, {lost} lost; first step {median:.1f} s after a restart")
    return 1 if lost else 0


def kill(words: list[str], out: Path, processes: int, draw: random.Random) -> str:
    """Start the command and end it by SIGKILL. Returns how, in words."""
    if draw.random() < 0.5:
        place, number = draw.choice(sorted(POINTS)), draw.randint(1, 5)
        rank = draw.randrange(processes) if place.endswith("data") else 0
        begun = torchrun(
            [f"kill:{place}:{number}:{rank}", *words], processes=processes, script="tests/faulty_pretrain.py"
        )
        said = f"process {rank} {place} of save {number}"
    else:
        begun = torchrun(words, processes=processes)
        step = done(out) + draw.randint(0, 120)
        while begun.poll() is None and done(out) < step:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        workers = psutil.Process(begun.pid).children() if begun.poll() is None else []
        if workers and draw.random() < 0.5:
            draw.choice(workers).kill()
            said = "one process"
        else:
            if begun.poll() is None:
                kill_all(begun)
            said = "all"
    finish(begun)
    return f"{said}, at step {done(out)}"


def done(out: Path) -> int:
    return len(losses(out)) if (out / "metrics.jsonl").exists() else 0


def go_on(words: list[str], out: Path, processes: int) -> tuple[float | None, str | None]:
    """(seconds to the first new step, None if there was none to take; what went wrong)."""
    metrics = out / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    began, first = time.monotonic(), None
    running = torchrun(words, processes=processes)
    while running.poll() is None and first is None:
        time.sleep(0.01)
        if metrics.exists() and metrics.stat().st_mtime_ns != before and '"loss"' in metrics.read_text():
            first = time.monotonic() - began
    code, _, error = finish(running)
    return first, f"ended with {code}: {error[-1500:]}" if code else None


def differs(whole: Path, out: Path) -> str | None:
    a, b = tensors(whole), tensors(out)
    if a.keys() != b.keys():
        return f"other tensors: {sorted(a.keys() ^ b.keys())[:3]}"
    names = [name for name in a if not (a[name] == b[name]).all()]
    if names:
        return f"{len(names)} of {len(a)} tensors differ, {names[0]} among them"
    return None if losses(whole) == losses(out) else "other losses"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.SubprocessError as error:
        sys.exit(str(error))
