"""`ssl-global explain` on runs, exports and timm's models: which sections there are, and that every picture is one."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from recipes_under_test import load_recipe

from ssl_global.cli import explained_run, main
from ssl_global.errors import UserError
from ssl_global.explain.subject import Subject
from ssl_global.export import export
from ssl_global.finetune import main as finetune
from ssl_global.finetuning.segmenter import Segmenter, SegmenterSpec


class Page(HTMLParser):
    """The titles of its sections, its text, and its pictures."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.titles, self.pictures, self.text, self.inside = [], [], "", ""
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        if tag == "img":
            head, _, data = dict(attrs)["src"].partition(",")
            assert head.startswith("data:image/")
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                picture.load()
                self.pictures.append((dict(attrs)["alt"], picture.size))

    def handle_data(self, data):
        self.text += data
        if self.inside == "h2" and data.strip():
            self.titles.append(data)


def page(tmp_path, *words) -> Page:
    main(["explain", *map(str, words), "--out", str(tmp_path / "report"), "--show", "2"])
    return Page(tmp_path / "report" / "index.html")


ALWAYS = ["Where it looks", "What it sees alike", "Which images it takes for alike", "Cost"]


def test_an_mae_run(run, photographs, tmp_path):
    out = run("mae", tmp_path / "run", f"--val={photographs}")
    found = page(tmp_path, out, photographs)
    assert {*ALWAYS, "What it rebuilds", "Result", "Training", "Recipe"} <= set(found.titles)
    shown = [alt for alt, _ in found.pictures]
    assert "As it was trained" in shown
    assert "With 90% of the patches hidden" in shown
    assert "All of them, by their classes" in shown
    assert "mask_ratio" in found.text
    assert len(shown) >= 9


def test_an_export_of_a_classifier_with_attention(photographs, tmp_path):
    words = ["--recipe=finetune:demo", f"--data={photographs}", f"--val={photographs}", "--train.epochs=None",
             "--train.steps=2", "--optim.warmup-epochs=0", "--attention", "blocks.1=se", "--device=cpu",
             f"--out={tmp_path / 'tuned'}", "--log-with"]  # fmt: skip
    finetune(words)
    AcceleratorState._reset_state(True)
    found = page(tmp_path, tmp_path / "tuned" / "export", photographs)
    assert {*ALWAYS, "What speaks for its answer", "What its attention modules do"} <= set(found.titles)
    assert "blocks.1" in found.text
    assert "Grad-CAM of the likeliest class" in [alt for alt, _ in found.pictures]


def test_a_model_without_attention_says_why(photographs, tmp_path):
    found = page(tmp_path, "test_resnet", photographs, "--pixels", "64")
    assert "What the last layer looks at, image by image: " in found.text
    assert [alt for alt, _ in found.pictures if "looks at" in alt] == []
    assert "Patch features as colours" in [alt for alt, _ in found.pictures]


def test_a_segmenter_gets_a_page(tmp_path, photographs):
    spec = SegmenterSpec(
        architecture="test_resnet", model_args={"in_chans": 3}, classes=("sky", "ground"), channels=3, pixels=64,
        head="fcn", auxiliary=False,
    )  # fmt: skip
    recipe, model = load_recipe("finetune", "demo"), Segmenter(spec).eval()
    export(model, tmp_path / "export", recipe=recipe, summary={}, what="model")
    found = page(tmp_path, tmp_path / "export", photographs)
    assert "None: Network: says nothing of a whole image." in found.text
    assert {*ALWAYS} <= set(found.titles)
    of_run = Subject(name="run", model=model, data=recipe.data, pixels=64, method=torch.nn.Identity())
    with pytest.raises(UserError, match=r"^Network: says nothing of a whole image$"):
        of_run.summaries(torch.zeros(1, 3, 64, 64))


def test_a_run_is_looked_at_where_it_is_wanted(run, photographs, tmp_path):
    out = run("mae", tmp_path / "run", "--eval.every=100")
    found = explained_run(out, None, device=torch.device("meta"))
    assert {tensor.device.type for tensor in found.method.state_dict().values()} == {"meta"}
    assert found.model is found.method.encoder


@pytest.mark.parametrize(
    "content", ["[]", '{"architecture": 3}', '{"architecture": "test_vit", "model_args": [1]}', "{"]
)
def test_a_broken_export_is_one_line(content, tmp_path, photographs, capsys):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text(content)
    (tmp_path / "export" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(SystemExit) as stopped:
        main(["explain", str(tmp_path / "export"), str(photographs), "--out", str(tmp_path / "report")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"ssl-global: {tmp_path / 'export'}: cannot be loaded: " in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("show", ["attention", "colours"])
def test_a_film_has_a_picture_beside_each_frame(show, tmp_path, capsys):
    for number in range(3):
        (tmp_path / "frames").mkdir(exist_ok=True)
        Image.linear_gradient("L").rotate(40 * number).resize((64, 48)).save(tmp_path / "frames" / f"{number}.png")
    out = tmp_path / "film.gif"
    main(["film", "test_vit", str(tmp_path / "frames"), str(out), "--show", show, "--pixels", "160"])
    assert f"{out}: 3 frames" in capsys.readouterr().out
    with Image.open(out) as film:
        assert (film.n_frames, film.size) == (3, (128, 48))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vit_tiny_patch16_224", "{photos}", "--pixels", "77"], "--pixels 77: the backbone does not take it"),
        (["test_vit", "{photos}", "--show", "0"], "--show 0: at least 1"),
        (["test_vit", "{photos}", "--what", "teacher"], "--what teacher chooses one of a run's encoders"),
        (["{photos}", "{photos}"], "no checkpoint there; a run's --out has a folder"),
        (["test_vot", "{photos}"], "test_vot: no such folder, and no model of timm; the nearest are"),
    ],
)
def test_what_is_wrong_is_one_line(words, message, photographs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *(word.format(photos=photographs) for word in words), "--out", str(tmp_path / "report")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_films_that_cannot_be_are_one_line(tmp_path, photographs, capsys):
    for words, message in (
        (["test_vit", str(photographs), str(tmp_path / "film.avi")], "an .mp4 or a .gif would be right"),
        (["vit_tiny_patch16_224", str(photographs), str(tmp_path / "film.gif")], "the backbone does not take them: "),
        (["test_resnet", str(photographs), str(tmp_path / "film.gif"), "--show", "attention"], "attention"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["film", *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
