"""Whole runs in this process: resumed = uninterrupted, accumulated = at once, skipped steps, bad data, refusals."""

import json
import os
import shutil
import signal

import pytest
import timm
import torch
from tiny_runs import TINY, assert_bit_equal, losses, metrics, tensors

from ssl_global.data.pack import pack
from ssl_global.data.source import open_source
from ssl_global.methods.dino import Dino
from ssl_global.training import loop

METHODS = tuple(TINY)


def interrupt_at(monkeypatch, step, number=signal.SIGTERM):
    """The signal comes in the middle of that step."""
    seed_step = loop.seed_step

    def seed_and_signal(seed, now, process):
        if now == step:
            os.kill(os.getpid(), number)
        seed_step(seed, now, process)

    monkeypatch.setattr(loop, "seed_step", seed_and_signal)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_leaves_all_that_it_promises(method, run, tmp_path, photographs, capsys):
    out = run(method, tmp_path / "run", f"--val={photographs}", "--eval.every=4", "--log.every=2")
    summary = json.loads((out / "summary.json").read_text())
    needed = {
        "recipe",
        "steps",
        "images",
        "seconds",
        "images_per_second",
        "peak_memory",
        "loss",
        "knn",
        "knn_untrained",
    }
    assert needed | {"knn_untrained", "knn_pixels", "export"} <= summary.keys()
    assert summary["steps"] == 8
    assert summary["images"] == 96
    assert summary["peak_memory"] > 1e8
    assert 0 <= summary["knn_untrained"] <= 1
    model = timm.create_model(f"local-dir:{out / 'export'}", pretrained=True)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 32)
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-00000006", "step-00000008"]
    lines = metrics(out)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 8]
    assert [line["step"] for line in lines if "knn" in line] == [4, 8]
    said = capsys.readouterr().out
    for words in ("1 process x 1 x 12 images = 12 a step", "8 steps = 4 epochs of 24 images", "k-NN", "(recipe: 64)"):
        assert words in said


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [1, 4])
def test_interrupted_and_resumed_is_bit_equal(method, step, run, tmp_path, monkeypatch, capsys):
    more = ["--encoder.drop-path=0.2"]
    whole = run(method, tmp_path / "whole", *more)
    with monkeypatch.context() as patched:
        interrupt_at(patched, step)
        parted = run(method, tmp_path / "parted", *more)
    assert f"stopped by SIGTERM after step {step + 1} of 8" in capsys.readouterr().out
    assert not (parted / "summary.json").exists()
    run(method, parted, *more)
    assert f"step {step + 1}, {12 * (step + 1)} images seen" in capsys.readouterr().out
    assert_bit_equal(tensors(whole), tensors(parted))
    assert losses(whole) == losses(parted)  # the log reads as if nothing had happened


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_workers_change_nothing(run, tmp_path, kind):
    by_two = run("dino", tmp_path / "2", "--data.workers=2", f"--data.worker-kind={kind}")
    assert_bit_equal(tensors(run("dino", tmp_path / "0")), tensors(by_two))


def test_a_run_in_parts_on_other_workers_is_bit_equal(run, tmp_path, monkeypatch):
    """Also with repeated samples, the last batch dropped, and the data's own mean."""
    settings = ["--data.repeats=2", "--data.last-batch=drop", "--data.mean=auto", "--data.std=auto"]
    whole = run("dino", tmp_path / "whole", *settings)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        parted = run("dino", tmp_path / "parted", *settings, "--data.workers=2")
    run("dino", parted, *settings, "--data.workers=1", "--data.worker-kind=processes")
    assert_bit_equal(tensors(whole), tensors(parted))
    recipe = json.loads(max((whole / "checkpoints").glob("*/checkpoint.json")).read_text())["recipe"]
    assert len(recipe["data.mean"]) == 3
    assert all(0.1 < number < 0.7 for number in recipe["data.mean"] + recipe["data.std"])
    exported = json.loads((whole / "export" / "config.json").read_text())
    assert exported["pretrained_cfg"]["mean"] == recipe["data.mean"]


def test_a_streamed_run(run, tmp_path, photographs, capsys):
    """webdataset's reader from shards through a pipe; judged on labelled images; it says what it cannot promise."""
    pack(open_source(str(photographs)), tmp_path / "shards", shard_bytes=40_000, progress=False)
    data = f"pipe:cat {tmp_path}/shards/photographs0-{{000000..000001}}.tar"
    settings = ["--data.reader=stream", "--data.epoch-images=24", f"--val={photographs}"]
    out = run("mae", tmp_path / "run", *settings, data=data)
    said = capsys.readouterr().out
    assert "2 streamed shards, 24 images an epoch by the recipe" in said
    assert "warning: data.reader stream: shards are drawn at random with replacement" in said
    assert json.loads((out / "summary.json").read_text())["knn"] is not None
    unjudged = run("mae", tmp_path / "unjudged", *settings[:2], data=data)
    assert json.loads((unjudged / "summary.json").read_text())["knn"] is None


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_equals_the_big_batch(method, run, tmp_path):
    """In losses, weights and centre; adding floats in another order shows in the last digits."""
    whole = run(method, tmp_path / "whole")
    parts = run(method, tmp_path / "parts", "--train.micro-batch=4")
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-4)
    a, b = tensors(whole), tensors(parts)
    model = [name for name in a if name.startswith("method/")]
    assert len(model) > 20
    for name in model:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)


def test_views_one_by_one_are_the_views_at_once(run, tmp_path):
    """train.split_views: the same losses and weights; in parts of the batch too."""
    whole = run("dino", tmp_path / "whole")
    split = run("dino", tmp_path / "split", "--train.split-views", "--train.micro-batch=4")
    assert losses(whole) == pytest.approx(losses(split), rel=1e-4)
    a, b = tensors(whole), tensors(split)
    for name in (name for name in a if name.startswith("method/")):
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)


def test_stopped_by_sigint_too_and_the_handlers_are_put_back(run, tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    interrupt_at(monkeypatch, 2, signal.SIGINT)
    run("mae", tmp_path / "run")
    assert "stopped by SIGINT after step 3 of 8" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_step_that_is_not_finite_touches_nothing(run, tmp_path, monkeypatch, capsys):
    """Poisoned in step 3: weights, teacher, centre and optimizer are those of before, and the run goes on."""
    kept, forward = {}, Dino.forward

    def poisoned(self, batch, progress):
        output = forward(self, batch, progress)
        if progress.step in (3, 4):
            kept[progress.step] = {n: t.clone() for n, t in self.state_dict().items()}
        return output | {"loss": output["loss"] * float("nan")} if progress.step == 3 else output

    monkeypatch.setattr(Dino, "forward", poisoned)
    out = run("dino", tmp_path / "run")
    assert_bit_equal(kept[3], kept[4])
    assert "step 4: loss or gradient is not finite; skipped" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["steps"] == 8
    assert [line["step"] for line in metrics(out) if line.get("loss") != line.get("loss")] == [4]


def test_too_many_such_steps_stop_the_run_with_a_report(run, tmp_path, monkeypatch, capsys):
    forward = Dino.forward
    monkeypatch.setattr(
        Dino, "forward", lambda self, *a: forward(self, *a) | {"loss": forward(self, *a)["loss"] * float("inf")}
    )
    with pytest.raises(SystemExit) as stop:
        run("dino", tmp_path / "run", "--train.max-bad-steps=2")
    assert stop.value.code == 2
    assert "not finite in 3 steps in a row, 1 to 3; none of them changed the weights" in capsys.readouterr().err


def test_a_finished_run_says_so(run, tmp_path, capsys):
    out = run("mae", tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != ".lock"}
    capsys.readouterr()
    run("mae", out)
    assert f"{out} is finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != ".lock"} == before


def test_another_recipe_or_other_data_is_refused_with_the_difference(run, tmp_path, monkeypatch, photographs, capsys):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        out = run("mae", tmp_path / "run")
    for more, words in (
        (
            ["--method.mask-ratio=0.5", "--seed=3"],
            ("method.mask_ratio was 0.75, is 0.5", "seed was 0, is 3", "--fresh"),
        ),
        (
            [f"--data={photographs / 'coffee'}"],
            ("not the samples that the run", "missing: astronaut, coffee", "12 images"),
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            run("mae", out, *more)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
    run("mae", out, "--log.every=2", "--train.micro-batch=6")  # how it is run may change
    assert (out / "summary.json").exists()


def test_fresh_moves_the_old_run_aside(run, tmp_path, capsys):
    out = run("mae", tmp_path / "run")
    run("mae", out, "--seed=1", "--fresh")
    (aside,) = tmp_path.glob("run.before-*")
    assert (aside / "summary.json").exists()
    assert json.loads((out / "summary.json").read_text())["steps"] == 8


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(run, tmp_path, monkeypatch, capsys):
    whole = run("dino", tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        out = run("dino", tmp_path / "run")
    newest = max((out / "checkpoints").glob("step-*"))
    (shard,) = newest.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    run("dino", out)
    said = capsys.readouterr().out
    assert f"refused   {newest}: {shard.name} is damaged" in said
    assert "step 3, 36 images seen" in said
    assert_bit_equal(tensors(whole), tensors(out))


def test_bad_images_are_replaced_counted_and_bounded(run, tmp_path, photographs, capsys):
    data = tmp_path / "data"
    shutil.copytree(photographs, data)
    (data / "coffee" / "03.jpg").write_text("no image")
    out = run("mae", tmp_path / "run", "--data.max-bad-fraction=0.05", data=data)
    (line,) = (out / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == "coffee/03.jpg"
    assert "cannot be read, replaced: coffee/03.jpg" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run("mae", tmp_path / "strict", data=data)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "data.max_bad_fraction = 0.001: 1 of 24 samples cannot be read" in error
    assert "coffee/03.jpg" in error


def test_nothing_readable_at_all_stops_even_when_all_may_be_bad(run, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(20):
        (data / f"{number}.jpg").write_text("no image")
    with pytest.raises(SystemExit) as stop:
        run("mae", tmp_path / "run", "--data.max-bad-fraction=1", data=data)
    assert stop.value.code == 2
    assert "nor any of the 8 samples behind it" in capsys.readouterr().err


def test_recomputed_and_bf16_runs(run, tmp_path):
    plain = run("dino", tmp_path / "plain", "--train.steps=3")
    recomputed = run("dino", tmp_path / "recomputed", "--train.steps=3", "--train.recompute-activations")
    assert losses(recomputed) == losses(plain)
    half = run("dino", tmp_path / "half", "--train.steps=3", "--train.precision=bf16")
    assert losses(half) == pytest.approx(losses(plain), rel=0.02)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(run, tmp_path):
    plain = run("dino", tmp_path / "plain", "--train.steps=3")
    compiled = run("dino", tmp_path / "compiled", "--train.steps=3", "--train.compile")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
