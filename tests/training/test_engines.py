"""DDP, FSDP2 and HSDP compute what one process does, keep a share of it each, and read each other's checkpoints.

Accelerate shards on GPUs only; tests/fsdp_on_cpu.py is pretrain.py with that lifted.
"""

import json
import re

import pytest
from tiny_runs import arguments, finish, losses, start, tensors, wait_for_step

SHARDED = "tests/fsdp_on_cpu.py"
TWENTY = ["--train.steps=20", "--checkpoint.every=10"]


def test_checkpoints_of_any_processes_load_on_any_others(tmp_path):
    """1, 2 and 4 processes, replicated and sharded: 25 pairs for each method, bit for bit."""
    code, out, error = finish(start([str(tmp_path)], processes=4, script="tests/training/resharding.py"))
    assert code == 0, error[-3000:]
    report = json.loads(out.splitlines()[-1])
    assert len(report["compared"]) == 2 * 25
    assert min(tensors for _, tensors, _ in report["compared"]) > 150
    assert {files for _, _, files in report["compared"]} == {1, 2, 4}
    assert report["different"] == []
    kept = {(kind, world, way): size for kind, world, way, size in report["kept_bytes"]}
    for kind in ("dino", "mae"):
        assert kept[kind, 4, "replicated"] == kept[kind, 1, "replicated"]
        for world in (2, 4):  # weights, teacher and averages; a step count of each parameter stays with everyone
            assert kept[kind, world, "sharded"] < 1.05 * kept[kind, 1, "replicated"] / world


@pytest.mark.parametrize(
    ("method", "processes", "more", "engine"),
    [
        ("dino", 4, [], "FSDP2"),
        ("mae", 2, ["--train.micro-batch=3"], "FSDP2"),
        ("dino_swin", 2, [], "FSDP2"),
        pytest.param("dinov2", 2, ["--train.micro-batch=2"], "FSDP2", marks=pytest.mark.slow),
        ("mae_swin", 2, ["--train.micro-batch=3"], "FSDP2"),
        pytest.param("dino", 4, ["--shards", "2"], "HSDP, 2 x 2", marks=pytest.mark.slow),
    ],
)
def test_sharded_processes_equal_one(method, processes, more, engine, run, photographs, tmp_path, capsys):
    front, back = (more, []) if "--shards" in more else ([], more)
    words = [*front, *arguments(method, photographs, tmp_path / "sharded", *TWENTY, *back, f"--val={photographs}")]
    sharded = start(words, processes=processes, script=SHARDED)
    one = run(method, tmp_path / "one", *TWENTY, f"--val={photographs}")
    code, out, error = finish(sharded)
    assert code == 0, error[-3000:]
    assert f"device cpu:0, {engine}" in out
    cut = 2 if "HSDP" in engine else processes
    assert kept_mb(out) == pytest.approx(kept_mb(capsys.readouterr().out) / cut, rel=0.1, abs=0.06)
    assert len(losses(one)) == 20
    assert losses(tmp_path / "sharded") == pytest.approx(losses(one), rel=1e-6)
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (one, tmp_path / "sharded"))
    assert first["knn"] == second["knn"]
    assert first["rankme"] == pytest.approx(second["rankme"], rel=1e-3)


def kept_mb(said: str) -> float:
    return float(re.search(r"memory ([\d.]+) MB", said)[1])


def test_a_run_goes_on_under_another_engine_on_other_processes(run, photographs, tmp_path):
    """Sharded over two, then one process, then replicated over three with accumulation: the losses of one process."""
    whole = run("dino", tmp_path / "whole", *TWENTY)
    out = tmp_path / "parted"
    words = arguments("dino", photographs, out, *TWENTY)
    first = start(words, script=SHARDED)
    wait_for_step(first, out, 4)
    first.terminate()
    said = finish(first)[1]
    assert "the same command goes on from there" in said
    second = start(words, processes=1)
    wait_for_step(second, out, 11)
    second.terminate()
    said = finish(second)[1]
    assert "changed   processes 2 -> 1; engine FSDP2 -> one process; micro_batch 6 -> 12" in said
    code, said, error = finish(start([*words, "--train.micro-batch=2"], processes=3))
    assert code == 0, error[-3000:]
    assert "engine one process -> DDP; micro_batch 12 -> 2; accumulate 1 -> 2; train.micro_batch None -> 2" in said
    assert len(losses(out)) == 20
    assert losses(out) == pytest.approx(losses(whole), rel=1e-6)
    a, b = tensors(whole), tensors(out)
    assert a.keys() == b.keys()


def test_bf16_and_recomputed_blocks_under_fsdp2(run, photographs, tmp_path):
    """The losses are those of a replicated bf16 run, to bf16's own precision."""
    words = arguments("dino", photographs, tmp_path / "half", "--train.precision=bf16", "--train.recompute-activations")
    half = start(words, script=SHARDED)
    replicated = run("dino", tmp_path / "replicated", "--train.precision=bf16")
    code, _, error = finish(half)
    assert code == 0, error[-3000:]
    assert losses(tmp_path / "half") == pytest.approx(losses(replicated), rel=0.02)


def test_a_launch_that_asks_for_sharding_where_there_is_none_is_refused(run, tmp_path, monkeypatch, capsys):
    for version, words in (("2", "needs two GPUs or more"), ("1", "fsdp_version = 1: this program shards with 2")):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(SystemExit) as stop:
            run("mae", tmp_path / "run")
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
