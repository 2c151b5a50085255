"""Fine-tuning where an image has any number of classes: the loss against a loop, whole runs, predictions, refusals."""

import csv
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from recipes_under_test import load_recipe
from tiny_runs import EVERY, losses

from ssl_global import cli
from ssl_global.encoders.pretrained import PretrainedConfig
from ssl_global.export import load
from ssl_global.finetune import main
from ssl_global.schedules import Progress

NAMES = ("blue", "green", "red")
SMALL_VIT = json.dumps({"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True})
PROGRESS = Progress(step=0, num_steps=10, steps_per_epoch=2.0)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def write(folder: Path, copies: int, *, seed: int, names=NAMES) -> Path:
    """Images whose channels are bright for the classes that they have, all sets of them in turn."""
    random, lines = np.random.default_rng(seed), ["image,labels"]
    folder.mkdir(parents=True)
    for number, labels in enumerate([c for r in range(4) for c in combinations(names, r)] * copies):
        pixels = random.integers(0, 100, (20, 20, 3), dtype=np.uint8)
        for name in labels:
            pixels[..., NAMES.index(name)] += 130
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'|'.join(labels)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {"train": write(folder / "train", 4, seed=0), "val": write(folder / "val", 2, seed=1)}


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def arguments(data, out, *more):
    return ["--recipe=finetune:demo", f"--data={data['train']}", f"--val={data['val']}", f"--out={out}", *EVERY,
            f"--encoder.model-args={SMALL_VIT}", "--views.globals.pixels=16", *more, "--log-with"]  # fmt: skip


def method_of(**settings):
    recipe = load_recipe("finetune", "demo")
    recipe = replace(
        recipe,
        encoder=PretrainedConfig(name="vit_tiny_patch16_224", model_args=SMALL_VIT),
        method=replace(recipe.method, classes=NAMES, multi_label=True, **settings),
        views=replace(recipe.views, globals=replace(recipe.views.globals, pixels=16)),
    )
    torch.manual_seed(0)
    return recipe.method.build(recipe).eval()


def batch_of():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 2, (6, 3), generator=generator, dtype=torch.uint8)
    return {"views": [torch.randn(6, 3, 16, 16, generator=generator)], "label": labels, "seeds": list(range(6))}


@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_a_question_for_each_class(weights, smoothing):
    method, batch = method_of(mixup=0, cutmix=0, smoothing=smoothing, class_weights=weights), batch_of()
    logits = method.model.model(batch["views"][0]).double().detach().numpy()
    total = 0.0
    for i in range(6):
        for k in range(3):
            t, p = float(batch["label"][i, k]), 1 / (1 + np.exp(-logits[i, k]))
            t = t * (1 - smoothing) + smoothing / 3
            total -= (weights or (1, 1, 1))[k] * (t * np.log(p) + (1 - t) * np.log(1 - p))
    assert method(batch, PROGRESS)["loss"].item() == pytest.approx(total / 18, rel=1e-5)


def test_targets_are_mixed_in_the_shares_of_the_images():
    method, batch = method_of(mixup=1.0, cutmix=0, smoothing=0), batch_of()
    x, y = batch["views"][0], batch["label"].float()
    images, targets = method.mix(x, batch["label"], batch["seeds"])
    for first, second in ((0, 1), (2, 3), (4, 5)):
        share = ((images[first] - x[second]) / (x[first] - x[second])).median()
        assert 0 < share < 1
        torch.testing.assert_close(targets[first], share * y[first] + (1 - share) * y[second])
        torch.testing.assert_close(targets[second], share * y[second] + (1 - share) * y[first])
    torch.testing.assert_close(method.mix(x[2:4], batch["label"][2:4], [2, 3])[1], targets[2:4])


def test_a_run_learns_and_its_export_answers_with_sets(data, tmp_path, capsys):
    out = tmp_path / "run"
    main(arguments(data, out, "--train.steps=60", "--optim.lr-per-256-images=3e-2", "--method.balance",
                   "--method.smoothing=0"))  # fmt: skip
    said = capsys.readouterr().out
    assert "by chance the mean average precision would be 0.500" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["map"] > 0.9
    assert f"mean average precision {summary['map']:.3f}, by chance 0.500" in said
    rows = json.loads((out / "classes.json").read_text())
    assert [(row["class"], row["images"]) for row in rows] == [(name, 8) for name in NAMES]
    assert np.mean([row["ap"] for row in rows]) == pytest.approx(summary["map"])
    assert json.loads((out / "export" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert load(out / "export")(torch.randn(2, 3, 16, 16)).shape == (2, 3)

    truth = {row["image"]: row["labels"] for row in table(data["val"] / "labels.csv")}
    for name, more in (("plain", []), ("tta", ["--tta"])):
        cli.main(["predict", str(out / "export"), str(data["val"]), f"--out={tmp_path / name}", "--device=cpu", *more])
        found = table(tmp_path / name / "predictions.csv")
        assert {row["image"] for row in found} == truth.keys()
        right = [set(row["labels"].split("|")) == set(truth[row["image"]].split("|")) for row in found]
        assert np.mean(right) > 0.7
        for row in found:
            shares = [float(share) for share in row["probabilities"].split("|") if share]
            assert shares == sorted(shares, reverse=True)
            assert all(0.5 <= share <= 1 for share in shares)
            assert len(shares) == len([name for name in row["labels"].split("|") if name])


def test_mixed_batches_learn_too(data, tmp_path):
    main(arguments(data, tmp_path / "run", "--method.mixup=0.8", "--method.cutmix=1.0"))
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_val_may_lack_classes_and_is_matched_by_name(data, tmp_path):
    val = write(tmp_path / "val", 2, seed=1, names=("green", "red"))
    main(arguments(data | {"val": val}, tmp_path / "run", "--train.steps=3"))
    rows = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert [(row["class"], row["images"]) for row in rows] == [("blue", 0), ("green", 4), ("red", 4)]


def refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_does_not_fit_is_one_line(data, tmp_path, capsys):
    folders = tmp_path / "folders"
    for name in NAMES:
        (folders / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(folders / name / "0.png")
    run = tmp_path / "run"
    error = refused(arguments(data | {"val": folders}, run), capsys)
    assert f"--val {folders}: says no sets of classes, as {data['train']} does" in error
    error = refused(arguments({"train": folders, "val": folders}, run, "--method.multi-label"), capsys)
    assert f"method.multi_label = True: --data {folders} says one class for each image" in error
    few = write(tmp_path / "few", 1, seed=0, names=("green", "red"))
    error = refused(arguments({"train": few, "val": data["val"]}, run), capsys)
    assert f"--val {data['val']}: other classes than {few}: has blue" in error
    none = write(tmp_path / "none", 1, seed=0, names=())
    error = refused(arguments({"train": none, "val": data["val"]}, run), capsys)
    assert "no image has any class: nothing to tell apart" in error
    error = refused(arguments(data, run, "--data.images-per-class=3"), capsys)
    assert "have several classes each" in error
