"""Whole runs in trouble: two at once, no room on the disk, nowhere to write, signals at odd moments, no way on."""

import json
import os
import signal
import subprocess

import pytest
import torch
import warm
from test_checkpoint import small_disk  # noqa: F401
from test_runs import interrupt_at
from tiny_runs import ROOT, arguments, assert_bit_equal, losses, metrics, start, tensors, wait_for_step

from ssl_global.evaluation.judge import Judge
from ssl_global.methods.dino import Dino
from ssl_global.training import checkpoint, guard, loop, processes
from ssl_global.training.checkpoint import Writer
from ssl_global.training.sharded import Sharded


def refused(run, capsys, method, out, *more):
    with pytest.raises(SystemExit) as stop:
        run(method, out, *more)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_two_runs_in_one_folder_are_one_too_many(run, photographs, tmp_path, capsys):
    out = tmp_path / "run"
    first = start(arguments("mae", photographs, out, "--train.steps=4000"), processes=2)
    wait_for_step(first, out, 2)
    error = refused(run, capsys, "mae", out, "--train.steps=4000")
    assert f"--out {out}: another run is at work there (process " in error
    assert "since 20" in error
    error = refused(run, capsys, "mae", out, "--train.steps=4000", "--fresh")
    assert "another run is at work there" in error
    first.terminate()
    said, error = first.communicate(timeout=60)
    assert "the same command goes on from there" in said, error[-2000:]
    run("mae", out, "--train.steps=4000", "--fresh", "--train.steps=3")
    assert len(list(tmp_path.glob("run.before-*"))) == 1


def test_a_folder_that_cannot_be_written_to(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert f"--out {tmp_path / 'file'}: " in refused(run, capsys, "mae", tmp_path / "file")
    assert f"--out {tmp_path / 'file' / 'run'}: Not a directory" in refused(
        run, capsys, "mae", tmp_path / "file" / "run"
    )
    assert (tmp_path / "file").read_text() == ""


def test_a_disk_that_is_read_only(run, small_disk, capsys):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system; a folder that can be written to" in refused(run, capsys, "mae", small_disk / "run")


def test_a_disk_that_is_full_for_a_while(run, small_disk, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A save fails and is warned of; training goes on, the checkpoint before stays, the next one succeeds."""
    whole = run("mae", tmp_path / "whole", "--train.steps=12")
    seed_step, filler, kept = loop.seed_step, small_disk / "filler", []

    def fill(seed, step, process):
        if step == 4:
            filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 100_000))
        if step == 8:
            kept.extend(folder.name for folder in checkpoint.checkpoints(small_disk / "run"))
            filler.unlink()
        seed_step(seed, step, process)

    monkeypatch.setattr(loop, "seed_step", fill)
    out = run("mae", small_disk / "run", "--train.steps=12")
    said = capsys.readouterr().out
    assert "a checkpoint could not be written: " in said
    assert "No space left on device" in said
    assert "the run goes on, the next one is tried" in said
    assert kept == ["step-00000003"]
    assert_bit_equal(tensors(whole), tensors(out))


def test_a_run_that_cannot_be_saved_at_its_end_says_so(run, tmp_path, monkeypatch, capsys):
    def full(*given):
        raise OSError(28, "No space left on device", "disk")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_data", full)
        error = refused(run, capsys, "mae", tmp_path / "run")
    assert "the run could not be saved: No space left on device: disk; there is no checkpoint of before" in error
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(run, photographs, tmp_path, monkeypatch, capsys, number):
    """Before the first step, between two steps, and after the last: each time the same command goes on."""
    words = [f"--val={photographs}", "--eval.every=4", "--eval.batch=8"]
    whole = run("dino", tmp_path / "whole", *words)
    out, evaluate = tmp_path / "parted", Judge.evaluate
    for step, which in ((0, 1), (4, 2), (8, 1)):
        calls = []

        def signalled(self, encoder, *, final, calls=calls, which=which):
            calls.append(final)
            if len(calls) == which:
                os.kill(os.getpid(), number)
            return evaluate(self, encoder, final=final)

        with monkeypatch.context() as patched:
            patched.setattr(Judge, "evaluate", signalled)
            run("dino", out, *words)
        assert f"stopped by {number.name} after step {step} of 8" in capsys.readouterr().out
        assert len(calls) == which
        assert not (out / "summary.json").exists()
    run("dino", out, *words)
    assert_bit_equal(tensors(whole), tensors(out))
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (whole, out))
    assert [first[name] for name in ("knn", "knn_untrained", "loss")] == [
        second[name] for name in ("knn", "knn_untrained", "loss")
    ]


def test_a_save_that_outlasts_the_grace_ends_the_run_as_it_is(run, tmp_path, monkeypatch, capsys):
    left = []
    monkeypatch.setattr(guard, "leave", lambda: left.append(True))
    save = Writer.save

    def slow(self, *given, wait):
        if wait:
            signal.sigtimedwait([], 0.5)
        return save(self, *given, wait=wait)

    monkeypatch.setattr(Writer, "save", slow)
    interrupt_at(monkeypatch, 2)
    run("mae", tmp_path / "run", "--grace=0.2")
    assert left == [True]
    assert "--grace 0.2: not saved that soon after SIGTERM" in capsys.readouterr().err


def test_a_run_that_is_never_finite_rolls_back_once_and_ends_with_a_report(run, tmp_path, monkeypatch, capsys):
    """The look for where it began is taken in the steps' precision: FSDP2's weights are in no other."""
    forward, block, in_precision = Dino.forward, [], []

    def poisoned(self, batch, progress):
        in_precision.append(torch.is_autocast_enabled("cpu"))
        if progress.step >= 4 and not block:
            layer = self.student.encoder.model.blocks[1].mlp.fc1
            block.append(layer.register_forward_hook(lambda module, given, output: output * float("inf")))
        return forward(self, batch, progress)

    monkeypatch.setattr(Dino, "forward", poisoned)
    monkeypatch.setattr(loop, "precision", lambda accelerator, recipe: torch.autocast("cpu", torch.bfloat16))
    with pytest.raises(SystemExit) as stop:
        run("dino", tmp_path / "run", "--train.steps=20", "--train.max-bad-steps=2")
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert all(in_precision)
    assert "rolled back to step 3; the data goes on behind step 7. It is done once" in said.out
    assert "not finite in 3 steps in a row, 5 to 7" in said.out
    assert "process 0: the output of student.encoder.model.blocks.1.mlp.fc1 (Linear) is not finite" in said.err
    assert "the run ends: it was rolled back before" in said.err
    folder, record, _ = checkpoint.newest(tmp_path / "run")
    assert record["state"]["moved_past"] == 4
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(
        range(1, len(losses(tmp_path / "run")) + 1)
    )
    with Sharded(folder) as kept:
        assert all(torch.isfinite(kept.read(name)).all() for name in kept.names())


def test_a_rolled_back_run_resumes_where_it_was(run, tmp_path, monkeypatch, capsys):
    """Interrupted after the roll-back or not: the same weights. The data are those behind the bad steps."""
    agree = loop.agree

    def poison(counted):
        def agreed(loss, norm, **flags):
            counted.append(loss)
            return agree(loss * float("nan") if 5 < len(counted) <= 8 else loss, norm, **flags)

        return agreed

    words = ["--train.steps=14", "--train.max-bad-steps=2"]
    with monkeypatch.context() as patched:
        patched.setattr(loop, "agree", poison([]))
        whole = run("dino", tmp_path / "whole", *words)
    assert "rolled back to step 3; the data goes on behind step 8" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(loop, "agree", poison([]))
        seed_step, seen = loop.seed_step, []

        def seed_and_signal(seed, step, process):
            seen.append(step)
            if step == 4 and seen.count(4) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            seed_step(seed, step, process)

        patched.setattr(loop, "seed_step", seed_and_signal)
        parted = run("dino", tmp_path / "parted", *words)
    assert "stopped by SIGTERM after step 5 of 14" in capsys.readouterr().out
    run("dino", parted, *words)
    assert_bit_equal(tensors(whole), tensors(parted))
    assert losses(whole) == losses(parted)


def test_how_to_go_on_is_printed_without_fresh(photographs, tmp_path):
    words = arguments("mae", photographs, tmp_path / "run", "--train.steps=4000", "--fresh")
    process = warm.python(ROOT / "pretrain.py", *words)
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    (line,) = [line for line in said.splitlines() if "the same command goes on" in line]
    assert "pretrain.py --recipe=mae:demo" in line
    assert "--fresh" not in line


def test_processes_that_accelerate_does_not_join_are_refused(run, tmp_path, monkeypatch, capsys):
    """Each of them would be a run of its own, in one folder."""

    class Alone:
        num_processes = 1

    monkeypatch.setattr(processes, "meet", lambda **how: None)
    monkeypatch.setattr(processes, "Accelerator", lambda **how: Alone())
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = refused(run, capsys, "mae", tmp_path / "run")
    assert "WORLD_SIZE = 2: Accelerate joins 1 of the processes; without GPUs --device cpu joins all" in error


def test_fresh_is_fresh_once(run, tmp_path, monkeypatch):
    """What a launcher starts again after a failure goes on with what it began."""
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        out = run("mae", tmp_path / "run", "--fresh")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("mae", out, "--fresh")
    assert list(tmp_path.glob("run.before-*")) == []
    assert (out / "summary.json").exists()
