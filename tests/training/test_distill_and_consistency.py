"""Whole runs of consistency and of distilling: resumed = uninterrupted, processes = one, the teacher comes back."""

import json
import shutil

import pytest
import torch
from test_runs import interrupt_at
from tiny_runs import arguments, assert_bit_equal, finish, losses, metrics, start, tensors, tiny_teacher

from ssl_global.cli import main as command

SHARDED = "tests/fsdp_on_cpu.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "export")


def words_of(method, teacher):
    """Of distilling a second student learns too, with batch norms."""
    distilled = [f"--method.teacher={teacher}", "--method.students", "test_resnet"]
    return distilled if method == "distill" else ["--encoder.drop-path=0.2"]


@pytest.mark.parametrize("method", ["consistency", "distill"])
def test_interrupted_and_resumed_is_bit_equal(method, run, tmp_path, monkeypatch, capsys, teacher):
    """Each student is exported; another teacher is refused; the same one elsewhere is the same."""
    words = words_of(method, teacher)
    whole = run(method, tmp_path / "whole", *words)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        parted = run(method, tmp_path / "parted", *words)
    if method == "distill":
        refuse_another_teacher(run, parted, tmp_path, capsys)
        moved = shutil.copytree(teacher, tmp_path / "moved")
        words = words_of(method, moved)
    run(method, parted, *words)
    assert_bit_equal(tensors(whole), tensors(parted))
    assert losses(whole) == losses(parted)
    if method == "distill":
        assert not [name for name in tensors(whole) if name.startswith("teacher")]
        for what, architecture in (("student", "vit_tiny_patch16_224"), ("test_resnet", "test_resnet")):
            command(["export", str(whole), "--what", what, "--out", str(tmp_path / what)])
            assert json.loads((tmp_path / what / "config.json").read_text())["architecture"] == architecture


def refuse_another_teacher(run, parted, tmp_path, capsys):
    other = tiny_teacher(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit) as stop:
        run("distill", parted, *words_of("distill", other))
    assert stop.value.code == 2
    assert "method.teacher_hash was" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["pretrain.py", SHARDED])
@pytest.mark.parametrize("method", ["consistency", "distill"])
def test_two_processes_equal_one(method, script, run, photographs, tmp_path, teacher):
    """Replicated and sharded, in losses and in the gradient's length, which AdamW would not show."""
    words = words_of(method, teacher) if method == "distill" else []
    two = start(arguments(method, photographs, tmp_path / "two", *words), script=script)
    one = run(method, tmp_path / "one", *words)
    code, out, error = finish(two)
    assert code == 0, error[-3000:]
    assert ("FSDP2" if script == SHARDED else "DDP") in out
    assert losses(one) == pytest.approx(losses(tmp_path / "two"), rel=1e-6)
    norms = [[line["gradient_norm"] for line in metrics(out) if "loss" in line] for out in (one, tmp_path / "two")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    a, b = tensors(one), tensors(tmp_path / "two")
    for name in (name for name in a if "/" not in name):
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)


def test_distilling_in_parts_equals_the_whole_batch(run, tmp_path, teacher):
    """Of students without batch norms. Consistency's negatives are those of a part: its losses are others."""
    words = [f"--method.teacher={teacher}"]
    whole = run("distill", tmp_path / "whole", *words)
    parts = run("distill", tmp_path / "parts", *words, "--train.micro-batch=4")
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-4)
    whole = run("consistency", tmp_path / "c-whole")
    parts = run("consistency", tmp_path / "c-parts", "--train.micro-batch=4")
    assert losses(parts)[0] < losses(whole)[0] - 0.1
