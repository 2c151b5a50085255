"""What a fine-tuned model says of many images: as the model itself says, each once, whatever stops it in between."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_under_test import load_recipe

from ssl_global import cli
from ssl_global.data.decode import decode
from ssl_global.data.sample import photograph
from ssl_global.data.views import normalise, plain_view
from ssl_global.encoders.pretrained import PretrainedConfig
from ssl_global.encoders.vit import Vit, VitConfig
from ssl_global.export import export, load
from ssl_global.recipe import Data

CLASSES = ("cat", "dog, or wolf", "moon")
SMALL_VIT = '{"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "dynamic_img_size": true}'


def exported(function, folder, **method):
    recipe = load_recipe("finetune", function)
    encoder = PretrainedConfig(name="vit_tiny_patch16_224", model_args=SMALL_VIT)
    recipe = replace(recipe, encoder=encoder, method=replace(recipe.method, classes=CLASSES, **method))
    torch.manual_seed(0)
    built = recipe.method.build(recipe).model
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return export(built, folder, recipe=recipe, summary={}, what="model")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return exported("demo", tmp_path_factory.mktemp("classifier") / "export")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Path:
    return exported("segment_demo", tmp_path_factory.mktemp("segmenter") / "export", width=8)


def test_two_models_answers_are_not_mixed(classifier, images, tmp_path, capsys):
    words = ["predict", str(classifier), str(images), "--out", str(tmp_path / "out")]
    cli.main(words)
    cli.main(words)
    before = (tmp_path / "out" / "predictions.csv").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--tta"])
    assert stopped.value.code == 2
    assert "holds what another model says, or this one with another --tta" in capsys.readouterr().err
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == before


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Nine crops of several sizes, and one that is no image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "a").mkdir()
    image = photograph("coffee.png")
    for number in range(9):
        image.crop((20 * number, 10, 20 * number + 90 + number, 90)).save(folder / "a" / f"{number}.png")
    (folder / "a" / "broken.png").write_text("no image")
    return folder


def rows(out: Path) -> list[list[str]]:
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.reader(file))


def predict(*words):
    cli.main(["predict", *map(str, words), "--device", "cpu"])


def test_a_table_of_classes(classifier, images, tmp_path, capsys):
    predict(classifier, images, "--out", tmp_path / "out", "--batch", "4")
    said = capsys.readouterr().out
    assert "9 written now, 0 were there" in said
    assert "cannot be read: a/broken.png" in said
    head, *found = rows(tmp_path / "out")
    assert head[:5] == ["image", "class", "probability", "class_2", "p_2"]
    assert [row[0] for row in found] == [f"a/{number}.png" for number in range(9)]
    model, data = load(classifier), Data()
    for row in found:
        image = plain_view(decode((images / row[0]).read_bytes(), 3), 32)
        with torch.no_grad():
            p = model(normalise(image[None], *data.normalisation))[0].softmax(0)
        assert row[1] == CLASSES[p.argmax()]
        assert float(row[2]) == pytest.approx(p.max().item(), abs=1e-4)
        assert sum(map(float, row[2::2])) == pytest.approx(1, abs=1e-3)


def test_it_goes_on_behind_what_is_there(classifier, images, tmp_path, capsys):
    out = tmp_path / "out"
    predict(classifier, images, "--out", out)
    whole = (out / "predictions.csv").read_text()
    lines = whole.splitlines(keepends=True)
    (out / "predictions.csv").write_text("".join(lines[:4]) + lines[4][:7])  # stopped within a line
    capsys.readouterr()
    predict(classifier, images, "--out", out)
    assert "6 written now, 3 were there" in capsys.readouterr().out
    assert (out / "predictions.csv").read_text() == whole


def test_masks_and_overlays(segmenter, images, tmp_path, capsys):
    out = tmp_path / "out"
    predict(segmenter, images, "--out", out)
    assert "9 written now, 0 were there" in capsys.readouterr().out
    for number in range(9):
        with Image.open(images / "a" / f"{number}.png") as image, Image.open(out / "masks" / f"a_{number}.png") as mask:
            assert mask.size == image.size
            assert mask.mode == "P"
            assert set(np.unique(np.array(mask))) <= {0, 1, 2}
            with Image.open(out / "overlays" / f"a_{number}.jpg") as overlay:
                assert overlay.size == image.size
    (out / "masks" / "a_3.png").unlink()
    predict(segmenter, images, "--out", out)
    assert "1 written now, 8 were there" in capsys.readouterr().out
    assert not list(out.rglob(".*"))


def test_two_images_for_one_file_are_refused(segmenter, images, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    image = (images / "a" / "0.png").read_bytes()
    for name in ("7.png", "7.bmp"):
        (tmp_path / "images" / name).write_bytes(image)
    with pytest.raises(SystemExit):
        predict(segmenter, tmp_path / "images", "--out", tmp_path / "out")
    assert "two images would be 7.png" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_mirrored_too(kind, images, tmp_path, request):
    predict(request.getfixturevalue(kind), images, "--out", tmp_path / "out", "--tta")
    assert any((tmp_path / "out").iterdir())


def test_what_cannot_predict_is_one_line(images, tmp_path, capsys):
    encoder = Vit(VitConfig(patch=8, width=48, depth=2, heads=3), pixels=32, channels=3)
    folder = export(encoder, tmp_path / "export", recipe=load_recipe("dino", "demo"), summary={}, what="teacher")
    for model, message in (
        (folder, "a backbone without classes; fine-tune it first"),
        (tmp_path, "no export of a fine-tuned model"),
    ):
        with pytest.raises(SystemExit) as stopped:
            predict(model, images, "--out", tmp_path / "out")
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": "9"},
        {"num_classes": 10**12, "label_names": None},
        {"label_names": ["cat"]},
        {"pretrained_cfg": None},
        {"pretrained_cfg": {"input_size": [3, "32", 32], "mean": [0, 0, 0], "std": [1, 1, 1]}},
        {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0], "std": [1]}},
        {"model_args": 3},
        {"attention": {"layer2": 3}},
    ],
)
def test_a_strangers_config_is_one_line(classifier, images, tmp_path, capsys, change):
    export_of(classifier, tmp_path / "export", change, (classifier / "model.safetensors").read_bytes())
    refused(tmp_path / "export", images, tmp_path / "out", capsys)


def test_broken_weights_are_one_line(classifier, images, tmp_path, capsys):
    export_of(classifier, tmp_path / "export", {"attention": {"blocks.1": ["se", {}]}}, b"x")
    assert "cannot be loaded" in refused(tmp_path / "export", images, tmp_path / "out", capsys)


def export_of(classifier, folder, change, weights):
    folder.mkdir()
    config = json.loads((classifier / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    (folder / "model.safetensors").write_bytes(weights)


def refused(folder, images, out, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        predict(folder, images, "--out", out)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ssl-global: {folder}: ")
    return line


def test_names_may_be_anything(classifier, images, tmp_path, capsys):
    """Lines, quotes, separators that are no line feeds, bytes that are no UTF-8: each image has its line once, and a
    table that was cut off within a name goes on from the last whole line."""
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    names = [b"1 two\nlines.png", b'2 "quoted"\n.png', "3 \u2028.png".encode(), b"4 \xff.png", b"5,6.png"]
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes((images / "a" / "0.png").read_bytes())
    predict(classifier, folder, "--out", out)
    assert "5 written now, 0 were there" in capsys.readouterr().out
    whole = (out / "predictions.csv").read_bytes()
    with (out / "predictions.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [os.fsencode(row[0]) for row in list(csv.reader(file))[1:]] == names
    for end in (len(whole), whole.index(b"two\n") + 4, whole.index(b'"quoted') + 3, whole.index(b"quoted") + 10):
        (out / "predictions.csv").write_bytes(whole[:end])
        predict(classifier, folder, "--out", out)
        assert (out / "predictions.csv").read_bytes() == whole, end
