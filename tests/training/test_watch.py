"""One process dies, fails or hangs: the others end soon and name it, and the run goes on from its last checkpoint."""

import queue
import re

import pytest
import torch.distributed as dist
from tiny_runs import arguments, assert_bit_equal, finish, losses, start, tensors

from ssl_global.training import watch
from ssl_global.training.watch import Watch

FAULTY = "tests/faulty_pretrain.py"
LONG = ["--train.steps=24", "--checkpoint.every=4", "--encoder.drop-path=0.2"]


@pytest.fixture(scope="module")
def whole(photographs, tmp_path_factory):
    """Two processes, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, _, error = finish(start(arguments("dino", photographs, out, *LONG)))
    assert code == 0, error[-2000:]
    return out


def test_one_that_is_killed_is_named_and_the_run_goes_on_by_itself(photographs, tmp_path, whole):
    """torchrun's agent starts all of them again: the same command, the newest checkpoint."""
    words = arguments("dino", photographs, tmp_path / "run", *LONG)
    killed = start(["kill:step:14:1", *words], script=FAULTY, max_restarts=2)
    code, out, error = finish(killed)
    assert code == 0, error[-3000:]
    assert re.search(r"error: process 0 \(.*the run ends at step 14: process 1 \(.*is gone, last heard of at", error)
    assert "going on from" in out
    assert_bit_equal(tensors(whole), tensors(tmp_path / "run"))
    assert losses(whole) == losses(tmp_path / "run")


def test_one_that_fails_is_named_with_its_error(photographs, tmp_path):
    words = arguments("mae", photographs, tmp_path / "run", *LONG)
    code, _, error = finish(start(["raise:step:5:1", *words], script=FAULTY))
    assert code != 0
    assert "RuntimeError: a fault of this process alone" in error  # its own traceback
    assert re.search(r"process 0 .*the run ends at step 5: process 1 .* failed: RuntimeError: a fault", error)


def test_one_that_hangs_is_named_and_says_where(photographs, tmp_path):
    words = arguments("mae", photographs, tmp_path / "run", *LONG, "--timeout=3")
    code, _, error = finish(start(["hang:step:14:1", *words], script=FAULTY))
    assert code != 0
    said = r"no move for \d+ s in forward and backward of step 15: process 1 .*is behind, in .* of step 1"
    assert re.search(said, error)
    assert "hangs here:" in error
    assert "time.sleep(3600)" in error
    assert "The same command goes on from the last checkpoint" in error


@pytest.mark.slow
def test_one_that_hangs_while_saving_ends_the_run_too(photographs, tmp_path):
    """The steps go on while a checkpoint is written; the next save waits for it, and does not wait for ever."""
    words = arguments("mae", photographs, tmp_path / "run", *LONG, "--timeout=4")
    code, _, error = finish(start(["hang:before-data:2:1", *words], script=FAULTY))
    assert code != 0
    assert "no move for" in error
    assert "in saving of step" in error


def test_steps_that_are_not_finite_roll_the_run_back_once(photographs, tmp_path):
    """On the second of two processes only; both go back to the checkpoint before, and on with other data."""
    words = arguments("dino", photographs, tmp_path / "run", *LONG, "--train.max-bad-steps=3")
    code, out, error = finish(start(["nan:step:9:1", *words], script=FAULTY))
    assert code == 0, error[-3000:]
    assert "not finite in 4 steps in a row, 10 to 13; none of them changed the weights" in out
    assert "process 1: weights, images and outputs are finite" in out
    assert "rolled back to step 8; the data goes on behind step 13. It is done once" in out
    assert len(losses(tmp_path / "run")) == 24


@pytest.fixture
def pair(monkeypatch):
    """The watches of two processes in this one, in a hurry; `said` is what they would end with."""
    monkeypatch.setattr(watch, "NOTE_EVERY", 0.05)
    monkeypatch.setattr(watch, "SILENT_AFTER", 0.5)
    said = queue.Queue()
    monkeypatch.setattr(watch, "tell", said.put)
    monkeypatch.setattr(watch, "leave", lambda: None)
    store = dist.HashStore()
    return *(Watch(store, rank=rank, num_processes=2, timeout=0.5) for rank in range(2)), said


def test_who_waits_with_patience_ends_when_another_falls_silent(pair):
    """An evaluation takes as long as it takes; but not on a machine that is gone."""
    waiting, other, said = pair
    with waiting, waiting.aside("evaluating"):
        with other, pytest.raises(queue.Empty):
            said.get(timeout=3)  # it stands still too, and its notes come
        assert re.search(r"process 0 .*the run ends in evaluating of step 1: process 1 .*is gone", said.get(timeout=10))


def test_one_that_is_silent_where_all_wait_is_named(pair):
    waiting, other, said = pair
    with waiting:
        with other:
            for each in (waiting, other):
                each.at(3, "agreeing")
            other.note()
        waiting.begin()
        assert re.search(r"no move for . s in agreeing of step 4: process 1 .*is gone", said.get(timeout=10))
