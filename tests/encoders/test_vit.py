"""The ViT is timm's to the bit, and hides what it is told to hide."""

import pytest
import timm
import torch
from recipes_under_test import load_recipe
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer

from ssl_global.encoders.encoder import visible_index
from ssl_global.encoders.positions import sincos_positions
from ssl_global.encoders.vit import Vit, VitConfig, named_model
from ssl_global.errors import UserError

SMALL = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 64, "depth": 2, "heads": 4}


def build(pixels=32, channels=3, **changes) -> Vit:
    torch.manual_seed(0)
    return Vit(VitConfig(**(SMALL | changes)), pixels=pixels, channels=channels).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 3},
        {"pool": "avg"},
        {"positions": "sincos"},
        {"name": "vit_base_patch16_gap_224", "pool": "avg"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(32, 32), (20, 48), (33, 7), (1, 1)], ids=str)
def test_equals_timm(changes, size):
    vit = build(**changes)
    images = torch.randn(2, 3, *size)
    tokens = vit.encode(images)
    features = vit.model.forward_features(images)
    rows, cols = -(-size[0] // 4), -(-size[1] // 4)
    assert tokens.grid == (rows, cols)
    assert torch.equal(tokens.patches, features[:, vit.model.num_prefix_tokens :])
    assert tokens.patches.shape == (2, rows * cols, 64)
    assert torch.equal(tokens.summary, vit.model(images))


def test_equals_a_model_that_timm_builds_by_itself():
    """The same weights in timm's own fixed-size model, made without us."""
    vit = build()
    plain = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, patch_size=4, embed_dim=64, depth=2, num_heads=4, img_size=32
    ).eval()
    plain.load_state_dict(vit.model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit.encode(images).summary, plain(images))


@pytest.mark.parametrize("registers", [0, 2])
def test_hiding_is_dropping_tokens_before_the_first_block(registers):
    vit = build(registers=registers)
    images = torch.randn(3, 3, 32, 32)
    hidden = torch.zeros(3, 64, dtype=torch.bool)
    for row, places in zip(hidden, ([0, 5, 63], [1, 2, 3], [60, 61, 62]), strict=True):
        row[places] = True
    tokens = vit.encode(images, hidden.view(3, 8, 8))
    all_tokens = vit.model._pos_embed(vit.model.patch_embed(images))
    prefix = vit.model.num_prefix_tokens
    for b in range(3):
        kept = torch.cat([all_tokens[b, :prefix], all_tokens[b, prefix:][~hidden[b]]])
        expected = vit.model.norm(vit.model.blocks(kept[None]))
        torch.testing.assert_close(tokens.patches[b], expected[0, prefix:])
        torch.testing.assert_close(tokens.summary[b], expected[0, 0])
    assert tokens.grid == (8, 8)
    same = vit.encode(images, hidden.view(3, 8, 8), num_hidden=3)
    assert torch.equal(same.patches, tokens.patches)


def test_uneven_hiding_is_refused():
    hidden = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match=r"equally many patches, got \[1, 2\]"):
        visible_index(hidden)


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_any_number_of_channels(channels):
    assert build(channels=channels).encode(torch.randn(1, channels, 32, 32)).summary.shape == (1, 64)


def test_recomputed_activations_change_no_gradient():
    plain, frugal = build().train(), build().train()
    frugal.recompute_activations()
    images = torch.randn(2, 3, 32, 32)
    for vit in (plain, frugal):
        vit.encode(images).summary.square().sum().backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_bf16_and_every_parameter_gets_a_gradient():
    vit = build(registers=2).train()
    with torch.autocast("cpu", torch.bfloat16):
        summary = vit.encode(torch.randn(2, 3, 20, 36)).summary
    summary.float().square().sum().backward()
    assert summary.isfinite().all()
    assert [n for n, p in vit.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_sincos_positions_are_the_formula():
    rows, cols, width = 3, 5, 16
    positions = sincos_positions((rows, cols), width)
    for r in range(rows):
        for c in range(cols):
            for half, place in ((0, r), (1, c)):
                for i in range(4):
                    angle = torch.tensor(place / 10_000 ** (i / 4), dtype=torch.float64)
                    row = positions[r * cols + c]
                    assert row[half * 8 + i].item() == pytest.approx(angle.sin().item(), abs=1e-6)
                    assert row[half * 8 + 4 + i].item() == pytest.approx(angle.cos().item(), abs=1e-6)


def test_sincos_positions_are_fixed_and_prefix_tokens_have_none():
    vit = build(positions="sincos", registers=2)
    assert not vit.model.pos_embed.requires_grad
    assert vit.model.pos_embed[0, : -8 * 8].eq(0).all()
    assert torch.equal(vit.model.pos_embed[0, -64:], sincos_positions((8, 8), 64))


@pytest.mark.slow
def test_every_plain_vit_of_timm_is_one_of_ours():
    """All names are walked: a plain one is built (without memory), the others are refused by name."""
    ours = 0
    for name in timm.list_models("vit_*"):
        with torch.device("meta"):
            model = timm.create_model(name)
        plain = type(model) is VisionTransformer and not isinstance(model.patch_embed, HybridEmbed)
        if plain:
            assert named_model(name).embed_dim > 0
            ours += 1
        else:
            with pytest.raises(UserError, match=f"encoder.name = {name}: a "):
                named_model(name)
    print(f"{ours} of {len(timm.list_models('vit_*'))} are plain")
    assert ours > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_smal_patch16_224"}, r"encoder.name = vit_smal_patch16_224: not a vit_\*.*vit_small_patch16_224"),
        ({"name": "resnet50"}, "encoder.name = resnet50"),
        ({"name": "vit_small_r26_s32_224"}, "encoder.name = vit_small_r26_s32_224: a ViT on another network"),
        ({"heads": 7}, "encoder.heads = 7: does not divide the width, 192; 6 would"),
        ({"width": 130, "heads": 13, "positions": "sincos"}, "encoder.width = 130: .*multiple of 4"),
        ({"patch": 0}, "encoder.patch = 0: at least 1"),
        ({"patch": 5}, "views.globals.pixels = 32: not a multiple of the patch, 5; 30 or 35 would be"),
        ({"drop_path": 1.5}, "encoder.drop_path = 1.5"),
        ({"name": "vit_base_patch16_gap_224"}, "encoder.pool = token: .*no class token; use avg"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as refusal:
        load_recipe("dino", "demo", **changes).check()
    assert "\n" not in str(refusal.value)
