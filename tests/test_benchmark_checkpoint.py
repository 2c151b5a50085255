"""The checkpoint benchmark, small: its figures hold together, nothing is left behind. How fast is not asked here."""

import json
import time

import pytest
import torch.multiprocessing as mp
import warm

from benchmarks.checkpoint import Parts, evict, in_turn, measured_by, newest_in

NAMES = ("one process", "2 processes")
ROUNDS = 2


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written_to")
    out = tmp_path_factory.mktemp("out") / "figures.json"
    words = ["--small", "--rounds", ROUNDS, "--processes", 1, 2, "--folder", folder, "--out", out]
    ran = warm.completed("-m", "benchmarks", "checkpoint", *words)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout, json.loads(out.read_text()), folder


def test_tables_come_out(done):
    printed, _, _ = done
    for name in NAMES:
        for title in ("training stands still for a save", "a step while", "the write", "where the time of ours goes"):
            assert f"{name}: {title}" in " ".join(printed.split())


def test_each_comparison_has_its_options(done):
    _, figures, _ = done
    assert len(figures["comparisons"]) == 4 * len(NAMES)
    for title, options in figures["comparisons"].items():
        assert len(options) >= 2, title
        assert all(figure["milliseconds"] > 0 for figure in options.values()), title


@pytest.mark.parametrize("name", NAMES)
def test_both_save_the_same_amount(done, name):
    _, figures, _ = done
    written = figures["figures"][name]["bytes"]
    assert written["accelerate"] > 10e6
    assert written["ours, in the background"] == pytest.approx(written["accelerate"], rel=0.05)
    assert all(speed > 0 for speed in figures["figures"][name]["megabytes_per_second"].values())


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_the_whole(done, name):
    _, figures, _ = done
    saves = figures["figures"][name]["rounds"]["saves"]
    assert len(saves["ours, waited for"]) == ROUNDS
    for each in saves["ours, waited for"]:
        parts = {part: each[part] for part in each if part not in ("seconds", "unsafe", "bytes")}
        assert sum(parts.values()) == pytest.approx(each["seconds"])
        for part in ("copy aside", "write", "flush", "checksum"):
            assert each[part] > 0, part
        assert (each["plan, together"] > 0) == (name != "one process")
        assert each["unsafe"] < each["seconds"]


@pytest.mark.parametrize("name", NAMES)
def test_a_stall_is_part_of_its_save(done, name):
    _, figures, _ = done
    rounds = figures["figures"][name]["rounds"]
    for each in rounds["saves"]["ours, in the background"]:
        assert 0 < each["stall"] < each["seconds"]
        assert each["stall"] <= each["lost"]
        assert each["step"] <= each["longest step"]
    for each in rounds["saves"]["accelerate"]:
        assert each["seconds"] < each["flushed"]
    for whence in ("from memory", "from the disk"):
        assert all(0 < each["unsafe"] < each["seconds"] for each in rounds[whence]["ours"])


def test_nothing_is_left_behind(done):
    _, _, folder = done
    assert list(folder.iterdir()) == []


def test_nothing_is_left_behind_by_what_fails(tmp_path):
    with pytest.raises(mp.ProcessRaisedException, match="set_num_threads"):
        measured_by(1, rounds=1, small=True, threads=0, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_first_round_is_put_aside():
    numbers = {"a": iter(range(9)), "b": iter(range(9))}
    found = in_turn({name: lambda name=name: {"x": next(numbers[name])} for name in "ab"}, rounds=2)
    assert found == {
        "first: a": [{"x": 0}], "first: b": [{"x": 0}], "a": [{"x": 1}, {"x": 2}], "b": [{"x": 1}, {"x": 2}],
    }  # fmt: skip


def test_a_part_inside_another_counts_once():
    parts = Parts()
    inner = parts.timed("flush", lambda: time.sleep(0.05))
    parts.timed("write", inner)()
    assert parts.seconds["flush"] >= 0.05
    assert parts.seconds["write"] < parts.seconds["flush"]
    assert parts.inside == [pytest.approx(parts.seconds["flush"] + parts.seconds["write"])]


def test_the_newest_is_that_of_the_highest_number(tmp_path):
    for number in (9, 10):
        (tmp_path / "ours" / "checkpoints" / f"step-{number:08d}").mkdir(parents=True)
        (tmp_path / "theirs" / "checkpoints" / f"checkpoint_{number}").mkdir(parents=True)
    assert newest_in(tmp_path / "ours").name == "step-00000010"
    assert newest_in(tmp_path / "theirs").name == "checkpoint_10"


def test_what_is_evicted_can_still_be_read(tmp_path):
    (tmp_path / "file").write_bytes(b"kept" * 5000)
    evict(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"kept" * 5000
