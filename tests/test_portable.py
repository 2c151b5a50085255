import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ssl_global import cli, portable
from ssl_global.cli import main
from ssl_global.encoders.encoder import Encoder
from ssl_global.encoders.pretrained import Pretrained, PretrainedConfig
from ssl_global.errors import UserError
from ssl_global.export import load, publish
from ssl_global.finetuning.segmenter import Segmenter, SegmenterSpec
from ssl_global.portable import write
from ssl_global.recipe import Data

SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
SWIN = {"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 2], "window_size": 4}


def exported(encoder: Encoder, folder: Path) -> Path:
    """Every tensor moved from where initialisation puts it: closed gates and zero heads would hide what is left out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return publish(encoder, folder, data=Data(), card=lambda model, num_tensors: "")


def backbone(name: str, *, attention: tuple[str, ...] = (), **model_args: object) -> Pretrained:
    return Pretrained(
        PretrainedConfig(name=name, model_args=json.dumps(model_args), attention=attention), pixels=32, channels=3
    )


def answers(form: str, file: Path, images: Tensor) -> Tensor:
    if form == "pt2":
        return torch.export.load(file).module()(images)
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    (asked,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {asked.name: images.numpy()})[0])


def configuration(form: str, file: Path) -> str:
    if form == "onnx":
        return {each.key: each.value for each in pytest.importorskip("onnx").load(file).metadata_props}["config.json"]
    extra = {"config.json": ""}
    torch.export.load(file, extra_files=extra)
    return extra["config.json"]


def attentive_classifier() -> Encoder:
    encoder = backbone("resnet10t", attention=("layer3=criss_cross",))
    encoder.tell_apart(("cat", "dog"))
    return encoder


def segmenter() -> Encoder:
    """Of a global-token Swin, which is traced for one size unless more is asked for."""
    spec = SegmenterSpec(
        architecture="global_swin_tiny_patch4_window7_224", model_args={"in_chans": 3, "img_size": 32, **SWIN},
        classes=("sky", "sea", "sand"), channels=3, pixels=32, head="linear", auxiliary=False,
    )  # fmt: skip
    return Segmenter(spec)


CASES = {
    "a ViT as pt2": ("pt2", lambda: backbone("vit_tiny_patch16_224", dynamic_img_size=True, **SMALL), None, True),
    "a ViT as onnx": ("onnx", lambda: backbone("vit_tiny_patch16_224", dynamic_img_size=True, **SMALL), None, True),
    "a classifier with attention as onnx": ("onnx", attentive_classifier, "one", False),
    "a segmenter as pt2": ("pt2", segmenter, None, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_says_what_the_model_says(case, tmp_path):
    form, build, sizes, any_size = CASES[case]
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    folder = exported(build(), tmp_path / "export")
    written = write(folder, tmp_path / f"model.{form}", form=form, sizes=sizes)
    assert written.any_size is any_size
    model = load(folder)
    for size in [(5, 3, 32, 32), (1, 3, 32, 32)] + [(2, 3, 40, 72)] * any_size:
        images = torch.randn(size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.allclose(answers(form, written.file, images), model(images), atol=1e-5), size
    assert {path.name for path in tmp_path.iterdir()} == {"export", f"model.{form}"}
    assert json.loads(configuration(form, written.file)) == json.loads((folder / "config.json").read_text())


class Remembers(nn.Module):
    """What it does depends on a side, too little to be seen in a comparison: a trace has one side's for all."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * (2.0 if images.shape[2] <= 8 else 2.00001)


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.fixture
def of(tmp_path, monkeypatch):
    """An export's folder of any module, 3 x 8 x 8 in."""

    def put(model: nn.Module) -> Path:
        (tmp_path / "export").mkdir()
        (tmp_path / "export" / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 8, 8]}}))
        monkeypatch.setattr(portable, "load", lambda folder: model.eval())
        return tmp_path / "export"

    return put


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_a_size_that_the_trace_has_fixed_is_said(of, form, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    folder, file = of(Remembers()), tmp_path / f"model.{form}"
    with pytest.raises(UserError, match=f"cannot be made {form}: Guard failed"):
        write(folder, file, form=form, sizes="any")
    assert not file.exists()
    written = write(folder, file, form=form)
    assert not written.any_size
    assert "8 x 8 only (tracing others: Guard failed" in str(written)


def test_a_file_that_says_something_else_is_not_written(of, tmp_path, monkeypatch):
    folder, file = of(Plain()), tmp_path / "model.pt2"
    file.write_text("the one before")
    honest = portable.pt2_says
    monkeypatch.setattr(portable, "pt2_says", lambda new: lambda images: honest(new)(images) * 1.001)
    with pytest.raises(UserError, match=r"says something else than the model, by 0\.0"):
        write(folder, file, form="pt2")
    assert file.read_text() == "the one before"
    assert {path.name for path in tmp_path.iterdir()} == {"export", "model.pt2"}
    monkeypatch.setattr(portable, "pt2_says", honest)
    assert write(folder, file, form="pt2").difference < 1e-6
    assert file.read_bytes() != b"the one before"


def test_the_command(of, capsys, monkeypatch, tmp_path):
    """An export's file is in it; a run's export is written first, by the road of `export RUN`."""
    folder = of(Plain())
    (folder / "model.safetensors").touch()
    main(["export", str(folder), "--format", "pt2"])
    said = "model.pt2: any number of images of 3 channels, 8 x 8 and other sizes (16 x 24 was tried); at most "
    assert f"{folder}/{said}" in capsys.readouterr().out
    asked = []
    monkeypatch.setattr(cli, "export_run", lambda *words: asked.append(words) or folder)
    main(["export", "runs/mine", "--format", "pt2", "--what", "student", "--out", str(tmp_path / "model.pt2")])
    assert asked == [(Path("runs/mine"), "student", None)]
    assert f"{tmp_path}/{said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["EXPORT"], "an export already; --format onnx or pt2 makes a file of it"),
        (["EXPORT", "--format", "pt2", "--out", "x.onnx"], "the name of a .pt2 file would be right"),
        (["EXPORT", "--format", "pt2", "--what", "teacher"], "--what teacher chooses one of a run's encoders"),
        (["RUN", "--sizes", "one"], "--sizes one: of an .onnx or .pt2; give --format too"),
        (["EXPORT", "--format", "onnx"], "--format onnx: needs onnx_of_nobody: pip install 'ssl_global[onnx]'"),
        (["EXPORT", "--format", "pt2"], "cannot be loaded"),
    ],
)
def test_what_is_wrong_is_one_line(options, said, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    monkeypatch.setattr(portable, "NEEDED", ("onnx_of_nobody",))
    with pytest.raises(SystemExit) as stopped:
        main(["export", *(str(folder) if word == "EXPORT" else word for word in options)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert error.count("\n") == 1
