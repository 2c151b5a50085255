"""Every benchmark runs, small: that its figures are good is for a quiet machine to say."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from PIL import Image

from benchmarks import attention, knn, reach, scaling, swin
from benchmarks.__main__ import names
from benchmarks.measure import Comparison, compare

SMALL = {
    "attention": ["--maps", "8", "12", "--channels", "16", "--rounds", "1", "--names", "dual", "criss_cross"],
    "attention_table": ["--small", "--seeds", "1", "--variants", "Baseline", "Criss-Cross"],
    "knn": ["--bank", "3000", "--queries", "40", "--width", "8", "--classes", "5", "--rounds", "1"],
    "loss": ["--images", "2", "--prototypes", "512", "--rounds", "1"],
    "teacher": ["--name", "test_vit", "--prototypes", "512", "--rounds", "1"],
    "data": ["--rounds", "1", "--samples", "3000"],
    "reach": ["--small", "--seeds", "1"],
    "scaling": ["--recipes", "mae:demo", "--images", "2", "--steps", "1", "--rounds", "1"],
    "shuffle": ["--shards", "9"],
    "soak": ["--samples", "3000"],
    "step": ["--recipe", "dino", "--small", "--images", "2", "--rounds", "1"],
    "swin": ["--small", "--rounds", "1"],
}


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return warm.completed("-m", "benchmarks", *words)


def test_every_benchmark_is_tried_here() -> None:
    assert names() == sorted([*SMALL, "checkpoint"])  # which test_benchmark_checkpoint.py runs


@pytest.mark.parametrize("name", sorted(SMALL))
def test_it_runs_and_writes_its_figures(name: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(4):
        (images / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 50), (40 * number, 0, 9)).save(images / f"{number % 2}" / f"{number}.jpg")
    words = ["--images", images / "0"] if name == "data" else []
    if name == "attention_table":
        words = ["--data", images, "--val", images, "--runs", tmp_path / "runs"]
    done = run(name, *SMALL[name], *words, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    if name == "data":
        found = json.loads((tmp_path / "out").read_text())
        assert len(found["comparisons"]) == 7
        assert len(found["promised"]) == 7
        assert all(figure["measured"] > 0 for figure in found["promised"].values())
    if name == "attention":
        found = json.loads((tmp_path / "out").read_text())
        assert len(found["promised"]) == 3
        linear = [figure for figure in found["promised"].items() if "(1:" in figure[0]]
        assert len(linear) == 2
        assert all(figure["measured"] >= figure["bar"] for _, figure in linear)
        for of_side in found["figures"]["criss_cross"].values():
            assert of_side["plain form"]["kept_bytes"] > of_side["module"]["kept_bytes"]
            assert all(of["peak_bytes"] > 0 and of["time"]["milliseconds"] > 0 for of in of_side.values())
    if name == "attention_table":
        rows = json.loads((tmp_path / "out").read_text())["rows"]
        assert [len(row["accuracies"]) for row in rows.values()] == [1, 1]
        assert rows["Criss-Cross"]["difference"]["interval"] is None
    if name == "knn":
        assert re.search(r"accuracy: published (\S+), ours \1; answers that differ, all ties: 0", done.stdout)
    if name == "scaling":
        (figures,) = json.loads((tmp_path / "out").read_text())["figures"].values()
        assert figures["one process"]["efficiency"] == 1
        assert figures["DDP, 2 processes"]["efficiency"] > 0
        assert figures["DDP, 2 processes"]["communication"] < 1
    if name == "swin":
        found = json.loads((tmp_path / "out").read_text())
        assert len(found["comparisons"]) == len(found["promised"]) == 4
        memory = found["figures"]["masking"]
        assert memory["uniform"]["kept_bytes"] < memory["dense"]["kept_bytes"] / 2
        assert all(figure["peak_bytes"] >= figure["kept_bytes"] for figure in memory.values())


def test_uncounted_attention_would_show() -> None:
    """Full attention's multiply-adds among all patches, on the meta device as where they are done."""
    for name in (swin.PLAIN, swin.SCRATCH, swin.FULL):
        assert swin.multiply_adds(name, 64, True) == swin.multiply_adds(name, 64, True, device="cpu")
    patches, blocks, widths = [256, 64, 16, 4], range(4), [32, 64, 128, 256]
    attention = sum(2 * (patches[i] + 8) ** 2 * widths[i] for i in blocks)
    products = sum((patches[i] + 8) * 4 * widths[i] ** 2 + 8 * widths[max(0, i - 1)] * widths[i] for i in blocks)
    more = swin.multiply_adds(swin.FULL, 64, True) - swin.multiply_adds(swin.PLAIN, 64, True)
    assert more == attention + products


def test_criss_cross_is_counted_without_its_projections() -> None:
    """Products of each place with its row and its column, of query and key and of the values, twice."""
    case = attention.Case("criss_cross")
    for side in (8, 12):
        assert attention.attention_flops(case, 16, side) == 2 * 2 * side**2 * 2 * side * (16 // 8 + 16)


def test_far_marks_half_of_them_alike() -> None:
    images, labels = reach.examples(200, 64, seed=3)
    again, _ = reach.examples(200, 64, seed=3)
    other, _ = reach.examples(200, 64, seed=4)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert labels.sum() == 100
    first, second = reach.corners(200, 64, torch.Generator().manual_seed(3))
    assert ((first - second).abs() >= 64 - 8 - 2 * reach.JITTER).all()
    assert ((first >= 0) & (first <= 64 - reach.MARK)).all()
    assert ((second >= 0) & (second <= 64 - reach.MARK)).all()
    assert 60 < (first < second).all(1).sum() < 140  # both diagonals


def test_labels_say_whether_the_colours_are_alike() -> None:
    images, labels = reach.examples(50, 64, seed=0)
    for image, label in zip(images, labels, strict=True):
        marks = (image - reach.GREY) > 1
        colours = {tuple(colour) for colour in marks.flatten(1).t().tolist() if any(colour)}
        assert len(colours) == (1 if label else 2)


@pytest.mark.parametrize(("pixels", "share"), [(64, 0.25), (96, 0.0)])
def test_what_sees_both_corners(pixels: int, share: float) -> None:
    seen = {name: reach.sees_both(reach.built(name, pixels, seed=0), pixels) for name in reach.MODELS}
    assert seen.pop("timm's Swin") == share
    assert set(seen.values()) == {1.0}


def test_a_wrong_knn_would_show(monkeypatch) -> None:
    settings = knn.Settings(bank=200, queries=20, width=8, classes=5)
    given = knn.drawn(settings)
    assert "ours" in knn.refuse_difference(settings, *given)
    monkeypatch.setattr(knn, "knn_predict", lambda bank, labels, queries, **how: torch.zeros(len(queries)).long())
    with pytest.raises(RuntimeError, match="votes"):
        knn.refuse_difference(settings, *given)


def test_efficiency_is_of_what_so_many_processes_could_do() -> None:
    """Two processes do 1.5 times as much; a fifth of their step is the engine's."""
    alone, two = scaling.Case("mae", "one process", 1), scaling.Case("mae", "DDP", 2)
    alone.rounds = [{"alone": [3.0], "engine": [3.0]}]
    two.rounds = [{"alone": [3.2], "engine": [4.0]}]
    (comparison,) = scaling.compared([alone, two], 10)
    assert comparison.seconds == {"one process": [0.3], "DDP, 2 processes": [0.2]}
    figures = scaling.efficiencies(comparison, [alone, two])
    assert figures["DDP, 2 processes"] == {"efficiency": pytest.approx(0.75), "communication": pytest.approx(0.2)}


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
