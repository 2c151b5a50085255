"""Agreement, the count of bad steps and of bad samples."""

import json
import math
import os
import random
import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_global.errors import UserError
from ssl_global.training import guard
from ssl_global.training.guard import Agreement, BadSamples, FiniteSteps, LossAlarm, StopSignal, agree


@pytest.mark.parametrize("loss", [1.5, math.nan, math.inf])
@pytest.mark.parametrize("norm", [2.0, math.nan, math.inf])
def test_agreement_of_one(loss, norm):
    agreed = agree(torch.tensor(loss), torch.tensor(norm), stop=False, bad_samples=True)
    assert agreed.finite == (math.isfinite(loss) and math.isfinite(norm))
    assert agreed.loss == 1.5 if agreed.finite else math.isnan(agreed.loss)
    assert (agreed.stop, agreed.bad_samples) == (False, True)


def test_only_bad_steps_in_a_row_count():
    steps = FiniteSteps(max_bad_steps=2)
    for finite in (False, False, True, False, False):
        assert not steps.too_many(agreement(finite))
    assert steps.too_many(agreement(False))
    steps.where = ["process 1: the output of encoder.norm is not finite"]
    report = steps.report(6)
    assert "not finite in 3 steps in a row, 4 to 6; none of them changed the weights" in report
    assert "last losses: nan, nan, 1, nan, nan, nan" in report
    assert report.endswith("process 1: the output of encoder.norm is not finite")


def agreement(finite):
    return Agreement(loss=1.0 if finite else math.nan, finite=finite, stop=False, bad_samples=False)


def test_a_loss_that_jumps_and_stays_is_said_once():
    alarm, noise = LossAlarm(), random.Random(0)
    said = [alarm.see(2 + noise.gauss(0, 0.05), step) for step in range(300)]
    assert said == [None] * 300
    assert [alarm.see(8.0, 301), alarm.see(2.0, 302), alarm.see(9.0, 303)] == [None] * 3  # one high loss is none
    said = [alarm.see(4 + noise.gauss(0, 0.05), step) for step in range(304, 350)]
    (line,) = [line for line in said if line]
    assert "the loss has jumped to 4." in line
    assert "it was 1.99" in line
    for step in range(350, 600):
        assert alarm.see(4.0, step) is None  # it is the usual one by now
    assert any(alarm.see(9.0, step) for step in range(600, 610))


@given(level=st.floats(0.01, 100), noise=st.floats(0, 0.5), falls=st.floats(0, 0.01), seed=st.integers(0, 99))
def test_a_loss_that_falls_however_noisily_raises_no_alarm(level, noise, falls, seed):
    alarm, draw = LossAlarm(), random.Random(seed)
    for step in range(400):
        loss = level * math.exp(-falls * step) * (1 + noise * draw.uniform(-1, 1))
        assert alarm.see(loss, step) is None


@pytest.mark.parametrize("number", StopSignal.NUMBERS)
def test_a_signal_is_noted_and_a_later_one_meets_the_handlers_of_before(number, monkeypatch):
    before = [signal.getsignal(n) for n in StopSignal.NUMBERS]
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == signal.Signals(number).name
        assert stop.agreed(torch.device("cpu"))
        os.kill(os.getpid(), number)  # the launcher hands on what all have got: it is the same one
        os.kill(os.getpid(), signal.SIGUSR1)
        met = []
        with monkeypatch.context() as patched:
            patched.setattr(stop, "before", dict.fromkeys(stop.before, lambda *given: met.append(given[0])))
            patched.setattr(guard, "SAME_SIGNAL_SECONDS", 0.0)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert met == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert met == [signal.SIGTERM]
    assert [signal.getsignal(n) for n in StopSignal.NUMBERS] == before


def test_after_the_grace_a_run_ends_as_it_is(monkeypatch, capsys):
    left = threading.Event()
    monkeypatch.setattr(guard, "leave", left.set)
    with StopSignal(grace=0.05):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert left.wait(5)
    assert "--grace 0.05: not saved that soon after SIGUSR1" in capsys.readouterr().err


def test_bad_samples_are_counted_once_and_logged(tmp_path):
    samples = BadSamples(tmp_path / "bad.jsonl", num_samples=10, max_fraction=0.2)
    samples.see([("a", "torn"), ("b", "empty")], [])
    assert samples.to_share
    assert samples.share() == ["a: torn", "b: empty"]
    samples.see([("a", "torn")], [])
    assert not samples.to_share
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == ["a", "b"]
    samples.see([("c", "torn")], [])
    with pytest.raises(UserError, match=r"3 of 10 samples cannot be read.*allow 0.3 or more:\n  a: torn\n  b: empty\n"):
        samples.share()


def test_a_sample_without_replacement_stops_at_any_fraction(tmp_path):
    samples = BadSamples(tmp_path / "bad.jsonl", num_samples=10, max_fraction=1)
    samples.see([("a", "torn")], [f"{key} cannot be read" for key in "aabcde"])
    with pytest.raises(UserError, match=r"the data cannot be read: a cannot be read\n  b .*\n  c .*\n  and 2 more$"):
        samples.share()


def test_what_earlier_sessions_met_still_counts(tmp_path):
    first = BadSamples(tmp_path / "bad.jsonl", num_samples=10, max_fraction=0.2)
    first.see([("a", "torn"), ("b", "empty")], [])
    first.share()
    later = BadSamples(tmp_path / "bad.jsonl", num_samples=10, max_fraction=0.2)
    later.see([("a", "torn")], [])
    assert not later.to_share
    later.see([("c", "torn")], [])
    with pytest.raises(UserError, match="3 of 10 samples cannot be read"):
        later.share()
