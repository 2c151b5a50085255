"""Backbones of every family give maps of (B, C, H, W), fine to coarse, of images of any size."""

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ssl_global  # noqa: F401  timm knows global_swin_* from here on
from ssl_global.finetuning.pyramid import Features, SimplePyramid

SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 4}
VIT = {"embed_dim": 16, "depth": 3, "num_heads": 2, "dynamic_img_size": True}
HIERA = {"img_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 2, 1), "mask_unit_size": (4, 4)}
FAMILIES = {  # timm's name, options, channels, strides, whether its maps are normalised
    "resnet": ("resnet18", {}, [64, 128, 256, 512], [4, 8, 16, 32], False),
    "resnet of stride 8": ("resnet26", {"output_stride": 8}, [256, 512, 1024, 2048], [4, 8, 8, 8], False),
    "mobilenet": ("mobilenetv3_small_050", {}, [8, 16, 24, 288], [4, 8, 16, 32], False),
    "convnext": ("test_convnext", {}, [24, 32, 48, 64], [4, 8, 16, 32], True),
    "swin": ("swin_tiny_patch4_window7_224", SWIN | {"strict_img_size": False}, [8, 16, 32, 64], [4, 8, 16, 32], True),
    "global swin": ("global_swin_tiny_patch4_window7_224", SWIN | {"num_global_tokens": 2}, [8, 16, 32, 64],
                    [4, 8, 16, 32], True),
    "vit": ("vit_tiny_patch16_224", VIT, [20, 20, 20, 20], [4, 8, 16, 32], True),
    "vit with registers, patch 14": ("vit_small_patch14_reg4_dinov2", VIT, [20, 20, 20, 20], [3.5, 7, 14, 28], True),
    "hiera": ("hiera_tiny_224", HIERA, [8, 16, 32, 64], [4, 8, 16, 32], True),
}  # fmt: skip


def features_of(family, **options):
    torch.manual_seed(0)
    name, kwargs, *_ = FAMILIES[family]
    return Features(timm.create_model(name, features_only=True, **kwargs), width=20, **options)


@pytest.fixture(scope="module")
def made():
    return {family: features_of(family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_maps_from_fine_to_coarse(family, made):
    features, (*_, channels, strides, norm) = made[family], FAMILIES[family]
    assert (features.channels, features.strides, features.norm) == (channels, strides, norm)
    assert all(features.multiple % stride == 0 for stride in strides)
    sizes = [(64, 64)] if family == "hiera" else [(64, 96), (50, 37), (1, 1)]
    for size in sizes:
        padded = features.padded_size(*size)
        maps = features(torch.randn(2, 3, *size))
        assert [x.shape for x in maps] == [
            (2, c, round(padded[0] / s), round(padded[1] / s)) for c, s in zip(channels, strides, strict=True)
        ]
        assert all(x.isfinite().all() for x in maps)


@pytest.mark.parametrize("family", ["resnet", "swin", "global swin", "vit"])
def test_they_are_the_backbones_own_maps_of_the_padded_image(family, made):
    features = features_of(family, pyramid=False).eval()
    images = torch.randn(1, 3, 50, 37, generator=torch.Generator().manual_seed(0))
    height, width = features.padded_size(50, 37)
    assert (height, width) == ((64, 48) if family == "vit" else (64, 64))
    padded = torch.zeros(1, 3, height, width)
    padded[:, :, :50, :37] = images
    theirs = features.backbone(padded)[-4:]
    if "swin" in family:
        theirs = [x.permute(0, 3, 1, 2) for x in theirs]
    mine = features(images)
    assert len(mine) == len(theirs) == (3 if family == "vit" else 4)
    for x, y in zip(mine, theirs, strict=True):
        if features.norm:
            y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(x, y)


def test_a_place_is_where_it_is_in_the_image():
    """What changes at the lower right of an image changes the map there, whatever its layout: nothing is transposed."""
    for family in ("resnet", "swin", "vit"):
        features = features_of(family, pyramid=False, norm=False).eval()
        images = torch.zeros(1, 3, 64, 128)
        other = images.clone()
        other[:, :, 40:56, 104:120] = 1.0
        change = (features(images)[0] - features(other)[0]).abs().sum((0, 1))
        row, col = divmod(int(change.argmax()), change.shape[1])
        stride = features.strides[0]
        assert 36 <= row * stride < 60
        assert 100 <= col * stride < 124


@pytest.mark.parametrize("family", ["convnext", "swin", "vit"])
def test_the_norm_can_be_left_out_and_has_no_parameters(family):
    plain, normal = features_of(family, norm=False), features_of(family)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in normal.named_parameters()]
    images = torch.randn(1, 3, 64, 64)
    x, y = plain.eval()(images), normal.eval()(images)
    assert not torch.allclose(x[-1], y[-1])


def test_the_simple_pyramid_is_vitdets():
    torch.manual_seed(0)
    pyramid = SimplePyramid(8, 6).double()
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    x = torch.randn(2, 8, 4, 6).double()

    def normal(part, y):
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        return y * part.weight[:, None, None] + part.bias[:, None, None]

    def doubled(part, y):
        """Each place becomes 2 x 2, by a matrix for each of the four."""
        out = torch.zeros(y.shape[0], part.weight.shape[1], 2 * y.shape[2], 2 * y.shape[3]).double()
        for row in range(2):
            for col in range(2):
                each = torch.einsum("bchw,cd->bdhw", y, part.weight[:, :, row, col])
                out[:, :, row::2, col::2] = each + part.bias[:, None, None]
        return out

    first, second, third, fourth = pyramid.levels
    y = doubled(first[3], F.gelu(normal(first[1], doubled(first[0], x))))
    coarse = x.unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax((3, 5))
    for level, before, mine in zip(
        (first, second, third, fourth), (y, doubled(second[0], x), x, coarse), pyramid(x), strict=True
    ):
        *_, point, norm, near, last = level
        expected = normal(last, F.conv2d(normal(norm, F.conv2d(before, point.weight)), near.weight, padding=1))
        torch.testing.assert_close(mine, expected)


def test_all_of_the_pyramid_learns():
    features = features_of("vit").train()
    sum(x.square().mul(torch.randn_like(x)).sum() for x in features(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in features.named_parameters() if p.grad is None or not p.grad.any()] == []


class Strided(torch.nn.Module):
    """A backbone whose only map is the means of 8 x 8 pixels."""

    class feature_info:  # noqa: N801
        channels, reduction = staticmethod(lambda: [3]), staticmethod(lambda: [8])

    def forward(self, images):
        return [F.avg_pool2d(images, 8)]


@given(height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=30)
def test_logits_come_back_to_their_pixels(height, width):
    """A ramp stays where it is, but at its ends and in the padding."""
    features = Features(Strided(), pyramid=False)
    rows, cols = (torch.arange(n, dtype=torch.float32) for n in (height, width))
    images = torch.stack([rows[:, None].expand(height, width), cols.expand(height, width), torch.ones(height, width)])
    (x,) = features(images[None])
    back = features.to_image(x, (height, width))[0]
    assert back.shape == images.shape
    inner_rows, inner_cols = (slice(4, max(4, n // 8 * 8 - 4)) for n in (height, width))
    torch.testing.assert_close(back[:, inner_rows, inner_cols], images[:, inner_rows, inner_cols])


def test_what_gives_no_maps_is_refused():
    with pytest.raises(ValueError, match="features_only=True"):
        Features(torch.nn.Conv2d(3, 3, 1))
    features = features_of("swin")
    features.channels_last = False
    with pytest.raises(ValueError, match="8 channels"):
        features(torch.randn(1, 3, 64, 96))
