"""Every benchmark runs, small: that its figures are good is for a quiet machine to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.__main__ import names
from benchmarks.measure import Comparison, compare

ROOT = Path(__file__).parents[1]
SMALL = {
    "checkpoint": ["--small", "--rounds", "1", "--processes", "1"],
    "data": ["--rounds", "1", "--samples", "3000"],
    "shuffle": ["--shards", "9"],
    "soak": ["--samples", "3000"],
}


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_benchmark_is_tried_here() -> None:
    assert names() == sorted(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_it_runs_and_writes_its_figures(name: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (60, 50), (40 * number, 0, 9)).save(images / f"{number}.jpg")
    words = ["--images", images] if name == "data" else []
    done = run(name, *SMALL[name], *words, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    if name == "data":
        found = json.loads((tmp_path / "out").read_text())
        assert len(found["comparisons"]) == 7
        assert len(found["promised"]) == 7
        assert all(figure["measured"] > 0 for figure in found["promised"].values())


def test_an_unknown_one_is_one_line() -> None:
    done = run("nothing")
    assert done.returncode == 2
    assert done.stderr == f"usage: python -m benchmarks NAME; there are: {', '.join(names())}\n"


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    comparison = Comparison("", "slow", {"slow": [2.0, 20.0, 2.0], "quick": [1.0, 10.0, 4.0]})
    assert comparison.ratio("quick") == 2
    assert comparison.ratio("slow") == 1


def test_options_take_turns_to_be_first() -> None:
    order: list[str] = []
    options = {name: lambda name=name: order.append(name) or 1 for name in "abc"}
    compare("", options, rounds=3, warm_up=False)
    assert order == list("abcbcacab")
