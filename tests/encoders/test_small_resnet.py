"""ResNet-18 for images of 32 pixels: timm's, but for its first layer."""

import timm
import torch

import ssl_global  # noqa: F401 - timm knows it from here on
from ssl_global.attention.attach import attach
from ssl_global.attention.places import four_stages


def test_it_has_as_many_parameters_as_is_published():
    model = timm.create_model("resnet18_small", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # 11.17 M, as for CIFAR everywhere
    plain = timm.create_model("resnet18", num_classes=10)
    assert {k for k, v in model.state_dict().items() if v.shape != plain.state_dict()[k].shape} == {"conv1.weight"}


def test_its_maps_are_four_times_as_fine_as_timms():
    model = timm.create_model("resnet18_small", features_only=True)
    maps = model(torch.randn(1, 3, 32, 32))
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]


def test_modules_go_into_its_blocks_and_behind_its_stages():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_small", num_classes=10, block_args={"attn_layer": "se"}).eval()
    assert hasattr(model.layer1[0].se, "fc1")
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    attach(model, dict.fromkeys(four_stages(model)[:3], "non_local"))
    assert torch.equal(model(images), before)
