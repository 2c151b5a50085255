"""Grad-CAM: equal to the package's own where it is at home, and to its formula by hand everywhere."""

import json
import sys

import pytest
import timm
import torch
from pytorch_grad_cam import GradCAM as Theirs
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from safetensors.torch import save_file
from torch import nn

import ssl_global  # noqa: F401 - registers our models
from ssl_global.attention.attach import attach
from ssl_global.errors import UserError
from ssl_global.explain.gradcam import class_names, grad_cam, number_of
from ssl_global.export import load

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "dynamic_img_size": True}
SWIN = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": (1, 1, 2), "num_heads": (1, 2, 4), "window_size": 4}


def made(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    with torch.no_grad():  # heads that begin near 0 would say nearly the same of everything
        for parameter in model.get_classifier().parameters():
            nn.init.normal_(parameter)
    return model


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def by_hand(model, x, module, classes, to_map):
    """The formula, in float64 and without hooks on gradients: (B, rows, cols)."""
    model, x = model.double(), x.double()
    kept = []
    hook = model.get_submodule(module).register_forward_hook(lambda _m, _i, output: kept.append(output))
    logits = model(x)
    hook.remove()
    maps = []
    for b, number in enumerate(classes):
        gradient = torch.autograd.grad(logits[b, number], kept[0], retain_graph=True)[0]
        features, slope = to_map(kept[0])[b], to_map(gradient)[b]  # (rows, cols, C)
        cam = torch.zeros(features.shape[:2], dtype=torch.float64)
        for channel in range(features.shape[2]):
            cam += slope[..., channel].mean() * features[..., channel].detach()
        cam = cam.relu()
        maps.append((cam - cam.min()) / (cam.max() - cam.min()))
    return torch.stack(maps).float()


def test_it_is_the_packages_own_on_a_resnet():
    model, x = made("resnet18"), images(96, 96)
    classes = model(x).argmax(1).tolist()  # of which the maps are not all 0
    found = grad_cam(model, x, classes)
    plain = Theirs(model, [model.layer4[-1]])
    expected = torch.from_numpy(plain(x, [ClassifierOutputTarget(number) for number in classes]))
    assert expected.amax((1, 2)).min() > 0.99
    whole = found.of_size((96, 96))
    low, high = whole.amin((1, 2), keepdim=True), whole.amax((1, 2), keepdim=True)
    torch.testing.assert_close((whole - low) / (high - low), expected, atol=1e-4, rtol=0)  # it scales once more
    assert found.layer == "layer4"
    assert found.maps.shape == (2, 3, 3)


def tokens(num_prefix, rows, cols):
    return lambda x: x[:, num_prefix:].unflatten(1, (rows, cols))


@pytest.mark.parametrize(
    ("name", "options", "size", "module", "to_map"),
    [
        ("vit_tiny_patch16_224", VIT, (32, 48), "blocks.2.norm1", tokens(1, 4, 6)),
        ("vit_tiny_patch16_224", VIT | {"reg_tokens": 3}, (32, 32), "blocks.2.norm1", tokens(4, 4, 4)),
        (
            "vit_tiny_patch16_224",
            VIT | {"class_token": False, "global_pool": "avg"},
            (40, 24),
            "blocks.2.norm1",
            tokens(0, 5, 3),
        ),
        ("swin_tiny_patch4_window7_224", SWIN, (64, 64), "layers.2", lambda x: x),
        ("global_swin_tiny_patch4_window7_224", SWIN, (64, 96), "layers.2.blocks.1", lambda x: x),
        (
            "global_swin_tiny_patch4_window7_224",
            SWIN | {"global_pool": "token"},
            (64, 64),
            "layers.2.blocks.1",
            lambda x: x,
        ),
        ("convnext_atto", {}, (64, 96), "stages.3", lambda x: x.permute(0, 2, 3, 1)),
        ("resnet18", {}, (64, 96), "layer4", lambda x: x.permute(0, 2, 3, 1)),
    ],
)
def test_it_is_its_formula_for_each_family(name, options, size, module, to_map):
    model, x = made(name, **options), images(*size)
    classes = model(x).argmax(1).tolist()
    found = grad_cam(model, x, classes)
    assert found.layer == module
    torch.testing.assert_close(found.maps, by_hand(model, x, module, classes, to_map), atol=1e-4, rtol=0)
    assert found.classes.tolist() == classes
    assert found.maps.max() == 1


def test_an_in_place_relu_behind_the_layer_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    x = images(20, 20)
    found = grad_cam(model, x, 2, layer="0")
    plain = nn.Sequential(model[0], nn.ReLU(), *model[2:])
    torch.testing.assert_close(
        found.maps, by_hand(plain, x, "0", [2, 2], lambda x: x.permute(0, 2, 3, 1)), atol=1e-4, rtol=0
    )


def test_an_attached_module_is_part_of_its_layer():
    model, x = made("resnet18"), images(64, 64)
    attached = attach(model, {"layer4": "se"})
    for parameter in attached.places["layer4"].attention.gate_parameters():
        nn.init.normal_(parameter)
    classes = model(x).argmax(1).tolist()
    found, module = grad_cam(model, x, classes), "layer4"
    expected = by_hand(model, x, module, classes, lambda x: x.permute(0, 2, 3, 1))
    torch.testing.assert_close(found.maps, expected, atol=1e-4, rtol=0)
    attached.detach()
    assert (grad_cam(model.float(), x, classes).maps - expected).abs().max() > 0.01


def test_without_a_class_it_is_the_most_likely_one():
    model, x = made("resnet18"), images(64, 64)
    found = grad_cam(model, x)
    assert torch.equal(found.classes, model(x).argmax(1))
    torch.testing.assert_close(found.maps, grad_cam(model, x, found.classes.tolist()).maps)


# -------------------------------------------------------------------------------------------- the model stays as it was


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was():
    model, x = made("resnet18"), images(64, 64)
    model.train()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grad_cam(model, x, 0)
    assert model.training
    assert not model.layer1.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "fc.weight")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks_of(model) == 0


def test_hooks_are_gone_after_an_exception():
    model, x = made("resnet18"), images(64, 64)
    calls = []

    def fails(_module, _inputs, _output):
        calls.append(1)
        if len(calls) > 2:  # the first looks are for the layout and for the classes
            raise RuntimeError("out of memory")

    hook = model.fc.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory") as told:
        grad_cam(model, x, 0)
    assert len(calls) == 3
    hook.remove()
    # While the error is kept, so is the package's object, which would take its hooks away when it is dropped.
    assert told.value.__traceback__ is not None
    assert hooks_of(model) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------------------- classes


def test_a_class_by_the_name_that_an_export_keeps(tmp_path):
    model = made("vit_tiny_patch16_224", **VIT)
    folder = tmp_path / "export"
    folder.mkdir()
    names = ["cat", "coffee", "moon", "page", "rocket"]
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "num_features": 48, "model_args": VIT}
    config |= {"label_names": names, "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 5}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    loaded, x = load(folder), images(32, 32)
    assert class_names(loaded) == class_names(folder) == names
    found = grad_cam(loaded, x, "moon")
    assert found.classes.tolist() == [2, 2]
    torch.testing.assert_close(found.maps, grad_cam(model, x, 2).maps)
    with pytest.raises(UserError, match=r"class 'coffe': not one of 5; the nearest are coffee"):
        grad_cam(loaded, x, "coffe")
    with pytest.raises(UserError, match=r"nothing: no export there \(config.json\)"):
        class_names(tmp_path / "nothing")


def test_classes_that_there_are_not():
    with pytest.raises(UserError, match=r"class 5: 0 to 4 would be right"):
        number_of(5, 5, [])
    with pytest.raises(UserError, match=r"class 'cat': this model has no names for its classes; 0 to 4 it has"):
        number_of("cat", 5, [])
    with pytest.raises(UserError, match=r"3 classes for 2 images"):
        grad_cam(made("resnet18"), images(64, 64), [0, 1, 2])


def test_a_backbone_is_no_classifier():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    with pytest.raises(UserError, match=r"VisionTransformer: no classifier, \(B, classes\); finetune.py makes one"):
        grad_cam(model, images(32, 32))
    with pytest.raises(UserError, match="no classifier"):
        grad_cam(nn.Sequential(nn.Conv2d(3, 4, 1)), images(32, 32), layer="0")


# --------------------------------------------------------------------------------------------------------------- layers


def test_behind_a_vits_last_block_nothing_reads_the_patches():
    with pytest.raises(UserError, match=r"layer = blocks.2: the answer does not depend on its patches; an earlier one"):
        grad_cam(made("vit_tiny_patch16_224", **VIT), images(32, 32), layer="blocks.2")


def test_a_layer_that_there_is_not():
    with pytest.raises(UserError, match=r"layer = layer9: layer9: not in this ResNet; its stages are .*layer4"):
        grad_cam(made("resnet18"), images(64, 64), layer="layer9")
    with pytest.raises(UserError, match=r"layer = fc: fc: gives \(1, 5\): no map of the image"):
        grad_cam(made("resnet18"), images(64, 64), layer="fc")
    with pytest.raises(UserError, match=r"layer = None: this model names no stages"):
        grad_cam(nn.Sequential(nn.Conv2d(3, 4, 1)), images(32, 32))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(UserError, match=r"needs the package grad-cam; pip install 'ssl_global\[explain\]'"):
        grad_cam(made("resnet18"), images(64, 64))
