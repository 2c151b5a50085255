"""What a page says of a run's folder and of a model; folders of strangers get a page too."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from ssl_global.explain.curves import Chart
from ssl_global.explain.page import Columns, Listing, Section, Table, page
from ssl_global.explain.sections import LONGEST, MOST_ROWS, of_backbone, of_run

SUMMARY = {
    "recipe": "dino:demo", "data": "3000 images in 4 shards, 17 classes", "steps": 375, "images": 24000,
    "seconds": 153.9, "images_per_second": 156.0, "peak_memory": 1136193536, "loss": 2.9743, "knn": 0.6544,
    "knn_untrained": 0.4989, "knn_pixels": 0.2644, "rankme": 24.84, "feature_std": 0.8004, "export": "runs/dino/export",
}  # fmt: skip
RUN = {
    "command": ["pretrain.py", "--recipe", "dino", "--out", "my runs/dino"],
    "started": "2026-11-21T08:27:28+0000",
    "versions": {"python": "3.12.1", "torch": "2.15.0"},
    "commit": "870874acea8d29f99bbbff2ed138709712c1781c",
    "changed_files": ["M a.py", "?? b.py"],
}
METRICS = [
    {"step": 1, "loss": 6.33, "teacher_entropy_share": 0.7, "teacher_kl": 1.5, "lr": 0.0, "gradient_norm": 7.9},
    {"step": 94, "knn": 0.61, "rankme": 25.5, "feature_std": 0.79},
    {"step": 375, "loss": 2.97, "teacher_entropy_share": 0.38, "teacher_kl": 0.4, "lr": 1e-6, "gradient_norm": 1.3},
    {
        "step": 375,
        "knn": 0.65,
        "rankme": 24.8,
        "feature_std": 0.8,
        "images_per_second": 150.0,
        "waiting_for_data": 0.01,
    },
]
RECIPE = {"seed": 0, "method.kind": "dino", "views.globals.area": [0.2, 1.0], "optim.betas": [0.9, 0.999]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "export").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in METRICS))
    (folder / "export" / "config.json").write_text(json.dumps({"num_features": 192}))
    return folder


def parts(section: Section) -> list:
    """With what stands in columns, too."""
    return [one for part in section.parts for one in (part.parts if isinstance(part, Columns) else [part])]


def by_title(sections: list[Section]) -> dict[str, Section]:
    return {section.title: section for section in sections}


def titles(sections: list[Section]) -> list[str]:
    return [section.title for section in sections]


def test_a_run_from_weights_is_compared_with_where_it_began(run):
    began = {name: value for name, value in SUMMARY.items() if name != "knn_untrained"} | {"knn_start": 0.6}
    (run / "summary.json").write_text(json.dumps(began))
    found = by_title(of_run(run, RECIPE))["Result"]
    assert found.text == "k-NN 0.654: +5.4 points over the 0.600 of the encoder that it began from."
    assert parts(found)[0].head[2] == "at the start"
    assert parts(found)[0].rows == [("k-NN", 0.6544, 0.6, 0.2644)]


def test_a_finished_run_has_all_its_sections(run):
    sections = of_run(run, RECIPE)
    assert titles(sections) == [
        "Result", "Training", "Health", "Optimisation and speed", "Where it came from", "Recipe",
    ]  # fmt: skip
    found = by_title(sections)
    judged, figures = parts(found["Result"])
    assert judged.rows == [("k-NN", 0.6544, 0.4989, 0.2644)]
    assert ("images seen", 24000) in figures.rows
    assert ("peak memory, MB", pytest.approx(1136.193536)) in figures.rows
    assert found["Result"].text == "k-NN 0.654: +15.5 points over the untrained encoder's 0.499."

    loss, knn = parts(found["Training"])
    assert loss.lines == {"loss": [(1, 6.33), (375, 2.97)]}
    assert knn.lines == {"k-NN": [(94, 0.61), (375, 0.65)]}
    assert knn.baselines == {"k-NN, untrained": 0.4989, "k-NN, raw pixels": 0.2644}

    rank, spread, entropy, _ = parts(found["Health"])
    assert rank.baselines == {"collapsing below": pytest.approx(0.02 * 192)}
    assert spread.baselines == {"collapsed below": 0.05}
    assert set(entropy.baselines.values()) == {0.98, 0.02}
    assert found["Health"].text == "At the end nothing speaks of a collapse."
    assert len(parts(found["Optimisation and speed"])) == 4

    listing, where = parts(found["Where it came from"])
    assert listing == Listing("pretrain.py --recipe dino --out 'my runs/dino'")
    assert dict(where.rows) == {
        "recipe": "dino:demo", "data": SUMMARY["data"], "export": "runs/dino/export", "started": RUN["started"],
        "commit": RUN["commit"], "python": "3.12.1", "torch": "2.15.0", "changed since the commit": "M a.py, ?? b.py",
    }  # fmt: skip
    tables = {table.caption: dict(table.rows) for table in parts(found["Recipe"])}
    assert tables == {
        "run": {"seed": "0"}, "method": {"kind": "dino"}, "views.globals": {"area": "0.2 1.0"},
        "optim": {"betas": "0.9 0.999"},
    }  # fmt: skip


def test_a_run_that_collapses_is_warned_of(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 376, "feature_std": 0.01, "rankme": 1.2}) + "\n")
    assert by_title(of_run(run))["Health"].text.startswith("Warning: all images get the same output (feature std 0.01)")


def test_a_run_that_goes_on_has_curves_and_no_result(run):
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 400, "loss": 2')  # killed while it wrote
    sections = by_title(of_run(run))
    assert "Result" not in sections
    assert parts(sections["Training"])[0].lines == {"loss": [(1, 6.33), (375, 2.97)]}
    said = sections["What could not be read"].text
    assert said == "summary.json is not there: the run has not come to its end."


def test_a_run_without_metrics_has_no_empty_charts(run):
    (run / "metrics.jsonl").write_text("")
    sections = of_run(run)
    assert not any(isinstance(part, Chart) for section in sections for part in parts(section))
    assert titles(sections) == ["Result", "Where it came from", "What could not be read"]
    assert sections[-1].text == "metrics.jsonl holds no metrics that could be read: there are no curves."


def test_a_tuned_run_shows_what_it_was_judged_by(run):
    lines = [{"step": 1, "loss": 2.0}, {"step": 9, "top1": 0.5, "top5": 0.9, "ece": 0.04}, {"step": 9, "miou": 0.3}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    charts = parts(by_title(of_run(run))["Training"])
    assert [list(chart.lines) for chart in charts] == [["loss"], ["top-1", "top-5"], ["mIoU"], ["calibration error"]]


# ----------------------------------------------------------------------------------------------------------- strangers

ODD = {
    "nothing": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00\x01",
    "null": b"null",
    "a list": b"[1, 2]",
    "a word": b'"word"',
    "other fields": b'{"x": 1}',
    "words for numbers": b'{"step": "1", "knn": "1", "knn_untrained": "x", "command": "rm", "versions": "v"}',
    "lists for all": b'{"step": [], "knn": [], "loss": [], "command": [[1]], "versions": [], "changed_files": [[1]]}',
    "objects for all": b'{"step": {}, "knn": {}, "command": {}, "versions": {"a": {}}, "recipe": {}}',
    "beyond all numbers": b'{"step": 1, "knn": 1e999, "knn_untrained": 1e999, "loss": -1e999, "num_features": 1e999,'
    b' "rankme": 1e999, "feature_std": 1e308, "lr": 1e308, "gradient_norm": -1e308, "peak_memory": 1e308}',
    "not numbers": b'{"step": 1, "knn": NaN, "knn_untrained": NaN, "loss": NaN, "rankme": NaN, "num_features": NaN}',
    "many digits in it": b'{"step": 1, "knn": %(n)b, "knn_untrained": %(n)b, "num_features": %(n)b, "seconds": %(n)b}'
    % {b"n": b"9" * 4000},
    "a far step": b'{"step": 9007199254740991, "loss": 1.0}',
    "tiny": b'{"step": 0, "loss": 5e-324, "lr": 1e-300}',
    "not in Unicode": b'{"step": 1, "loss": 1, "commit": "\\ud800", "command": ["\\ud800", "\\u0000"]}',
    "a program": b'{"recipe": "<script>alert(1)</script>", "commit": "\\" onload=alert(1)", "command": ["</pre>"]}',
    "deep": b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_files_give_a_page(run, odd):
    for name in ("summary.json", "run.json", "metrics.jsonl", "export/config.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(odd)
        sections = of_run(run, RECIPE)
        content = page("odd", "", sections).decode()
        assert content.count("<script") == 1
        assert "alert(1)</script>" not in content
        assert not re.search(r' (d|x|y)="[^"]*(nan|inf)', content)
        for section in sections:
            assert not any(isinstance(part, Chart) and not part.html() for part in parts(section))
        (run / name).write_bytes(before)


@pytest.mark.parametrize("name", ["summary.json", "run.json", "metrics.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "cut", "folder", "dangling link", "pipe", "large"])
def test_what_cannot_be_read_is_one_line(run, name, damage, monkeypatch):
    file = run / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(METRICS[0])])
    elif damage == "folder":
        file.mkdir()
    elif damage == "dangling link":
        file.symlink_to("nowhere")
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "large":
        monkeypatch.setattr("ssl_global.explain.sections.MOST_BYTES", 2000)
        file.write_bytes(content + b" " * 2000)
    sections = by_title(of_run(run))
    (said,) = sections["What could not be read"].text.split("\n\n")
    assert said.startswith(name)
    assert "\n" not in said
    assert len(said) < 120
    assert len(sections) >= 3  # of what the other files say


def test_no_folder_at_all_is_three_lines(tmp_path):
    (section,) = of_run(tmp_path / "nowhere")
    assert len(section.text.split("\n\n")) == 3


def test_texts_of_strangers_are_cut(run):
    versions = {f"library {n}": "1" * 5000 for n in range(1000)}
    (run / "run.json").write_text(json.dumps(RUN | {"versions": versions, "command": ["x" * 10**6]}))
    recipe = {f"part{n}.field": "x" * 10**6 for n in range(1000)}
    sections = by_title(of_run(run, recipe))
    listing, where = parts(sections["Where it came from"])
    assert len(listing.text) < LONGEST + 30
    assert len(where.rows) == MOST_ROWS
    assert len(parts(sections["Recipe"])) == MOST_ROWS
    assert max(len(text) for row in where.rows for text in row) < LONGEST + 30


# ------------------------------------------------------------------------------------------------------------ the cost


def test_a_backbone_costs_what_its_layers_say():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    model[0].requires_grad_(False)
    section = of_backbone(model, (3, 16, 16), batch=2, device=torch.device("cpu"))
    rows = {name: value for name, value in parts(section)[0].rows}  # noqa: C416
    assert rows["parameters, millions"] == pytest.approx((3 * 8 * 9 + 8 * 4) / 1e6)
    assert rows["of these learning, millions"] == pytest.approx(8 * 4 / 1e6)
    assert rows["forward pass, GFLOPs"] == pytest.approx(2 * 2 * 16 * 16 * (3 * 8 * 9 + 8 * 4) / 1e9)
    assert rows["activations kept for the backward pass, MB"] == pytest.approx(4 * 2 * 8 * 16 * 16 / 1e6)
    assert section.text.startswith("Of a batch of 2 images of 3 × 16 × 16 (channels, height, width).")
    assert isinstance(parts(section)[0], Table)


def test_the_input_size_is_the_models_own():
    section = of_backbone(timm.create_model("test_vit", num_classes=0), device=torch.device("cpu"))
    assert "one image of 3 × 160 × 160" in section.text
    assert "learning" not in str(parts(section)[0].rows)


def test_a_model_that_does_not_say_its_size_has_a_line():
    section = of_backbone(nn.Linear(3, 3))
    assert section == Section("Cost", section.text)
    assert section.text == "Not known: Linear: does not say which images it takes; give input_size=(3, 224, 224)"
    assert math.isfinite(len(section.html(1)))
