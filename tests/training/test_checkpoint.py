"""A checkpoint is whole or not there; whatever is done to one is noticed and named."""

import json

import pytest
import torch
from recipes_under_test import load_recipe

from ssl_global.errors import UserError
from ssl_global.training import checkpoint
from ssl_global.training.checkpoint import RunState
from ssl_global.training.optim import build_optimizer

RECIPE = load_recipe("mae", "demo", width=32, depth=1, heads=2)


@pytest.fixture
def parts():
    return build(0)


def build(seed):
    torch.manual_seed(seed)
    method = RECIPE.method.build(RECIPE)
    optimizer = build_optimizer(method, RECIPE.optim)
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return method, optimizer


def save(run, parts, step, keep=2):
    return checkpoint.save(run, *parts, RunState(step=step, images=4 * step), RECIPE, keep=keep)


def test_what_was_saved_is_what_is_loaded(tmp_path, parts):
    save(tmp_path, parts, 7)
    folder, record, damaged = checkpoint.newest(tmp_path)
    other = build(1)
    state = checkpoint.load(folder, *other, record)
    assert state == RunState(step=7, images=28)
    assert damaged == []
    for a, b in zip(parts[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = (checkpoint.optimizer_tensors(*p) for p in (parts, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(name.endswith("/exp_avg_sq") for name in mine)


def test_the_last_ones_stay(tmp_path, parts):
    for step in (1, 2, 99_999_999, 100_000_001):
        save(tmp_path, parts, step)
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-100000001", "step-99999999"]
    assert list((tmp_path / "checkpoints").glob(".tmp*")) == []


def test_an_unfinished_one_is_never_read_and_is_swept(tmp_path, parts):
    save(tmp_path, parts, 1)
    leftover = tmp_path / "checkpoints" / ".tmp-step-00000002"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path)[0].name == "step-00000001"
    save(tmp_path, parts, 3)
    assert not leftover.exists()


def test_a_kill_while_saving_leaves_the_one_before(tmp_path, parts, monkeypatch):
    save(tmp_path, parts, 1)
    for fault in ("save_file", "describe", "flush"):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, fault, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, parts, 2)
        assert checkpoint.newest(tmp_path)[0].name == "step-00000001"
    assert save(tmp_path, parts, 2).name == "step-00000002"


FILES = ("model.safetensors", "optimizer.safetensors", "checkpoint.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "removed", "emptied"])
def test_damage_is_named_and_the_one_before_serves(tmp_path, parts, name, damage):
    save(tmp_path, parts, 1)
    file = save(tmp_path, parts, 2) / name
    data = file.read_bytes()
    if damage == "removed":
        file.unlink()
    elif damage == "bit flipped" and name == "checkpoint.json":
        file.write_bytes(data.replace(b'"crc32": ', b'"crc32": 9', 1))
    else:
        flipped = data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]
        file.write_bytes({"truncated": data[: len(data) // 2], "emptied": b"", "bit flipped": flipped}[damage])
    folder, record, damaged = checkpoint.newest(tmp_path)
    assert folder.name == "step-00000001"
    assert record["state"]["step"] == 1
    assert len(damaged) == 1
    assert "step-00000002" in damaged[0]


def test_none_left_whole_is_an_error_and_none_at_all_is_none(tmp_path, parts):
    assert checkpoint.newest(tmp_path) is None
    (save(tmp_path, parts, 1) / "checkpoint.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint is whole.*step-00000001"):
        checkpoint.newest(tmp_path)
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoint.load_method(tmp_path / "elsewhere")


def test_a_method_is_built_again_from_the_record_alone(tmp_path, parts):
    save(tmp_path, parts, 3)
    recipe, method, record = checkpoint.load_method(tmp_path)
    assert recipe == RECIPE
    assert record["state"]["step"] == 3
    for a, b in zip(parts[0].state_dict().values(), method.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_there_is_no_pickle_and_no_path_out(tmp_path, parts):
    """Only safetensors and JSON; a record that points elsewhere or names foreign code is refused."""
    folder = save(tmp_path, parts, 1)
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    record = json.loads((folder / "checkpoint.json").read_text())
    record["recipe"]["method.kind"] = "os"
    (folder / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"method.kind = os: there is no ssl_global/methods/os.py"):
        checkpoint.load_method(tmp_path)
