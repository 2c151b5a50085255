"""Reconstructions: with a decoder that knows the truth the original comes back; visible patches are left alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from recipes_under_test import load_recipe
from torch import nn

from ssl_global.encoders.global_swin import GlobalSwinConfig
from ssl_global.encoders.vit import VitConfig
from ssl_global.errors import UserError
from ssl_global.explain.reconstruction import HEAD, reconstruct, reconstruction_sheet, unpatchify
from ssl_global.methods.mae import MaeConfig, mae_loss, patchify

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT = VitConfig(name="vit_tiny_patch16_224", patch=4, width=48, depth=1, heads=3, pool="avg", positions="sincos")
SWIN = GlobalSwinConfig(patch=2, width=16, depths=(1, 1, 2), heads=(1, 2, 4), window=8)
WAYS = {
    "vit_random": (VIT, {}),
    "vit_uniform": (VIT, {"masking": "uniform", "secondary_ratio": 0.25}),
    "vit_dense": (VIT, {"masking": "dense", "mask_ratio": 0.6}),
    "swin_random": (replace(SWIN, pool="token"), {"masking": "random"}),
    "swin_uniform": (replace(SWIN, pool="token"), {"masking": "uniform"}),
    "swin_dense": (replace(SWIN, pool="avg"), {"masking": "dense", "mask_ratio": 0.6}),
}


def build(way):
    encoder, method = WAYS[way]
    recipe = load_recipe("mae", "demo")
    config = MaeConfig(**({"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4} | method))
    recipe = replace(recipe, encoder=encoder, method=config)
    recipe.check()
    torch.manual_seed(0)
    return recipe.method.build(recipe)


def images(height=32, width=48):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def made(way, x=None, **options):
    return reconstruct(build(way), images() if x is None else x, mean=MEAN, std=STD, **options)


class Truth(nn.Module):
    """A decoder that says of each patch what it was to foretell."""

    def __init__(self, want):
        super().__init__()
        self.want = want

    def forward(self, tokens):
        return self.want


@pytest.mark.parametrize("way", WAYS)
def test_a_decoder_that_knows_the_truth_rebuilds_the_original(way):
    method, x = build(way), images()
    normal = (x.double() - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    patches = patchify(normal, method.patch)
    if method.config.masking != "dense":
        patches = torch.from_numpy(
            (patches.numpy() - patches.numpy().mean(-1, keepdims=True))
            / np.sqrt(patches.numpy().var(-1, ddof=1, keepdims=True) + 1e-6)
        )
        assert mae_loss(patches, patchify(normal, method.patch)) < 1e-9  # what the loss asks for
    method.decoder = Truth(patches.float())
    found = reconstruct(method, x, mean=MEAN, std=STD)
    torch.testing.assert_close(found.rebuilt, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pasted, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_visible_patches_are_the_original_bit_for_bit_and_the_others_are_rebuilt(way):
    x = images()
    found = made(way, x)
    side = 32 // found.unseen.shape[1]
    for b in range(2):
        for row in range(found.unseen.shape[1]):
            for col in range(found.unseen.shape[2]):
                here = (b, slice(None), slice(row * side, row * side + side), slice(col * side, col * side + side))
                source = found.rebuilt if found.unseen[b, row, col] else x
                assert torch.equal(found.pasted[here], source[here])
                grey = found.unseen[b, row, col].item()
                assert torch.equal(found.visible[here], torch.full_like(x[here], 0.5) if grey else x[here])
    assert torch.equal(found.original, x)
    assert (found.rebuilt - x).abs().max() > 0.01


def test_what_is_rebuilt_depends_on_what_is_seen_alone():
    method, x = build("vit_random"), images()
    first = reconstruct(method, x, mean=MEAN, std=STD)
    unseen = first.unseen.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    # Each hidden patch upside down: another image with the same mean and deviation in each patch.
    turned = unpatchify(patchify(x, 4).unflatten(2, (16, 3)).flip(2).flatten(2), (8, 12), 4)
    other = reconstruct(method, torch.where(unseen, turned, x), mean=MEAN, std=STD)
    torch.testing.assert_close(other.rebuilt, first.rebuilt, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 48), (0.75, 72), (0.9, 87)])
def test_as_many_are_hidden_as_are_asked_for(ratio, count):
    found = made("vit_random", ratio=ratio)
    assert found.unseen.flatten(1).sum(1).tolist() == [count, count]
    assert found.ratio == pytest.approx(count / 96)
    assert made("vit_dense", ratio=ratio).unseen.flatten(1).sum(1).tolist() == [count, count]


def test_uniform_masking_leaves_one_of_four_or_fewer():
    assert made("vit_uniform").ratio == pytest.approx((72 + 6) / 96)
    assert made("vit_uniform", ratio=0.75).ratio == 0.75
    assert made("vit_uniform", ratio=0.875).ratio == 0.875
    with pytest.raises(UserError, match=r"ratio = 0.5: uniform masking leaves one patch of four; 0.75 or more"):
        made("vit_uniform", ratio=0.5)
    with pytest.raises(UserError, match=r"ratio = 0.9: .* 0.75, as it was trained without a secondary ratio"):
        made("swin_uniform", ratio=0.9)


def test_the_seed_says_what_is_hidden():
    first, again, other = (made("vit_random", seed=seed) for seed in (3, 3, 5))
    assert torch.equal(first.unseen, again.unseen)
    assert torch.equal(first.pasted, again.pasted)
    assert not torch.equal(first.unseen, other.unseen)
    assert not torch.equal(first.unseen[0], first.unseen[1])


def test_uint8_is_taken_and_the_method_is_left_in_its_mode():
    method, x = build("vit_random").train(), (images() * 255).to(torch.uint8)
    method.encoder.eval()
    found = reconstruct(method, x, mean=MEAN, std=STD)
    assert torch.equal(found.original, x.float() / 255)
    assert method.training
    assert not method.encoder.training
    assert not found.rebuilt.requires_grad


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.0}, "ratio = 0: a share of the patches, above 0 and below 1"),
        ({"ratio": 1.5}, "ratio = 1.5: a share of the patches"),
        ({"ratio": 0.999}, "ratio = 0.999: none of 96 patches would be hidden, or all of them"),
        ({"x": torch.rand(1, 3, 30, 48)}, "images of 48 x 30 pixels: multiples of the hidden patches' 4"),
        ({"x": torch.rand(3, 32, 48)}, r"images of shape \(3, 32, 48\)"),
    ],
)
def test_what_cannot_be_is_said(options, said):
    with pytest.raises(UserError, match=said):
        made("vit_random", **options)


def test_a_run_that_is_no_mae():
    recipe = load_recipe("dino", "demo")
    with pytest.raises(UserError, match="a Dino run: only MAE rebuilds images"):
        reconstruct(recipe.method.build(recipe), images(), mean=MEAN, std=STD)


def test_a_sheet_has_a_row_for_each_image_and_three_pictures_for_each_ratio():
    method = build("vit_random")
    rows = reconstruct(method, images(), mean=MEAN, std=STD, ratio=0.75).rows(["a.jpg"])
    assert [[caption for _, caption in row] for row in rows] == [
        ["a.jpg", "75% hidden", "", ""],
        ["", "75% hidden", "", ""],
    ]
    assert len(rows[0]) == len(HEAD)
    sheet = reconstruction_sheet(method, images(), mean=MEAN, std=STD, ratios=(0.5, 0.9), side=32)
    assert sheet.width == 8 + 7 * (48 + 8)
    assert sheet.height > 2 * 32
