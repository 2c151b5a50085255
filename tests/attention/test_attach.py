"""Modules into backbones that are there already: nothing changes until they open, and nothing is left of them after."""

import copy
import json
import pickle

import pytest
import timm
import torch
from recipes_under_test import load_recipe
from tiny_runs import finish, start
from torch import nn

from ssl_global import attention
from ssl_global.attention.attach import Attachment, attach, parse
from ssl_global.attention.layout import ImageSize, grid_of
from ssl_global.attention.places import four_stages, input_size_of, stages

SMALL_SWIN = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 6), "img_size": 64}
SMALL_VIT = {"depth": 6, "embed_dim": 48, "num_heads": 3}


def of(pixels):
    """For images of that side, where the model takes any, but asks for larger ones."""
    return {"pretrained_cfg_overlay": {"input_size": (3, pixels, pixels)}}


# timm's file that a family is in: one of its models, made small where it can be
FAMILIES = {
    "beit": ("beit_base_patch16_224", SMALL_VIT | {"img_size": 96}),
    "cait": ("cait_xxs24_224", {"depth": 4, "img_size": 96}),
    "convnext": ("test_convnext", {}),
    "davit": ("davit_tiny", {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 72, 96), "num_heads": (1, 2, 3, 4)}),
    "densenet": ("densenet121", {"block_config": (2, 2, 2, 2)} | of(96)),
    "edgenext": ("edgenext_xx_small", {"depths": (1, 1, 2, 1)} | of(128)),
    "efficientnet": ("test_efficientnet", {}),
    "eva": ("eva02_tiny_patch14_224", {"depth": 6, "img_size": 98}),
    "focalnet": ("focalnet_tiny_srf", of(64)),
    "gcvit": ("gcvit_xxtiny", of(128)),
    "hiera": ("hiera_tiny_224", {"embed_dim": 24, "stages": (1, 1, 2, 1)}),
    "levit": ("levit_128s", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("maxvit_rmlp_pico_rw_256", {"img_size": 64} | of(64)),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64} | of(64)),
    "pit": ("pit_ti_224", {"img_size": 112} | of(112)),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 2, 1)} | of(96)),
    "regnet": ("regnetx_002", of(96)),
    "resnet": ("test_resnet", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    "twins": (
        "twins_svt_small",
        {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    ),
    "vision_transformer": ("vit_tiny_patch16_224", SMALL_VIT | {"reg_tokens": 4, "img_size": 96}),
    "xcit": ("xcit_nano_12_p8_224", {"depth": 4, "img_size": 96}),
    "global_swin": ("global_swin_tiny_patch4_window7_224", SMALL_SWIN),
}
FORMS = [(family, only) for family in FAMILIES for only in (False, True)]


def backbone(family, *, features_only=False, **more):
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    form = {"features_only": True} if features_only else {"num_classes": 7}
    model = timm.create_model(name, **form, **(options | more)).eval()
    if isinstance(
        getattr(model, "head", None), nn.Module
    ):  # some begin at zero, where nothing would be seen of a change
        for layer in model.head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight)
    return model


def images_for(model, batch=2):
    return torch.randn(batch, *input_size_of(model), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def outputs_of(model, images):
    out = model(images)
    return list(out) if isinstance(out, (list, tuple)) else [out]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def num_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def open_gates(attached, by=0.5):
    with torch.no_grad():
        for one in attached.places.values():
            for gate in one.attention.gate_parameters():
                gate += by


def test_the_walk_finds_the_families():
    known = set(timm.list_modules()) | {"global_swin"}  # ours, which timm lists under no file of its own
    print(f"{len(FAMILIES)} families of timm's {len(known)}: {', '.join(FAMILIES)}")
    assert set(FAMILIES) <= known
    assert len(FAMILIES) >= 12


@pytest.mark.parametrize(("family", "features_only"), FORMS)
def test_any_family_takes_modules_and_gives_them_back(family, features_only):
    model = backbone(family, features_only=features_only)
    images, keys, hooks = images_for(model), list(model.state_dict()), num_hooks(model)
    before = outputs_of(model, images)
    first, second, _ = four_stages(model)[-3:]

    attached = attach(model, {first: "position", second: ("se", {"ratio": 0.25})})
    assert equal(outputs_of(model, images), before)
    assert [key for key in model.state_dict() if "attached" not in key] == keys
    assert attached.gates() == {first: 0.0, second: 0.0}
    assert not model.training

    open_gates(attached)
    opened = outputs_of(model, images)
    assert not equal(opened, before)

    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert equal(outputs_of(twin, images), opened)
    Attachment(twin).detach()
    assert list(twin.state_dict()) == keys
    assert equal(outputs_of(twin, images), before)
    assert equal(outputs_of(model, images), opened)  # whose own are still there

    other = backbone(family, features_only=features_only)
    again = attach(other, json.loads(json.dumps(attached.modules)))
    other.load_state_dict(model.state_dict())
    assert equal(outputs_of(other, images), opened)
    again.detach()
    assert num_hooks(other) == hooks


@pytest.mark.parametrize("family", [f for f in FAMILIES if hasattr(backbone(f), "forward_intermediates")])
def test_a_module_is_given_what_timm_calls_the_features_of_that_stage(family):
    """As a map, rows and columns in their order: timm goes another way from its layout to (B, C, H, W)."""
    model = backbone(family)
    images = images_for(model)
    names = stages(model)
    place = four_stages(model)[-2]
    with torch.no_grad():
        options = {"indices": [names.index(place)], "intermediates_only": True, "output_fmt": "NCHW"}
        (theirs,) = model.forward_intermediates(images, **options)
    attached = attach(model, {place: "se"})
    seen = []
    attached.places[place].attention.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model(images)
    torch.testing.assert_close(seen[0], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("file", timm.list_modules())
def test_every_file_of_timm(file):
    """One model of each; what is refused says so in a line, and leaves the model as it was."""
    name = min(timm.list_models(module=file), key=num_parameters)
    if num_parameters(name) > 200e6:
        pytest.skip(f"{name} is the smallest of {file}")
    model = timm.create_model(name, num_classes=0).eval()
    places = four_stages(model)
    if not places:
        pytest.skip(f"{name} names no stages")
    images = images_for(model, 1)
    before, keys = outputs_of(model, images), list(model.state_dict())
    refused = ""
    try:
        attached = attach(model, {places[-2]: "position"})
    except ValueError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        assert list(model.state_dict()) == keys
        assert equal(outputs_of(model, images), before)
        pytest.skip(f"{name}: {refused}")
    assert equal(outputs_of(model, images), before)
    open_gates(attached)
    assert not equal(outputs_of(model, images), before)
    attached.detach()
    assert equal(outputs_of(model, images), before)


def num_parameters(name):
    with torch.device("meta"):
        try:
            return sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
        except Exception:  # of many kinds: what cannot be made without memory is not the smallest
            return float("inf")


@pytest.mark.parametrize("name", attention.names())
def test_every_module_can_be_attached(name):
    model = backbone("swin_transformer")
    images = images_for(model)
    before = outputs_of(model, images)
    attached = attach(model, {"layers.2": name})
    assert equal(outputs_of(model, images), before)
    model(images).sum().backward()
    assert any(p.grad.any() for p in attached.places["layers.2"].attention.gate_parameters())


@pytest.mark.parametrize("height_width", [(96, 160), (160, 96), (97, 130)])
def test_patches_of_any_image_lie_in_their_rows(height_width):
    name, options = FAMILIES["vision_transformer"]
    model = timm.create_model(name, **options, dynamic_img_size=True, dynamic_img_pad=True)
    attached = attach(model, {"blocks.2": "se"})
    seen = []
    attached.places["blocks.2"].attention.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, *height_width)
    with torch.no_grad():
        theirs = model.forward_intermediates(images, indices=[2], intermediates_only=True)[0]
        model(images)
    torch.testing.assert_close(seen[-1], theirs, rtol=0, atol=0)


def test_grids():
    assert grid_of(6 * 10, ImageSize(96, 160), 16.0) == (6, 10)
    assert grid_of(7 * 11, ImageSize(97, 161), 16.0) == (7, 11)  # filled up
    assert grid_of(6 * 10, ImageSize(97, 161), 16.0) == (6, 10)  # cut off
    assert grid_of(50, ImageSize(96, 160), 16.0) is None


def test_prefix_tokens_are_left_alone():
    model = backbone("vision_transformer")
    tokens = {}
    model.blocks[2].register_forward_hook(lambda _module, _inputs, output: tokens.update(after=output))
    images = images_for(model)
    model(images)
    before = tokens["after"]
    open_gates(attach(model, {"blocks.2": "position"}))
    model(images)
    assert model.num_prefix_tokens == 5
    assert torch.equal(tokens["after"][:, :5], before[:, :5])  # a hook that was there first sees what is attached
    assert not torch.equal(tokens["after"][:, 5:], before[:, 5:])


@pytest.mark.parametrize("recipe_name", ["dino", "dino_swin"])
def test_our_encoders_take_modules(recipe_name):
    recipe = load_recipe(recipe_name, "demo")
    encoder = recipe.encoder.build(recipe).eval()
    images = torch.randn(2, encoder.channels, encoder.pixels, encoder.pixels)
    before = encoder(images).patches
    attached = attach(encoder, {four_stages(encoder)[-1]: "non_local"})
    assert torch.equal(encoder(images).patches, before)
    open_gates(attached)
    assert not torch.equal(encoder(images).patches, before)
    hidden = torch.zeros(2, *encoder(images).grid, dtype=torch.bool)
    hidden[:, 0, 0] = True
    with pytest.raises(ValueError, match=r"non_local at .*hidden"):
        encoder(images, hidden)


@pytest.mark.parametrize(
    ("family", "fewest_blocks"),
    [
        ("resnet", {}),
        ("swin_transformer", {"depths": (1, 1, 1, 1)}),
        ("vision_transformer", {"depth": 4}),
        ("hiera", {"stages": (1, 1, 1, 1)}),
        ("global_swin", {"depths": (1, 1, 1, 1)}),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of what it compiles
def test_compiled_it_computes_the_same(family, fewest_blocks):
    """Whose blocks they are compiled with is timm's affair; what is attached stands between two of them."""
    model = backbone(family, **fewest_blocks)
    attached = attach(model, {four_stages(model)[-2]: "position"})
    open_gates(attached)
    images = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # a break is an error
    torch.testing.assert_close(compiled(images), model(images))
    compiled(images).sum().backward()
    assert all(p.grad is not None for p in attached.parameters())


@pytest.mark.parametrize("family", ["swin_transformer", "vision_transformer"])
def test_recomputed_blocks_give_the_same_gradients(family):
    model = backbone(family)
    attached = attach(model, {four_stages(model)[-2]: "position"})
    open_gates(attached)
    images = images_for(model)
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(0)  # which branches are dropped
        model.train()(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in attached.parameters()])
    assert equal(*gradients)


def test_precision_and_device_are_the_models():
    model = backbone("convnext").to(torch.bfloat16)
    before = model(images_for(model).bfloat16())
    attached = attach(model, {"stages.2": "non_local"})
    assert {p.dtype for p in attached.parameters()} == {torch.bfloat16}
    assert torch.equal(model(images_for(model).bfloat16()), before)


def test_two_processes_learn_what_one_does(tmp_path):
    """DistributedDataParallel: each process half of the images, the same gradients on both and as one process has."""
    script = "tests/attention/attached_in_processes.py"
    code, _, error = finish(start([str(tmp_path)], script=script))
    assert code == 0, error[-3000:]
    one = torch.load(tmp_path / "one.pt")
    for rank in range(2):
        for name, gradient in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(gradient, one[name], msg=lambda text, name=name: f"{name}: {text}")
    assert any("attached" in name and gradient.any() for name, gradient in one.items())


# --------------------------------------------------------------------------------------------------------- the handle


def test_groups_for_an_optimizer_hold_every_parameter_once():
    model = backbone("resnet")
    attached = attach(model, {"layer2": "non_local", "layer3": "cbam", "layer4": ("position", {"start": "paper"})})
    groups = attached.param_groups(lr=1e-3, gate_lr=1e-2)
    held = [p for group in groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, attached.parameters()))
    assert len({id(p) for p in held}) == len(held)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.3)
    gamma = attached.places["layer2"].attention.gamma
    gates = next(group for group in optimizer.param_groups if any(p is gamma for p in group["params"]))
    assert (gates["lr"], gates["weight_decay"]) == (1e-2, 0.0)
    matrices = next(g for g in optimizer.param_groups if g["weight_decay"] == 0.3)
    assert all(p.ndim > 1 for p in matrices["params"])
    rest = {id(p) for p in model.parameters()} - {id(p) for p in held}
    assert {id(p) for p in attached.backbone_parameters()} == rest


def test_a_frozen_backbone_stays_while_the_modules_learn():
    model = backbone("resnet").train()
    model.bn1.weight.requires_grad_(False)  # frozen before, and after
    attached = attach(model, {"layer2": "position"})
    attached.freeze_backbone()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):  # gates, then what is behind them
        optimizer.zero_grad()
        model(images_for(model)).square().sum().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "attached" in name}
    assert attached.gates()["layer2"] > 0
    attached.unfreeze_backbone()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"bn1.weight"}


def test_gates_of_the_published_form():
    model = backbone("resnet")
    attached = attach(model, {"layer2": ("se", {"start": "paper"}), "layer3": ("position", {"start": "paper"})})
    assert attached.gates() == {"layer2": None, "layer3": 0.0}


def test_modules_come_and_go_one_at_a_time():
    model = backbone("resnet")
    images, before = images_for(model), outputs_of(backbone("resnet"), images_for(backbone("resnet")))
    attach(model, {"layer3": "se"})
    both = attach(model, {"layer3.0": "se", "layer4": "gca"})
    assert set(both.places) == {"layer3", "layer3.0", "layer4"}
    open_gates(both)
    both.detach("layer3", "layer4")
    assert list(both.places) == ["layer3.0"]
    assert not equal(outputs_of(model, images), before)
    both.detach()
    assert equal(outputs_of(model, images), before)


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"layer9": "se"}, "layer9: not in this ResNet; its stages are act1, layer1, layer2, layer3, layer4"),
        ({"": "se"}, ": not in this ResNet"),
        ({}, "nothing to attach; the places are act1"),
        (
            {"layer3": "non_locall"},
            "layer3, of 192 channels: attention 'non_locall': there is none; the nearest are non_l",
        ),
        ({"layer3": ("se", {"reduction": 4})}, "layer3, of 192 channels: se: no option 'reduction'; there are ratio"),
        ({"layer3": ("se", {"ratio": -1})}, "se: ratio = -1: above 0"),
        ({"layer3": ("global_attention", {"heads": 7})}, "heads = 7: does not divide 192 channels"),
        ({"fc": "se"}, r"fc: gives \(1, 7\): no map of the image"),
        ({"layer3": ("ppm", {"out_channels": 512})}, "its place is a head: attention.ppm.PyramidPooling"),
        ({"layer3": ("aspp", {"out_channels": 512})}, "its place is a head: attention.aspp.pyramid"),
        ({"layer3": "dyt"}, "dyt is a norm, for training from scratch"),
        ({"layer2": "se", "layer1": ("cbam", {"kernel_size": 4})}, "cbam: kernel_size = 4: an odd number"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(modules, message):
    model = backbone("resnet").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        attach(model, modules)
    assert "\n" not in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert equal(model.state_dict().values(), before.values())
    assert num_hooks(model) == 0
    assert all(module.training for module in model.modules())


def test_one_module_a_place():
    model = backbone("swin_transformer", features_only=True)
    attach(model, {"layers.2": "se"})
    for place in ("layers.2", "layers_2"):  # two names of it
        with pytest.raises(ValueError, match=f"{place}: se stands there already; detach it first"):
            attach(model, {"layers.1": "se", place: "gca"})
    assert list(Attachment(model).places) == ["layers.2"]
    with pytest.raises(ValueError, match=r"layers\.1: nothing is attached there"):
        Attachment(model).detach("layers.1")


def test_what_is_no_single_map_is_refused():
    model = timm.create_model("crossvit_tiny_240").eval()
    with pytest.raises(ValueError, match=r"blocks\.1: gives several tensors, and none is a map of the image"):
        attach(model, {"blocks.1": "se"})
    model = timm.create_model("efficientvim_m1").eval()
    with pytest.raises(ValueError, match=r"stages\.1: gives 2 maps, and which of them to attend to is not known"):
        attach(model, {"stages.1": "se"})


def test_a_place_whose_patches_nobody_reads_is_refused():
    """The class token alone is read behind a ViT's last block; the mean of the patches is another matter."""
    name, options = FAMILIES["vision_transformer"]
    with pytest.raises(ValueError, match=r"blocks\.5: nothing behind it looks at the patches"):
        attach(backbone("vision_transformer"), {"blocks.2": "se", "blocks.5": "se"})
    attach(timm.create_model(name, **options, global_pool="avg"), {"blocks.5": "se"})
    attach(backbone("vision_transformer", features_only=True), {"blocks.5": "se"})


def test_a_module_that_never_runs_is_no_place():
    model = backbone("resnet")
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="spare: never called when the model looks at an image"):
        attach(model, {"spare": "se"})


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels_are_those_of_the_first_layer(channels):
    assert input_size_of(timm.create_model("test_resnet", in_chans=channels)) == (channels, 160, 160)
    assert input_size_of(timm.create_model("test_vit", in_chans=channels)) == (channels, 160, 160)


def test_models_that_do_not_say_their_images_can_be_told():
    model = nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"does not say which images it takes; give input_size=\(3, 224, 224\)"):
        attach(model, {"1": "se"})
    with pytest.raises(ValueError, match=r"takes no images of \(3, 9, 9\)"):
        attach(model, {"1": "se"}, input_size=(3, 9, 9))
    attached = attach(model, {"1": "se"}, input_size=(5, 9, 9))
    assert attached.places["1"].attention.channels == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("non_local", (None, "non_local")),
        ("layer3=non_local", ("layer3", "non_local")),
        ("layers.3=criss_cross(recurrence=3)", ("layers.3", ("criss_cross", {"recurrence": 3}))),
        ("se(start='paper', ratio=0.5)", (None, ("se", {"start": "paper", "ratio": 0.5}))),
    ],
)
def test_modules_on_a_command_line(text, said):
    assert parse(text) == said


@pytest.mark.parametrize("text", ["", "a=b=c", "se(3)", "se(ratio=open('x'))", "layer3=", "se()()", "se;"])
def test_what_is_no_module_on_a_command_line(text):
    with pytest.raises(ValueError, match="MODULE, PLACE=MODULE or"):
        parse(text)
