"""Runs that begin from weights: new heads first, on an encoder that waits; a guard over what may be lost."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from recipes_under_test import load_recipe
from safetensors.torch import load_file
from test_runs import interrupt_at
from tiny_runs import arguments as tiny
from tiny_runs import assert_bit_equal, finish, losses, metrics, start, tensors

from ssl_global.data.sample import built_in_sample
from ssl_global.data.source import open_source
from ssl_global.methods.dino import Dino
from ssl_global.schedules import Progress
from ssl_global.training.checkpoint import RunState
from ssl_global.training.guard import fallen
from ssl_global.training.optim import build_optimizer, set_rates, withhold

WORSE = 0.067  # of the start below: three points

# ------------------------------------------------------------------------------- a small run that is worth continuing

# One view more than enough to learn from; a teacher that follows quickly, so that heads that are new do harm quickly.
SMALL = [
    "--encoder.width=64", "--encoder.heads=2", "--encoder.depth=2", "--encoder.patch=4", "--views.globals.pixels=16",
    "--views.locals.count=0", "--method.prototypes=256", "--method.head-hidden=128", "--method.head-bottleneck=32",
    "--method.freeze-prototypes-epochs=0", "--train.global-batch=34", "--log.every=100", "--checkpoint.every=1000",
]  # fmt: skip
CONTINUED = [
    "--train.steps=48", "--eval.every=6", "--optim.warmup-epochs=2", "--optim.lr-per-256-images=8e-3",
    "--method.teacher-momentum", "0.5", "1", f"--eval.max-fall={WORSE}",
]  # fmt: skip


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Twelve of each photograph, to learn from and to judge with."""
    folder = tmp_path_factory.mktemp("crops")
    for name, tar in zip(("train", "val"), built_in_sample(), strict=True):
        source, seen = open_source(tar), dict.fromkeys(range(17), 0)
        for index, label in enumerate(source.labels.tolist()):
            seen[label] += 1
            if seen[label] <= 12:
                (folder / name / f"{label:02d}").mkdir(parents=True, exist_ok=True)
                (folder / name / f"{label:02d}" / f"{seen[label]:03d}.png").write_bytes(source.read(index))
    return folder


@pytest.fixture
def go(run, crops):
    def train(out, *more):
        return run("dino", out, *SMALL, f"--val={crops / 'val'}", *more, data=crops / "train")

    return train


def knn(out) -> list[float]:
    return [line["knn"] for line in metrics(out) if "knn" in line]


def test_new_heads_cost_nothing_when_they_are_trained_first_and_the_guard_stops_it_when_not(go, tmp_path, capsys):
    first = go(tmp_path / "first", "--train.steps=60", "--eval.every=100", "--optim.lr-per-256-images=8e-3")
    began = json.loads((first / "summary.json").read_text())["knn"]
    capsys.readouterr()

    more = go(tmp_path / "more", *CONTINUED, f"--encoder.weights={first}", "--encoder.frozen-epochs=4")
    said = capsys.readouterr().out
    assert f"weights {first}: 30 of 30 tensors loaded" in said
    assert "the encoder waits 4 epochs for what is new, then its rate rises for 2" in said
    assert f"k-NN of the encoder that it begins from {began:.3f}" in said
    summary = json.loads((more / "summary.json").read_text())
    assert summary["knn_start"] == began
    assert summary["knn_untrained"] is None
    assert min(knn(more)) >= began - 0.03
    assert summary["knn"] > began
    gain = f"{100 * (summary['knn'] - began):+.1f} points over the {began:.3f} of the encoder that it began from"
    assert gain in said

    words = [*CONTINUED, f"--encoder.weights={first}", "--encoder.frozen-epochs=0"]
    with pytest.raises(SystemExit) as stop:
        go(tmp_path / "harmed", *words)
    assert stop.value.code == 2
    caught = capsys.readouterr()
    assert "the encoder learns from the first step on" in caught.out
    error = caught.err.strip()
    found = re.search(r"k-NN was ([\d.]+) of the encoder .* and is ([\d.]+) after step (\d+), saved there", error)
    assert float(found[1]) == pytest.approx(began, abs=1e-3)
    assert float(found[2]) < began * (1 - WORSE)
    assert "\n" not in error
    assert "raise encoder.frozen_epochs (now 0)" in error
    kept = [folder.name for folder in (tmp_path / "harmed" / "checkpoints").iterdir()]
    assert kept == [f"step-{int(found[3]):08d}"]
    assert not (tmp_path / "harmed" / "export").exists()

    go(tmp_path / "harmed", *words, "--eval.max-fall=1")  # as the line says
    assert "restored  step " + found[3] in capsys.readouterr().out
    assert json.loads((tmp_path / "harmed" / "summary.json").read_text())["knn_start"] == began


# ---------------------------------------------------------------------------------------------------------- the parts


@pytest.fixture
def begun(run, tmp_path):
    """A tiny run's export."""
    return run("dino", tmp_path / "begun", "--train.steps=2") / "export"


WAITS = ["--encoder.frozen-epochs=1.5", "--log.every=1", "--eval.max-fall=1"]  # three steps of eight


def test_the_encoder_waits_and_then_its_rate_rises(run, begun, tmp_path, monkeypatch):
    seen, after_step = {}, Dino.after_step

    def look(self, progress):
        after_step(self, progress)
        seen[progress.step] = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    monkeypatch.setattr(Dino, "after_step", look)
    run("dino", tmp_path / "run", f"--encoder.weights={begun}", *WAITS)
    published = load_file(begun / "model.safetensors")
    for step in (0, 1, 2, 3):  # in step 3 its rate is 0 still
        for who in ("student", "teacher"):
            now = {key: seen[step][f"{who}.encoder.model.{key}"] for key in published}
            assert_bit_equal(now, published)
    name = "student.encoder.model.blocks.0.attn.qkv.weight"
    assert not torch.equal(seen[4][name], seen[3][name])
    for who in ("student", "teacher"):
        moved = [
            key for key in seen[2] if key.startswith(f"{who}.head") and not torch.equal(seen[2][key], seen[1][key])
        ]
        assert len(moved) > 2


def test_stopped_while_the_encoder_waits_it_goes_on_bit_equal_and_reads_the_weights_no_more(
    run, begun, tmp_path, monkeypatch
):
    more = [f"--encoder.weights={begun}", *WAITS, "--encoder.drop-path=0.2"]
    whole = run("dino", tmp_path / "whole", *more)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        parted = run("dino", tmp_path / "parted", *more)
    at_rest = [name for name in tensors(parted) if name.startswith("optimizer/")]
    assert at_rest
    assert not any("encoder" in name for name in at_rest)
    shutil.rmtree(begun)
    run("dino", parted, *more)
    assert_bit_equal(tensors(whole), tensors(parted))


def test_two_processes_begin_as_one_does(run, begun, tmp_path, photographs):
    more = [f"--encoder.weights={begun}", *WAITS, f"--val={photographs}", "--eval.every=4", "--eval.max-fall=1"]
    both = start(tiny("dino", photographs, tmp_path / "two", *more))
    one = run("dino", tmp_path / "one", *more)
    code, out, error = finish(both)
    assert code == 0, error[-2000:]
    assert out.count("tensors loaded") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize("method", ["mae", "mae_swin"])
def test_a_run_without_an_export_has_its_newest_checkpoint(method, run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        before = run(method, tmp_path / "before")
    assert not (before / "export").exists()
    kept = tensors(before)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 0)
        after = run(method, tmp_path / "after", f"--encoder.weights={before}")
    assert re.search(rf"weights {before}: (\d+) of \1 tensors loaded", capsys.readouterr().out)
    prefix = "method/encoder.model."
    found = {name: tensor for name, tensor in tensors(after).items() if name.startswith(prefix)}
    assert_bit_equal(found, {name: kept[name] for name in found})
    assert not torch.equal(tensors(after)["method/decoder.predict.weight"], kept["method/decoder.predict.weight"])


def test_without_labels_the_guard_looks_at_rankme(run, begun, tmp_path, photographs, capsys):
    out = run("dino", tmp_path / "run", f"--encoder.weights={begun}", "--eval.max-fall=1")
    assert "RankMe of the encoder that it begins from" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["rankme_start"] > 1


def test_what_the_guard_says():
    recipe = load_recipe("dino", "demo", weights="runs/dino")
    recipe = replace(recipe, eval=replace(recipe.eval, max_fall=0.1))
    state = RunState(step=94, baselines={"knn_start": 0.6, "knn_pixels": 0.9})
    assert fallen(recipe, state, {"knn": 0.541, "rankme": 1.0}) is None
    said = fallen(recipe, state, {"knn": 0.539, "rankme": 99.0})
    assert said.startswith(
        "eval.max_fall = 0.1: k-NN was 0.6 of the encoder that the run began from and is 0.539 after"
    )
    by_rank = RunState(step=94, baselines={"rankme_start": 30.0})
    assert fallen(recipe, by_rank, {"rankme": 27.1}) is None
    assert "RankMe was 30 " in fallen(recipe, by_rank, {"rankme": 26.9})
    assert "RankMe was 30 " in fallen(recipe, by_rank, {"rankme": float("nan")})
    from_scratch = RunState(step=94, baselines={"knn_untrained": 0.6})
    assert fallen(recipe, from_scratch, {"knn": 0.1, "rankme": 1.0}) is None


def test_rates_of_what_waits():
    """Two epochs of waiting, four of warm-up, of ten; by hand."""
    recipe = load_recipe("dino", "demo", weights="x")
    optim = replace(recipe.optim, lr_per_256_images=1.0, lr_end=1.0, warmup_epochs=4)
    method = recipe.method.build(recipe)
    optimizer = build_optimizer(method, optim, waiting_epochs=2)
    waiting = {p for p in method.student.encoder.parameters() if p.requires_grad}
    assert {p for group in optimizer.param_groups if group["waiting_epochs"] for p in group["params"]} == waiting
    every = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(every) == len(set(every)) == len([p for p in method.parameters() if p.requires_grad])
    for epoch, heads, encoder in ((0, 0, 0), (1, 0.25, 0), (2, 0.5, 0), (3, 0.75, 0.1875), (4, 1, 0.5), (8, 1, 1)):
        progress = Progress(step=epoch * 5, num_steps=50, steps_per_epoch=5)
        set_rates(optimizer, optim, 256, progress)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(encoder if group["waiting_epochs"] else heads), epoch
        for parameter in every:
            parameter.grad = torch.ones_like(parameter)
        withhold(optimizer, progress)
        assert {p for p in every if p.grad is None} == (waiting if epoch < 2 else set())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--encoder.weights=nowhere"], "encoder.weights = nowhere: no such folder or file"),
        (["--encoder.weights=x", "--encoder.frozen-epochs=-1"], "encoder.frozen_epochs = -1.0: 0 or more"),
        (["--encoder.weights=x", "--encoder.frozen-epochs=9"], "encoder.frozen_epochs = 9.0: longer than the run"),
        (["--eval.max-fall=1.5"], "eval.max_fall = 1.5: between 0 and 1"),
    ],
)
def test_settings_that_cannot_be(words, said, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("dino", tmp_path / "run", *words)
    assert stop.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err
