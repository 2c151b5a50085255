import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import published as p
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import beit, eva, swin_transformer, vision_transformer
from torch import Tensor

from ssl_global.cli import main
from ssl_global.converting import shapes
from ssl_global.converting.convert import convert
from ssl_global.converting.shapes import Asked
from ssl_global.errors import UserError

Says = Callable[[p.State, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    layout: str
    file: dict[str, object]  # as it is saved
    backbone: p.State  # what is in it, by the published names
    says: Says  # what the published model computes
    left_out: str  # exactly the keys that are, as a pattern
    prefix: str = ""  # of the backbone's keys
    entry: str | None = None
    tolerance: float = 2e-5


def of_teacher(draw: p.Random, teacher: p.State, student: p.State) -> dict[str, object]:
    """A training checkpoint as the authors of DINO, iBOT and EsViT save them."""
    return {
        "student": p.under("module.", student),
        "teacher": teacher,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005),
        "dino_loss": {"center": draw(1, 12)},
    }


def in_wrapper(draw: p.Random, backbone: p.State, heads: tuple[str, ...], width: int) -> p.State:
    return p.under("backbone.", backbone) | {k: t for name in heads for k, t in p.dino_head(draw, name, width).items()}


def cases() -> dict[str, Case]:
    draw = p.Random(0)
    made: dict[str, Case] = {}
    state = p.vit(draw)
    decoder = draw.linear("decoder_embed", p.WIDTH, 16) | {"mask_token": draw(1, 1, 16)}
    decoder |= p.under("decoder_", p.block(draw, "blocks.0", 16)) | {"decoder_pos_embed": draw(1, 17, 16)}
    made["mae"] = Case("MAE", {"model": state}, state, p.vit_says, "nothing", entry="model")
    made["mae with its decoder"] = Case(
        "MAE", {"model": state | decoder, "args": argparse.Namespace(mask_ratio=0.75)}, state, p.vit_says,
        "decoder_.*|mask_token", entry="model",
    )  # fmt: skip
    state = p.vit(draw)
    made["dino's backbone"] = Case("a plain ViT (DINO's, DeiT's, timm's)", state, state, p.vit_says, "nothing")
    wrapped = in_wrapper(draw, state, ("head",), p.WIDTH)
    made["dino's checkpoint"] = Case(
        "DINO", of_teacher(draw, wrapped, in_wrapper(draw, p.vit(draw), ("head",), p.WIDTH)), state, p.vit_says,
        r"head\..*", "backbone.", "teacher",
    )  # fmt: skip
    state = p.vit(draw, scale=("gamma_1", "gamma_2"))
    second = {"head.last_layer2.weight_v": draw(12, 8), "backbone.masked_embed": draw(1, p.WIDTH)}
    wrapped = in_wrapper(draw, state, ("head",), p.WIDTH) | second
    made["ibot's checkpoint"] = Case(
        "iBOT", of_teacher(draw, wrapped, wrapped), state, p.vit_says, r"head\..*|backbone.masked_embed", "backbone.",
        "teacher",
    )  # fmt: skip
    state = p.vit(draw, norm="fc_norm")
    made["ibot's backbone"] = Case("iBOT", {"state_dict": state}, state, p.vit_says, "nothing", entry="state_dict")
    state = p.dinov2(draw)
    made["dinov2"] = Case("DINOv2", state, state, p.vit_says, "mask_token")
    state = p.dinov2(draw, registers=3)
    made["dinov2 with registers"] = Case("DINOv2", state, state, p.vit_says, "mask_token")
    state = p.dinov2(draw, gated=True)
    chunked = {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", name): tensor for name, tensor in state.items()}
    made["dinov2's teacher, in chunks"] = Case(
        "DINOv2", {"teacher": in_wrapper(draw, chunked, ("dino_head", "ibot_head"), p.WIDTH)}, state, p.vit_says,
        r"backbone\.mask_token|(dino|ibot)_head\..*", "backbone.", "teacher",
    )  # fmt: skip
    rest = r"mask_token|rope_embed\.periods|local_cls_norm\..*"
    for name, gated in (("dinov3", False), ("dinov3 with gates", True)):
        state = p.dinov3(draw, gated=gated)
        made[name] = Case("DINOv3", state, state, p.dinov3_says, rest)
    state = p.beit(draw, shared=True, norm="norm")
    pretraining = {"mask_token": draw(1, 1, p.WIDTH)} | draw.linear("lm_head", p.WIDTH, 12)
    made["beit, pretrained"] = Case(
        "BEiT", {"model": state | pretraining}, state, p.beit_says,
        r"mask_token|lm_head\..*|.*position_index", entry="model",
    )  # fmt: skip
    state = p.beit(draw, shared=False, norm="fc_norm")
    made["beit, fine-tuned"] = Case(
        "BEiT", {"model": state | draw.linear("head", p.WIDTH, 5)}, state, p.beit_says, r"head\..*|.*position_index",
        entry="model",
    )  # fmt: skip
    state = p.beit(draw, shared=True, norm="norm")
    simmim = {"decoder.0.weight": draw(48, p.WIDTH, 1, 1), "decoder.0.bias": draw(48)}
    made["simmim's vit"] = Case(
        "SimMIM", {"model": p.under("encoder.", state | {"mask_token": draw(1, 1, p.WIDTH)}) | simmim}, state,
        p.beit_says,
        r"encoder\.mask_token|decoder\..*|.*position_index", "encoder.", "model",
    )  # fmt: skip
    state = p.swin(draw)
    mask = {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    made["swin"] = Case(
        "Microsoft's Swin", {"model": state | mask | draw.linear("head", 64, 5)}, state, p.swin_says,
        r"head\..*|.*attn_mask|.*position_index", entry="model",
    )  # fmt: skip
    state = p.swin(draw)
    simmim = {"decoder.0.weight": draw(48, 64, 1, 1), "decoder.0.bias": draw(48)}
    made["simmim's swin"] = Case(
        "SimMIM", {"model": p.under("encoder.", state | mask | {"mask_token": draw(1, 1, 32)}) | simmim}, state,
        p.swin_says,
        r"encoder\.mask_token|decoder\..*|.*position_index|.*attn_mask", "encoder.", "model",
    )  # fmt: skip
    state = p.swin(draw)
    heads = p.dino_head(draw, "head", 64) | p.dino_head(draw, "head_dense", 64)
    made["esvit"] = Case(
        "EsViT", of_teacher(draw, state | heads, state | heads), state, lambda s, x: p.swin_says(s, x, 1e-6),
        r"head(_dense)?\..*|.*position_index", entry="teacher", tolerance=5e-5,
    )  # fmt: skip
    state = p.swin(draw)
    made["ibot's swin"] = Case(
        "iBOT", {"teacher": in_wrapper(draw, state, ("head",), 64)}, state, lambda s, x: p.swin_says(s, x, 1e-6),
        r"head\..*|.*position_index", "backbone.", "teacher", tolerance=5e-5,
    )  # fmt: skip
    return made


CASES = cases()
FILTERS = {
    "VisionTransformer": vision_transformer, "Beit": beit, "Eva": eva, "SwinTransformer": swin_transformer,
}  # fmt: skip


def saved(file: dict[str, object], folder: Path) -> Path:
    torch.save(file, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


@pytest.mark.parametrize("name", CASES)
def test_the_export_computes_what_the_published_model_does_and_every_key_is_accounted_for(name, tmp_path):
    """And has the very tensors that timm's own translation gives, which has none for iBOT's LayerScale."""
    case = CASES[name]
    converted = convert(saved(case.file, tmp_path), tmp_path / "export")
    assert converted.layout.name == case.layout
    assert converted.weights.entry == case.entry
    keys = case.file[case.entry] if case.entry else case.file
    expected = {key for key in keys if re.fullmatch(case.left_out, key)}
    account = json.loads((tmp_path / "export" / "conversion.json").read_text())
    assert set(account["left_out"]) == expected
    assert set(account["taken"]) == set(keys) - expected
    assert account["unknown"] == account["missing"] == []
    images = torch.randn(2, 3, converted.architecture.pixels, converted.architecture.pixels)
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(model(images), case.says(case.backbone, images), atol=case.tolerance, rtol=0)
    if name != "ibot's checkpoint":
        ours = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        timms = FILTERS[type(model).__name__].checkpoint_filter_fn(dict(case.backbone), model)
        assert all(torch.equal(tensor, timms[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("name", CASES)
def test_a_renamed_and_a_missing_key_are_named(name, tmp_path, capsys):
    case = CASES[name]
    keys = dict(case.file[case.entry] if case.entry else case.file)
    part = "layers.1.blocks.1" if "layers.1.blocks.1.norm1.weight" in case.backbone else "blocks.1"
    if name == "dinov2's teacher, in chunks":
        part = "blocks.1.1"
    gone, renamed = f"{case.prefix}{part}.norm1.bias", f"{case.prefix}{part}.attn.proj.weight"
    del keys[gone]
    keys[f"{renamed}s"] = keys.pop(renamed)
    changed = case.file | {case.entry: keys} if case.entry else keys
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(saved(changed, tmp_path)), "--out", str(tmp_path / "export")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    unchunked = part.replace("blocks.1.1", "blocks.1") if "chunks" in name else part
    assert f"lacks 2 of its keys: {unchunked}.norm1.bias, {unchunked}.attn.proj.weight" in said
    assert f"has 1 that no rule knows: {renamed}s" in said
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("dinov3", "blocks.0.ls1.gamma"),
        ("dinov3", "blocks.1.attn.qkv.bias"),
        ("dinov3 with gates", "blocks.1.mlp.w3.bias"),
        ("dinov2's teacher, in chunks", "blocks.1.mlp.w12.bias"),
        ("ibot's checkpoint", "blocks.0.gamma_2"),
        ("swin", "layers.0.downsample.reduction.weight"),
    ],
)
def test_what_timm_calls_otherwise_is_missed_by_its_published_name(name, gone, tmp_path):
    case = CASES[name]
    state = {key: tensor for key, tensor in case.backbone.items() if key != gone}
    file = saved({case.entry: p.under(case.prefix, state)} if case.entry else state, tmp_path)
    with pytest.raises(UserError, match=re.escape(f"lacks 1 of its keys: {gone}")):
        convert(file, tmp_path / "export")


def test_unknown_keys_end_it_unless_they_are_allowed(tmp_path, capsys):
    state = p.vit(p.Random(1)) | {"temperature": torch.ones(1), "blocks.0.extra": torch.ones(2)}
    file, out = saved(state, tmp_path), tmp_path / "export"
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(file), "--out", str(out)])
    assert stopped.value.code == 2
    assert (
        "2 that no rule knows: temperature, blocks.0.extra; --allow-unknown leaves them out" in capsys.readouterr().err
    )
    assert not out.exists()
    main(["convert", str(file), "--out", str(out), "--allow-unknown"])
    assert "unknown    temperature, blocks.0.extra: left out as asked" in capsys.readouterr().out
    assert json.loads((out / "conversion.json").read_text())["unknown"] == ["temperature", "blocks.0.extra"]


def test_what_it_says(tmp_path, capsys):
    case = CASES["dino's checkpoint"]
    file, out = saved(case.file, tmp_path), tmp_path / "export"
    main(["convert", str(file), "--out", str(out), "--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.2"])
    said = capsys.readouterr().out
    assert f"{file}: DINO, entry teacher; --what chooses student" in said
    assert (
        "vit_small_patch16_224: width 128, depth 2, 2 heads (64 wide, which no shape says: --heads), patch 4; " in said
    )
    assert "positions 4 x 4 (16 pixels); no registers; the class token" in said
    num_keys = len(case.backbone)
    assert f"taken      {num_keys} keys" in said
    assert "left out   6, a projection head, of pretraining: head.mlp.0.weight" in said
    assert "images     mean (0.5, 0.4, 0.3), deviation (0.2, 0.2, 0.2): --mean, --std" in said
    assert "left out   4, no weights: optimizer, epoch, args, dino_loss" in said
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{out}", pretrained=True))
    assert tuple(config["mean"]) == (0.5, 0.4, 0.3)
    assert "head.mlp.0.weight | a projection head" in (out / "README.md").read_text()


def test_the_student_can_be_had(tmp_path):
    case = CASES["dino's checkpoint"]
    convert(saved(case.file, tmp_path), tmp_path / "export", what="student")
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert torch.equal(model.cls_token, case.file["student"]["module.backbone.cls_token"])
    with pytest.raises(UserError, match=r"--what ema: .* has student, teacher"):
        convert(saved(case.file, tmp_path), tmp_path / "other", what="ema")


def test_heads_that_no_shape_says(tmp_path):
    state = p.vit(p.Random(2))
    file = saved(state, tmp_path)
    convert(file, tmp_path / "export", asked=Asked(heads=4))
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert model.blocks[0].attn.num_heads == 4
    with pytest.raises(UserError, match="--heads = 3: a divisor of the width, 128"):
        convert(file, tmp_path / "other", asked=Asked(heads=3))


TIMMS = {
    "vit_tiny_patch16_224": {"depth": 1},
    "beit_base_patch16_224": {"depth": 1, "embed_dim": 128, "num_heads": 2, "use_rel_pos_bias": True},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "num_heads": (3, 6), "window_size": 4, "img_size": 32},
    "resnet10t": {},
}


@pytest.mark.parametrize("name", TIMMS)
def test_timms_own_files(name, tmp_path):
    """ViT, BEiT and Swin are known by their names; others by --name. The classifier is left out."""
    model = timm.create_model(name, num_classes=7, **TIMMS[name]).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    converted = convert(
        tmp_path / "model.safetensors", tmp_path / "export", name="resnet10t" if "resnet" in name else None
    )
    assert converted.account.left_out.keys() == {key for key in model.state_dict() if key.startswith(("head.", "fc."))}
    found = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = torch.randn(1, 3, converted.architecture.pixels, converted.architecture.pixels)
    with torch.no_grad():
        assert torch.equal(found(images), model.forward_head(model.forward_features(images), pre_logits=True))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (shapes.vit, ["vit_tiny_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224", "vit_base_patch8_224"]),
        (shapes.vit, ["vit_base_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"]),
        (
            shapes.dinov3,
            ["vit_small_plus_patch16_dinov3", "vit_huge_plus_patch16_dinov3_qkvb", "vit_7b_patch16_dinov3"],
        ),
        (shapes.swin, ["swin_small_patch4_window7_224", "swin_large_patch4_window12_384", "swin_s3_tiny_224"]),
        (shapes.beit, ["beit_base_patch16_384", "beitv2_large_patch16_224"]),
    ],
)
def test_the_published_widths_give_timms_own_shapes_and_heads(build, names):
    for name in names:
        with torch.device("meta"):
            timms = timm.create_model(name, num_classes=0, **({} if name.startswith("swin") else {"depth": 1}))
            found = build(timms.state_dict(), Asked())
            ours = timm.create_model(found.name, num_classes=0, **found.args)
        assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in timms.state_dict().items()}
        assert ours.patch_embed.img_size == (timms.patch_embed.img_size if build is not shapes.dinov3 else (256, 256))
        for one, other in zip(ours.modules(), timms.modules(), strict=True):
            assert getattr(one, "num_heads", None) == getattr(other, "num_heads", None), name


def test_timms_dinov3(tmp_path):
    model = timm.create_model(
        "vit_small_patch16_dinov3_qkvb", num_classes=0, depth=1, embed_dim=128, num_heads=2
    ).eval()
    model.global_pool = "token"
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    converted = convert(tmp_path / "model.safetensors", tmp_path / "export", asked=Asked(pixels=64))
    assert converted.layout.name == "timm's DINOv3"
    found = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))


class Named(dict[str, int]):
    """A setting's class, which only its authors' code has."""


def test_files_that_are_refused(tmp_path):
    state = p.vit(p.Random(3))

    def refused(file: object) -> str:
        torch.save(file, tmp_path / "checkpoint.pth")
        with pytest.raises(UserError) as error:
            convert(tmp_path / "checkpoint.pth", tmp_path / "export")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "a pickle that needs code, test_convert.Named, and is not read" in refused(
        {"model": state, "config": Named()}
    )
    assert "a pickle that needs code, pathlib." in refused({"model": state, "where": Path()})
    assert "has no weights, but epoch" in refused({"epoch": 3})
    assert "holds a list" in refused([1])
    assert "of no layout that is known" in refused({"layer1.weight": torch.ones(2)})
    assert "positions for 13 tokens, which are no square grid" in refused(
        state | {"pos_embed": torch.zeros(1, 13, 128)}
    )
    assert "64 wide, and no shape says" not in refused(state | {"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)})
    wide = state | {"blocks.1.mlp.fc1.weight": torch.zeros(500, 128)}
    assert "has blocks.1.mlp.fc1.weight as (500, 128), where (512, 128) is needed" in refused(wide)
    with_k = p.dinov3(p.Random(4))
    del with_k["blocks.1.attn.qkv.bias_mask"]
    assert "has a bias of k, or none that is finite, in blocks.1.attn.qkv.bias" in refused(with_k)
    other = p.dinov3(p.Random(4))
    other["rope_embed.periods"] = 2 * other["rope_embed.periods"]
    assert "rope_embed.periods that are not DINOv3's" in refused(other)
    (tmp_path / "checkpoint.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"checkpoint\.pth: "):
        convert(tmp_path / "checkpoint.pth", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_older_files_settings_are_read_without_code(tmp_path):
    """As torch wrote before its zip format, with numpy's scalars among the settings."""
    import numpy as np

    settings = argparse.Namespace(lr=np.float64(0.1), epochs=np.int64(3), scale=(0.4, 1.0))
    state = p.vit(p.Random(5))
    torch.save({"model": state, "args": settings}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "old.pth", tmp_path / "export").layout.name == "MAE"


def test_the_export_can_be_fine_tuned_and_judged(tmp_path, capsys):
    from ssl_global.encoders.pretrained import Pretrained, PretrainedConfig, of_backbone

    case = CASES["dinov2 with registers"]
    convert(saved(case.file, tmp_path), tmp_path / "export")
    config = of_backbone(PretrainedConfig(), str(tmp_path / "export"))
    encoder = Pretrained(config, pixels=24, channels=3)
    encoder.begin_from(config.weights)
    assert torch.equal(encoder.model.reg_token, case.backbone["register_tokens"])
    assert encoder.encode(torch.zeros(1, 3, 24, 24)).summary.shape == (1, p.WIDTH)
