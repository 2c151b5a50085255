"""A checkpoint is whole or not there; whatever is done to one is noticed and named."""

import errno
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes_under_test import load_recipe
from safetensors.torch import load_file

from ssl_global.errors import UserError
from ssl_global.training import checkpoint
from ssl_global.training.checkpoint import Layout, RunState, Writer
from ssl_global.training.optim import build_optimizer
from ssl_global.training.sharded import METHOD, Sharded, merge

RECIPE = load_recipe("mae", "demo", width=32, depth=1, heads=2)
LAYOUT = Layout(processes=1, engine="one process", micro_batch=4, accumulate=1, workers=0)


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


def save(run, parts, step, *, recipe=RECIPE):
    Writer(run, recipe, LAYOUT).save(*parts, RunState(step=step, images=4 * step), wait=True)
    return run / "checkpoints" / f"step-{step:08d}"


def test_what_was_saved_is_what_is_loaded(tmp_path, parts):
    save(tmp_path, parts, 7)
    folder, record, damaged = checkpoint.newest(tmp_path)
    other = build(1)
    state = checkpoint.load(folder, *other, record)
    assert state == RunState(step=7, images=28)
    assert damaged == []
    mine, theirs = (checkpoint.tensors(*p) for p in (parts, other))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert any(name.endswith("/exp_avg_sq") for name in mine)


def test_what_was_loaded_goes_on_alike(tmp_path, parts):
    """The optimizer, too, takes the same next step."""
    save(tmp_path, parts, 7)
    folder, record, _ = checkpoint.newest(tmp_path)
    other = build(1)
    checkpoint.load(folder, *other, record)
    for method, optimizer in (parts, other):
        torch.manual_seed(5)
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    mine, theirs = (checkpoint.tensors(*p) for p in (parts, other))
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_training_may_go_on_while_it_is_written(tmp_path, parts, monkeypatch):
    """What is written is the state of the call, though the weights change before the disk sees them."""
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors(*parts).items()}
    write_data, writer = checkpoint.write_data, Writer(tmp_path, RECIPE, LAYOUT)
    changed = []

    def late(*how):
        while not changed:
            pass
        return write_data(*how)

    monkeypatch.setattr(checkpoint, "write_data", late)
    stall = writer.save(*parts, RunState(step=3), wait=False)
    assert not writer.ready()
    with torch.no_grad():
        for tensor in checkpoint.tensors(*parts).values():
            tensor.add_(1)
    changed.append(True)
    writer.settle(must=True)
    assert stall < 5
    with Sharded(tmp_path / "checkpoints" / "step-00000003") as kept:
        assert [name for name in before if not torch.equal(kept.read(name), before[name])] == []


def test_a_second_save_waits_for_the_first(tmp_path, parts):
    writer = Writer(tmp_path, RECIPE, LAYOUT)
    for step in range(1, 6):
        writer.save(*parts, RunState(step=step), wait=False)
    writer.settle(must=True)
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-00000005", "step-00000004"]


def test_the_last_ones_stay(tmp_path, parts):
    for step in (1, 2, 99_999_999, 100_000_001):
        save(tmp_path, parts, step)
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-100000001", "step-99999999"]
    assert list((tmp_path / "checkpoints").glob(".tmp*")) == []


def test_every_mth_stays_for_good(tmp_path, parts):
    recipe = replace(RECIPE, checkpoint=replace(RECIPE.checkpoint, every=1, keep=2, keep_every=3))
    for step in range(1, 9):
        save(tmp_path, parts, step, recipe=recipe)
    assert [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(tmp_path)] == [8, 7, 6, 3]


def test_an_unfinished_one_is_never_read_and_is_swept(tmp_path, parts):
    save(tmp_path, parts, 1)
    leftover = tmp_path / "checkpoints" / ".tmp-step-00000002"
    leftover.mkdir()
    (leftover / "shard.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path)[0].name == "step-00000001"
    save(tmp_path, parts, 3)
    assert not leftover.exists()


def test_one_that_makes_room_for_its_like_is_found_again(tmp_path, parts):
    """A kill between the two renames of a second save at one step."""
    folder = save(tmp_path, parts, 4)
    folder.rename(folder.with_name(".old-step-00000004"))
    assert checkpoint.newest(tmp_path)[0] == folder
    save(tmp_path, parts, 4)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("fault", ["begin", "write_data", "commit", "put_in_place"])
def test_a_save_that_fails_leaves_the_one_before_and_says_why(tmp_path, parts, monkeypatch, fault):
    save(tmp_path, parts, 1)

    def full(*how):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, fault, full)
        writer = Writer(tmp_path, RECIPE, LAYOUT)
        writer.save(*parts, RunState(step=2), wait=False)
        writer.settle()
        assert writer.news() == "No space left on device: somewhere"
        assert writer.news() is None
        with pytest.raises(UserError, match=r"could not be saved: No space left.*of before is step-00000001"):
            writer.save(*parts, RunState(step=2), wait=True)
    assert checkpoint.newest(tmp_path)[0].name == "step-00000001"
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert save(tmp_path, parts, 2).is_dir()


@pytest.fixture
def small_disk(tmp_path):
    """Sixteen megabytes of memory, mounted; where that is not permitted the test is skipped."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(small_disk, parts):
    save(small_disk, parts, 1)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - used(small_disk) // 2))
    writer = Writer(small_disk, RECIPE, LAYOUT)
    writer.save(*parts, RunState(step=2), wait=False)
    writer.settle()
    assert "No space left on device" in writer.news()
    assert checkpoint.newest(small_disk)[0].name == "step-00000001"
    (small_disk / "other").unlink()
    assert save(small_disk, parts, 3).is_dir()


def used(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


DAMAGE = ["truncated", "bit flipped", "removed", "emptied", "of another step", "no longer what it was"]


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_one_before_serves(tmp_path, parts, name, damage):
    before = save(tmp_path, parts, 1)
    with torch.no_grad():
        next(parts[0].parameters()).add_(1)
    file = save(tmp_path, parts, 2) / name
    data = file.read_bytes()
    middle = len(data) // 2
    if damage == "removed":
        file.unlink()
    elif damage == "of another step" and name == "checkpoint.json":
        file.write_text(json.dumps(json.loads(data) | {"state": {"step": 1}}))
    else:
        file.write_bytes({
            "truncated": data[:middle], "emptied": b"", "bit flipped": data[:middle] + bytes([data[middle] ^ 4]) +
            data[middle + 1 :], "of another step": (before / name).read_bytes(), "no longer what it was": b"[1, 2]",
        }[damage])  # fmt: skip
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
        checkpoint.load_encoder(tmp_path / "elsewhere", None)


def test_another_models_is_refused_before_anything_is_touched(tmp_path, parts):
    save(tmp_path, parts, 1)
    folder, record, _ = checkpoint.newest(tmp_path)
    wider = load_recipe("mae", "demo", width=64, depth=1, heads=2)
    method = wider.method.build(wider)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with pytest.raises(UserError, match=r"not a checkpoint of this model: method/.* is \['float32', .* and \d+ more"):
        checkpoint.load(folder, method, build_optimizer(method, RECIPE.optim), record)
    assert all(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())


def test_an_encoder_is_built_again_from_the_record_alone(tmp_path, parts):
    save(tmp_path, parts, 3)
    recipe, name, encoder = checkpoint.load_encoder(tmp_path, None)
    assert (recipe, name) == (RECIPE, "encoder")
    ours, theirs = parts[0].encoder.state_dict(), encoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_a_method_is_built_again_whole(tmp_path, parts):
    save(tmp_path, parts, 3)
    before = torch.get_rng_state()
    recipe, method = checkpoint.load_method(tmp_path)
    assert recipe == RECIPE
    assert not method.training
    ours, theirs = parts[0].state_dict(), method.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert torch.equal(torch.get_rng_state(), before)
    folder, *_ = checkpoint.newest(tmp_path)
    rewrite(folder, lambda record: record["recipe"].update({"encoder.depth": 3}))
    with pytest.raises(UserError, match="not a checkpoint of this model"):
        checkpoint.load_method(tmp_path)


def test_it_merges_into_one_file(tmp_path, parts):
    folder = save(tmp_path, parts, 3)
    with Sharded(folder) as kept:
        names = kept.names(METHOD)
        assert list(merge(kept, names, tmp_path / "one.safetensors")) == names
    one = load_file(tmp_path / "one.safetensors")
    state = parts[0].state_dict()
    assert one.keys() == state.keys()
    assert [name for name in one if not torch.equal(one[name], state[name])] == []


def test_there_is_no_pickle_and_no_path_out(tmp_path, parts):
    """Only safetensors and JSON; a record that points elsewhere or names foreign code is refused."""
    folder = save(tmp_path, parts, 1)
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    rewrite(folder, lambda record: record["recipe"].update({"method.kind": "os"}))
    with pytest.raises(UserError, match=r"method.kind = os: there is no ssl_global/methods/os.py"):
        checkpoint.load_encoder(tmp_path, None)
    secret = tmp_path / "secret"
    secret.write_text("not yours")
    rewrite(folder, lambda record: record["files"].update({"../../secret": checkpoint.describe(secret)}))
    with pytest.raises(UserError, match=r"\.\./\.\./secret is missing"):
        checkpoint.load_encoder(tmp_path, None)


def rewrite(folder: Path, change) -> None:
    """As somebody would who knows how the record is checked."""
    file = folder / "checkpoint.json"
    record = json.loads(file.read_text())
    del record["crc32"]
    change(record)
    file.write_text(json.dumps(record | {"crc32": checkpoint.own_checksum(record)}))
