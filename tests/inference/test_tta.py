"""Views at several sizes and their mirror images: what does not depend on them comes back as it was."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssl_global.inference.resize import multiple_of, resize
from ssl_global.inference.sliding_window import SlidingWindow
from ssl_global.inference.tta import TTA


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, images):
        return self.features(images).square().mean((2, 3))


def pixels(stride=1, mirrored=False):
    """A segmenter; `mirrored`: one that gives of the mirror image the mirror image."""
    torch.manual_seed(1)
    model = nn.Conv2d(3, 4, stride if stride > 1 else 3, stride, padding=0 if stride > 1 else 1).eval()
    if mirrored:
        model.weight.data = (model.weight + model.weight.flip(-1)).detach() / 2
    return model


MODELS = {"classes": Classifier, "pixels": pixels, "pixels at stride 4": lambda: pixels(4)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_without_views_it_is_the_model(name, activation):
    model, images = MODELS[name](), torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        logits = model(images)
        logits = logits if logits.ndim == 2 else resize(logits, (32, 64))
    want = logits.softmax(1) if activation == "softmax" else logits.sigmoid()
    assert torch.equal(TTA(model, scales=(1.0,), hflip=False, activation=activation)(images), want)
    assert torch.equal(TTA(model, scales=(1.0,), hflip=False, merge="mean_logit")(images), logits)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("merge", ["mean_prob", "mean_logit"])
def test_what_mirrors_with_the_image_is_unchanged(stride, merge):
    model, images = pixels(stride, mirrored=True), torch.randn(2, 3, 32, 64)
    alone, both = (TTA(model, scales=(1.0,), hflip=hflip, merge=merge)(images) for hflip in (False, True))
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-6)


def test_maps_of_mirror_images_are_turned_back():
    images = torch.randn(2, 3, 32, 64)
    torch.testing.assert_close(TTA(nn.Identity(), scales=(1.0,), merge="mean_logit")(images), images, rtol=0, atol=0)
    down = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(1, 2, 64, 64)
    everywhere = TTA(nn.Identity(), merge="mean_logit")(down)
    torch.testing.assert_close(everywhere[..., 4:-4], down[..., 4:-4], rtol=0, atol=1e-3)  # a ramp, at any size


@pytest.mark.parametrize("output", ["classes", "pixels"])
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    scales=st.lists(st.floats(0.1, 2), min_size=1, max_size=3),
    stride=st.sampled_from([1, 14, 32]),
)
def test_a_constant_model_gives_the_constant(output, size, scales, stride):
    seen = []
    logits = torch.tensor([0.5, -1.0, 2.0])

    def model(images):
        seen.append(tuple(images.shape[2:]))
        shape = (len(images), 3) if output == "classes" else (len(images), 3, *images.shape[2:])
        return logits.view(1, 3, *[1] * (len(shape) - 2)).expand(shape)

    got = TTA(model, scales=scales, stride=stride)(torch.randn(2, 3, *size))
    want = logits.softmax(0)
    if output == "pixels":
        assert got.shape == (2, 3, *size)
        want = want[:, None, None]
    torch.testing.assert_close(got, want.expand_as(got), rtol=0, atol=1e-6)
    assert seen == [shape for s in scales for shape in [tuple(multiple_of(stride, side * s) for side in size)] * 2]
    assert all(side % stride == 0 and side > 0 for shape in seen for side in shape)


@pytest.mark.parametrize("merge", ["mean_prob", "mean_logit"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_slow_loop(name, merge):
    model, images = MODELS[name](), torch.randn(2, 3, 64, 96)
    said = []
    with torch.no_grad():
        for size in [(64, 64), (64, 96), (96, 128)]:  # 48 x 72, 64 x 96 and 80 x 120, to the nearest 32
            view = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
            for flip in (False, True):
                logits = model(view.flip(-1) if flip else view)
                if logits.ndim == 4:
                    logits = logits.flip(-1) if flip else logits
                    logits = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False, antialias=True)
                said.append(logits.softmax(1) if merge == "mean_prob" else logits)
    got = TTA(model, merge=merge)(images)
    torch.testing.assert_close(got, torch.stack(said).mean(0), rtol=0, atol=1e-5)
    if merge == "mean_prob":
        torch.testing.assert_close(got.sum(1), torch.ones_like(got.sum(1)))


@pytest.mark.parametrize(
    ("stride", "length", "multiple"),
    [(32, 168, 160), (32, 280, 288), (32, 48, 64), (32, 3, 32), (1, 0.2, 1), (14, 21, 28)],
)
def test_sides_are_multiples(stride, length, multiple):
    assert multiple_of(stride, length) == multiple


def test_around_windows():
    model, images = pixels(mirrored=True), torch.randn(1, 3, 50, 70)
    infer = SlidingWindow(model, 24, 8)
    with torch.no_grad():
        want = model(images).softmax(1)
    torch.testing.assert_close(TTA(infer, scales=(1.0,), stride=1)(images), want, rtol=0, atol=1e-5)
    everything = TTA(infer, stride=1)(images)
    assert everything.shape == want.shape
    assert everything.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_averaged_in_float32(name):
    model, images = MODELS[name](), torch.randn(2, 3, 40, 64)
    want = TTA(model)(images)
    got = TTA(model.bfloat16())(images.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=0.03)


def test_what_the_model_gave_is_left_alone():
    kept = torch.randn(2, 5)
    before = kept.clone()
    TTA(lambda images: kept, merge="mean_logit")(torch.zeros(2, 3, 32, 32))
    assert torch.equal(kept, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales = \(\): at least one"),
        ({"scales": (1.0, 0.0)}, "each above 0"),
        ({"scales": (float("nan"),)}, "each above 0"),
        ({"merge": "max"}, "merge = 'max': mean_prob or mean_logit"),
        ({"activation": "relu"}, "activation = 'relu': softmax or sigmoid"),
        ({"stride": 0}, "stride = 0: at least 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        TTA(nn.Identity(), **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: (x, x), r"model gave tuple: logits \(2, K\) or \(2, K, h, w\) would be right"),
        (lambda x: x.flatten(2), r"model gave torch.float32 \(2, 3, 1024\)"),
        (lambda x: x.mean((0, 2, 3))[None], r"model gave torch.float32 \(1, 3\)"),
        (lambda x: x.argmax(1, keepdim=True), "model gave torch.int64"),
        (lambda x: x[:, :1], "of one class it is always 1; sigmoid would be right"),
    ],
)
def test_models_that_cannot_be(model, message):
    with pytest.raises(ValueError, match=message):
        TTA(model, scales=(1.0,))(torch.zeros(2, 3, 32, 32))


def test_images_that_cannot_be():
    with pytest.raises(ValueError, match="images = uint8"):
        TTA(nn.Identity())(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
