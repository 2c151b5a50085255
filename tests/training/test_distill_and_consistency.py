"""Whole runs of consistency and of distilling: resumed = uninterrupted, processes = one, the teacher comes back."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from test_runs import interrupt_at
from tiny_runs import arguments, assert_bit_equal, finish, losses, metrics, start, tensors, tiny_teacher

from ssl_global.cli import main as command
from ssl_global.pretrain import main

METHODS = ("consistency", "distill")
SHARDED = "tests/fsdp_on_cpu.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "export")


def words_of(method, teacher):
    """Of distilling a second student learns too, with batch norms."""
    return [f"--method.teacher={teacher}", "--method.students", "test_resnet"] if method == "distill" else []


@pytest.fixture(scope="module", params=METHODS)
def whole(request, photographs, teacher, tmp_path_factory):
    """(method, its run in one process, without a stop)."""
    out = tmp_path_factory.mktemp("whole") / request.param
    main(arguments(request.param, photographs, out, *words_of(request.param, teacher)))
    AcceleratorState._reset_state(True)
    return request.param, out


def test_interrupted_and_resumed_is_bit_equal(whole, run, tmp_path, monkeypatch, capsys, teacher):
    """Another teacher is refused; the same one from elsewhere is the same."""
    method, uninterrupted = whole
    words = words_of(method, teacher)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        parted = run(method, tmp_path / "parted", *words)
    if method == "distill":
        other = tiny_teacher(tmp_path / "other", seed=1)
        with pytest.raises(SystemExit) as stop:
            run("distill", parted, *words_of("distill", other))
        assert stop.value.code == 2
        assert "method.teacher_hash was" in capsys.readouterr().err
        words = words_of("distill", shutil.copytree(teacher, tmp_path / "moved"))
    run(method, parted, *words)
    assert_bit_equal(tensors(uninterrupted), tensors(parted))
    assert losses(uninterrupted) == losses(parted)


@pytest.mark.parametrize("script", ["pretrain.py", pytest.param(SHARDED, marks=pytest.mark.slow)])
def test_two_processes_equal_one(whole, script, photographs, tmp_path, teacher):
    """Replicated and sharded, in losses and in the gradient's length, which AdamW would not show."""
    method, one = whole
    words = arguments(method, photographs, tmp_path / "two", *words_of(method, teacher))
    code, out, error = finish(start(words, script=script))
    assert code == 0, error[-3000:]
    assert ("FSDP2" if script == SHARDED else "DDP") in out
    assert losses(one) == pytest.approx(losses(tmp_path / "two"), rel=1e-6)
    norms = [[line["gradient_norm"] for line in metrics(run) if "loss" in line] for run in (one, tmp_path / "two")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    a, b = tensors(one), tensors(tmp_path / "two")
    assert a.keys() == b.keys()
    for name in (name for name in a if name.startswith("method/")):
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)


def test_each_student_is_exported_and_the_teacher_is_kept_nowhere(whole, tmp_path):
    method, out = whole
    if method == "distill":
        assert not [name for name in tensors(out) if "teacher" in name]
        for what, architecture in (("student", "vit_tiny_patch16_224"), ("test_resnet", "test_resnet")):
            command(["export", str(out), "--what", what, "--out", str(tmp_path / what)])
            assert json.loads((tmp_path / what / "config.json").read_text())["architecture"] == architecture


def test_parts_of_a_batch(whole, run, tmp_path, teacher):
    """Distilled in parts (without batch norms) is distilled. Consistency's negatives are those of a part: fewer."""
    method, out = whole
    if method == "distill":
        alone = [f"--method.teacher={teacher}"]
        parts = run(method, tmp_path / "parts", *alone, "--train.micro-batch=4")
        assert losses(run(method, tmp_path / "alone", *alone)) == pytest.approx(losses(parts), rel=1e-4)
    else:
        parts = run(method, tmp_path / "parts", "--train.micro-batch=4")
        assert losses(parts)[0] < losses(out)[0] - 0.1
