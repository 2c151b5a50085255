"""Weights from elsewhere: what is resampled still says the same, every tensor is accounted for, others are refused."""

import argparse
import os
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from recipes_under_test import load_recipe
from safetensors.torch import save_file

from ssl_global.encoders import weights as from_weights
from ssl_global.encoders.global_swin import GlobalSwinConfig, GlobalSwinEncoder
from ssl_global.encoders.vit import Vit, VitConfig
from ssl_global.encoders.weights import Weights, begin, read
from ssl_global.errors import UserError
from ssl_global.export import export

NAME = "vit_tiny_patch16_224"
SIZES = {"patch": 4, "width": 32, "depth": 2, "heads": 2}


def vit(pixels=16, channels=3, **changes) -> Vit:
    torch.manual_seed(0)
    return Vit(VitConfig(name=NAME, **(SIZES | changes)), pixels=pixels, channels=channels).eval()


def theirs(pixels=16, **changes) -> torch.nn.Module:
    """timm's own, with other weights."""
    torch.manual_seed(1)
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model(NAME, img_size=pixels, **(sizes | changes)).eval()


def of(model: torch.nn.Module) -> Weights:
    return Weights("theirs", model.state_dict())


def swin(pixels=32, **changes) -> GlobalSwinEncoder:
    torch.manual_seed(0)
    sizes = {"patch": 2, "width": 16, "depths": (1, 2), "heads": (2, 4), "window": 4, "tokens": 2, "pool": "avg"}
    return GlobalSwinEncoder(GlobalSwinConfig(**(sizes | changes)), pixels=pixels, channels=3).eval()


def plain_swin(pixels=32, window=4) -> torch.nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", patch_size=2, embed_dim=16, depths=(1, 2), num_heads=(2, 4), num_classes=0,
        window_size=window, img_size=pixels,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias_table"):
            torch.nn.init.normal_(parameter)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- fitting


def test_weights_of_the_same_size_say_what_timm_says():
    encoder, model = vit(), theirs(num_classes=5)
    assert begin(encoder, of(model)) == [
        "weights theirs: 30 of 30 tensors loaded",
        "  not used   head.weight, head.bias",
    ]
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder.encode(images).summary, model.forward_head(model.forward_features(images), True))


def test_positions_are_interpolated_and_the_class_tokens_stays():
    encoder, model = vit(pixels=32), theirs()
    lines = begin(encoder, of(model))
    assert "  resampled  pos_embed, (1, 17, 32) to (1, 65, 32)" in lines
    grid = model.pos_embed[:, 1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 64, 32)
    torch.testing.assert_close(encoder.model.pos_embed, torch.cat([model.pos_embed[:, :1], larger], dim=1))


def test_a_larger_patch_says_of_the_larger_image_what_the_patch_said():
    encoder, model = vit(pixels=32, patch=8), theirs()
    lines = begin(encoder, of(model))
    assert "  resampled  patch_embed.proj.weight, (32, 3, 4, 4) to (32, 3, 8, 8)" in lines
    patch = torch.randn(1, 3, 4, 4)
    larger = F.interpolate(patch, 8, mode="bicubic", antialias=True)
    want = F.conv2d(patch, model.patch_embed.proj.weight)
    torch.testing.assert_close(F.conv2d(larger, encoder.model.patch_embed.proj.weight), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("channels", "of_grey"), [(1, 1), (6, 6), (4, None)])
def test_other_channels(channels, of_grey):
    """A grey image embeds as it does with three equal channels."""
    encoder, model = vit(channels=channels), theirs()
    begin(encoder, of(model))
    if of_grey:
        grey = torch.randn(2, 1, 16, 16)
        embeds = [m.patch_embed(grey.expand(-1, n, -1, -1)) for m, n in ((encoder.model, channels), (model, 3))]
        torch.testing.assert_close(embeds[0].flatten(1), embeds[1].flatten(1))
    else:
        assert encoder.model.patch_embed.proj.weight.shape == (32, 4, 4, 4)


@pytest.mark.parametrize("pixels", [16, 32])
def test_registers_that_the_weights_lack_are_new(pixels):
    encoder, model = vit(pixels=pixels, registers=3), theirs()
    own = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    lines = begin(encoder, of(model))
    assert lines[0] == "weights theirs: 30 of 31 tensors loaded"
    assert "  new        reg_token" in lines
    found = encoder.model.state_dict()
    assert torch.equal(found["reg_token"], own["reg_token"])
    assert torch.equal(found["pos_embed"][:, 1:4], own["pos_embed"][:, 1:4])
    assert torch.equal(found["pos_embed"][:, :1], model.pos_embed[:, :1])
    if pixels == 16:
        assert torch.equal(found["pos_embed"][:, 4:], model.pos_embed[:, 1:])


def test_a_class_token_without_a_place_keeps_none():
    encoder, model = vit(), theirs(no_embed_class=True)
    begin(encoder, of(model))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder.encode(images).summary, model(images))


def test_a_norm_behind_the_pooling_is_taken_for_the_one_before_it():
    encoder, model = vit(pool="avg"), theirs(global_pool="avg")
    assert "fc_norm.weight" in model.state_dict()
    torch.nn.init.normal_(model.fc_norm.weight)
    begin(encoder, of(model))
    assert torch.equal(encoder.model.norm.weight, model.fc_norm.weight)


def test_beside_a_plain_swins_weights_new_tokens_only_read():
    encoder, model = swin(), plain_swin()
    lines = begin(encoder, of(model))
    new = len([name for name in encoder.model.state_dict() if encoder.may_be_new(name)])
    every = len(encoder.model.state_dict())
    assert lines[0] == f"weights theirs: {every - new} of {every} tensors loaded"
    assert new > 10
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.encode(images).summary, model(images), rtol=1e-4, atol=1e-5)


def test_its_tokens_come_along_where_there_are_some():
    encoder, before = swin(), swin()
    with torch.no_grad():
        for parameter in before.model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    assert len(begin(encoder, of(before.model))) == 1
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder.encode(images).summary, before.encode(images).summary)


def test_at_larger_images_windows_stay_and_grow_where_the_map_had_been_smaller():
    """A map of 4 x 4 in windows of 4, then one of 2 x 2; at 16 pixels it is 8 x 8 and 4 x 4."""
    small, large = plain_swin(pixels=8), swin(pixels=16)
    table = "layers.{}.blocks.{}.attn.relative_position_bias_table"
    assert [small.get_parameter(table.format(n, 0)).shape[0] for n in (0, 1)] == [49, 9]
    small.get_parameter(table.format(1, 1)).data[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    lines = begin(large, of(small))
    assert any("resampled" in line and table.format(1, 0) in line and "(9, 4) to (49, 4)" in line for line in lines)
    found = large.model.state_dict()
    assert torch.equal(found[table.format(0, 0)], small.get_parameter(table.format(0, 0)))
    # What does not depend on the distance stays so; what stands at distance 0 stays there.
    torch.testing.assert_close(found[table.format(1, 1)], torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(49, 4))
    torch.testing.assert_close(found[table.format(1, 0)][24], small.get_parameter(table.format(1, 0))[4])


# ------------------------------------------------------------------------------------------------------------- reading


class Touch:
    """Unpickled, it would write a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def files(folder):
    """What can be in the place of weights, and what is said of it."""
    tensors = dict(theirs().state_dict())
    save_file(tensors, folder / "whole.safetensors")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in tensors.items()}, "epoch": 3}, folder / "a.pth")
    for whole, part in (("whole.safetensors", "cut.safetensors"), ("a.pth", "cut.pth")):
        data = (folder / whole).read_bytes()
        (folder / part).write_bytes(data[: len(data) // 2])
    torch.save({"model": tensors, "code": Touch(folder / "ran")}, folder / "code.pth")
    torch.save({"epoch": 3}, folder / "empty.pth")
    student = {name: tensor + 1 for name, tensor in tensors.items()}
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)}
    torch.save({"student": student, "teacher": tensors, **beside}, folder / "authors.pth")
    torch.save({"model": student, "model_ema": tensors}, folder / "averaged.pth")
    (folder / "text.pth").write_text("no weights at all")
    for name, model in (
        ("resnet", timm.create_model("test_resnet")),
        ("deeper", theirs(depth=3)), ("shallower", theirs(depth=1)), ("wider", theirs(embed_dim=64)),
    ):  # fmt: skip
        save_file(dict(model.state_dict()), folder / f"{name}.safetensors")
    (folder / "nothing").mkdir()


REFUSED = {
    "cut.safetensors": r"cut\.safetensors: cannot be read, is it whole\? Error while deserializing",
    "cut.pth": r"cut\.pth: cannot be read, is it whole\?",
    "text.pth": "no checkpoint, or a damaged one: not read$",
    "code.pth": r"a pickle that needs code, posix\.mkdir, and is not read",
    "empty.pth": "has no weights, but epoch",
    "resnet.safetensors": r"none of its \d+ tensors \(bn1.* and \d+ more\) is a VisionTransformer's \(cls_token, ",
    "deeper.safetensors": r"has blocks\.2\.attn.* and 9 more, which this VisionTransformer has not: other sizes",
    "shallower.safetensors": r"lacks blocks\.1\.norm1\.weight and 11 more of VisionTransformer",
    "wider.safetensors": r"its cls_token is \(1, 1, 64\) and not \(1, 1, 32\): not of this VisionTransformer",
    "nothing": r"no export there \(config\.json, model\.safetensors\), and no run",
    "gone.pth": "no such folder or file, and no published model",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    files(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line(name, folder):
    encoder = vit()
    before = {key: tensor.clone() for key, tensor in encoder.model.state_dict().items()}
    with pytest.raises(UserError, match=REFUSED[name]) as refused:
        begin(encoder, read(str(folder / name)))
    said = str(refused.value)
    assert said.startswith(f"encoder.weights = {folder / name}: ")
    assert "\n" not in said
    assert len(said) < 500
    assert not (folder / "ran").exists()
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.model.state_dict().items())


@pytest.mark.parametrize("name", ["whole.safetensors", "a.pth", "authors.pth", "averaged.pth"])
def test_files_are_read(name, folder):
    encoder = vit()
    assert begin(encoder, read(str(folder / name)))[0].endswith("30 of 30 tensors loaded")
    assert torch.equal(encoder.model.cls_token, theirs().cls_token)


def test_an_export_is_read_and_of_another_architecture_it_says_which(tmp_path):
    recipe = load_recipe("dino", "demo")
    before = vit()
    folder = export(before, tmp_path / "run" / "export", recipe=recipe, summary={}, what="teacher")
    for name in (folder, folder.parent):
        encoder = vit()
        with torch.no_grad():
            encoder.model.cls_token.zero_()
        assert begin(encoder, read(str(name)))[0] == f"weights {name}: 30 of 30 tensors loaded"
        assert torch.equal(encoder.model.cls_token, before.model.cls_token)
    with pytest.raises(UserError, match=rf"they are of {NAME} \(patch_size 4, embed_dim 32, depth 2, .*as encoder\.\*"):
        begin(vit(depth=1), read(str(folder)))
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is no configuration of timm's"):
        read(str(folder))


def test_timms_names(monkeypatch):
    asked, model = [], theirs()

    def create(name, pretrained=False, **options):
        asked.append((name, pretrained))
        if "augreg" in name:
            raise OSError("Name or service not known\nand more")
        return model

    monkeypatch.setattr(from_weights.timm, "create_model", create)
    with pytest.raises(UserError, match=r"augreg_in21k: cannot be fetched: Name or service not known$"):
        read(f"{NAME}.augreg_in21k")
    with pytest.raises(UserError, match=re.escape(f"{NAME}: a timm name without a tag has no weights; with its .tag")):
        read(NAME)
    assert read("global_swin_tiny_patch4_window7_224.ms_in1k").of == "global_swin_tiny_patch4_window7_224"
    assert asked == [(f"{NAME}.augreg_in21k", True), ("swin_tiny_patch4_window7_224.ms_in1k", True)]
