"""Agreement, the count of bad steps and of bad samples."""

import json
import math

import pytest
import torch

from ssl_global.errors import UserError
from ssl_global.training.guard import BadSamples, FiniteSteps, agree


@pytest.mark.parametrize("loss", [1.5, math.nan, math.inf])
@pytest.mark.parametrize("norm", [2.0, math.nan, math.inf])
def test_agreement_of_one(loss, norm):
    agreed = agree(torch.tensor(loss), torch.tensor(norm), stop=False, bad_samples=True)
    assert agreed.finite == (math.isfinite(loss) and math.isfinite(norm))
    assert agreed.loss == 1.5 if agreed.finite else math.isnan(agreed.loss)
    assert (agreed.stop, agreed.bad_samples) == (False, True)


def test_only_bad_steps_in_a_row_count():
    steps = FiniteSteps(max_bad_steps=2)
    for step, finite in enumerate([False, False, True, False, False]):
        steps.see(finite, step)
    with pytest.raises(UserError, match="not finite in 3 steps in a row, 3 to 5"):
        steps.see(False, 5)


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
