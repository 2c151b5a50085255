"""Windows give what the whole image would: everywhere, exactly for models of short reach, in memory that stays."""

import copy
import io
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_global.inference.sliding_window import SIGMA, SlidingWindow

CPU = torch.device("cpu")


@st.composite
def axes(draw, longest=70):
    """length, window, overlap, margin"""
    window = draw(st.integers(1, 24))
    overlap = draw(st.integers(0, window - 1))
    return draw(st.integers(1, longest)), window, overlap, draw(st.none() | st.integers(0, overlap // 2))


def over(rows, cols, model, **options):
    """A SlidingWindow, and zeros of (2, 3, H, W) to put through it."""
    (height, *rows), (width, *cols) = rows, cols
    window, overlap, margin = zip(rows, cols, strict=True)
    if None in margin:
        margin = None
    infer = SlidingWindow(model, window, overlap, margin=margin, **options)
    return infer, torch.zeros(2, 3, height, width)


def convolutions(reach, channels=3, classes=5):
    """As far as `reach` pixels, in 3 x 3 steps."""
    torch.manual_seed(reach)
    layers = [nn.Conv2d(channels, 8, 1)]
    for _ in range(reach):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.GELU()]
    layers.append(nn.Conv2d(8, classes, 1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # so that what lies `reach` pixels off is felt
            nn.init.normal_(layer.bias)
    return nn.Sequential(*layers).eval()


# ---- everywhere ----


@pytest.mark.parametrize("blend", ["gaussian", "mean"])
@settings(max_examples=25)
@given(rows=axes(), cols=axes(), batch=st.integers(1, 9))
def test_a_constant_model_gives_the_constant_at_every_pixel(blend, rows, cols, batch):
    infer, images = over(rows, cols, lambda x: torch.full_like(x[:, :2], 3.7), blend=blend, batch=batch)
    logits = infer(images)
    assert logits.shape == (2, 2, *images.shape[2:])
    torch.testing.assert_close(logits, torch.full_like(logits, 3.7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("blend", ["gaussian", "mean"])
@settings(max_examples=25)
@given(rows=axes(), cols=axes())
def test_pixels_come_back_to_their_place(blend, rows, cols):
    infer, images = over(rows, cols, nn.Identity(), blend=blend)
    images = torch.rand_like(images)
    torch.testing.assert_close(infer(images), images, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [(300, 300), (1000, 1200), (1, 4000), (4000, 1), (1, 1)])
@pytest.mark.parametrize(("window", "overlap"), [(512, 128), (224, 0), (224, 100)])
def test_no_pixel_is_left_out(size, window, overlap):
    infer = SlidingWindow(lambda x: x[:, :1] * 0 + 2, window, overlap)
    logits = infer(torch.randn(1, 1, *size))
    assert logits.shape == (1, 1, *size)
    assert logits.isfinite().all()
    assert (logits - 2).abs().max() < 1e-6


@given(axis=axes(200), blend=st.sampled_from(["gaussian", "mean"]))
def test_windows_lie_as_they_should(axis, blend):
    length, window, overlap, margin = axis
    infer = SlidingWindow(nn.Identity(), window, overlap, margin=margin, blend=blend)
    spans = infer.along(torch.zeros(1, 1, length, length), 0)
    starts = [span.start for span in spans]
    assert starts[0] == 0
    assert starts[-1] == max(0, length - window)
    assert starts[:-1] == [i * (window - overlap) for i in range(len(starts) - 1)]
    assert all(0 < b - a <= window - overlap for a, b in pairwise(starts))
    for span in spans:
        assert (span.weight > 0).all()
        assert span.inside.start == (infer.margin[0] if span.start > 0 else 0)
        if span.start + window < length:
            assert span.inside.stop == window - infer.margin[0]


# ---- exactly ----


@pytest.mark.parametrize("blend", ["gaussian", "mean"])
@pytest.mark.parametrize(("window", "overlap"), [(24, 7), (24, 8), (32, 16), ((40, 17), (20, 9))])
@pytest.mark.parametrize("size", [(40, 17), (97, 50), (64, 128)])
def test_a_reach_under_half_the_overlap_is_the_whole_image(blend, window, overlap, size):
    overlaps = overlap if isinstance(overlap, tuple) else (overlap, overlap)
    reach = (min(overlaps) - 1) // 2
    assert reach >= 3
    model, images = convolutions(reach), torch.randn(2, 3, *size)
    if isinstance(window, int) and min(size) < window:
        window = (window, min(size))  # smaller images: below
    infer = SlidingWindow(model, window, overlap, blend=blend)
    with torch.no_grad():
        torch.testing.assert_close(infer(images), model(images), rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(rows=axes(), cols=axes(), blend=st.sampled_from(["gaussian", "mean"]))
def test_so_it_is_at_any_size(rows, cols, blend):
    rows, cols = ((max(length, window), window, overlap, None) for length, window, overlap, _ in (rows, cols))
    reach = [(axis[2] - 1) // 2 if axis[2] else 0 for axis in (rows, cols)]
    kernel = torch.randn(2, 3, 2 * reach[0] + 1, 2 * reach[1] + 1)
    infer, images = over(rows, cols, lambda x: F.conv2d(x, kernel / kernel.norm(), padding=reach), blend=blend)
    images = torch.randn_like(images)
    torch.testing.assert_close(infer(images), infer.model(images), rtol=0, atol=1e-5)


def test_it_is_the_margin_that_makes_it_exact():
    model, images = convolutions(4), torch.randn(1, 3, 60, 60)
    with torch.no_grad():
        whole = model(images)
    wrong = {margin: (SlidingWindow(model, 24, 9, margin=margin)(images) - whole).abs().max() for margin in (0, 2, 4)}
    print({margin: float(difference) for margin, difference in wrong.items()})
    assert wrong[4] < 1e-5
    assert min(wrong[0], wrong[2]) > 0.1


def test_an_image_smaller_than_the_window_differs_only_where_it_was_filled_up():
    model, images = convolutions(3), torch.randn(1, 3, 20, 50)
    infer = SlidingWindow(model, 32, 8)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits, whole = infer(images), model(images)
    torch.testing.assert_close(logits[..., :17, :], whole[..., :17, :], rtol=0, atol=1e-5)
    assert (logits - whole)[..., 17:, :].abs().max() > 1e-3
    assert torch.equal(seen[0][:1, :, 20:], images[..., 19:, :32].expand(-1, -1, 12, -1))


def test_a_strided_model_is_the_whole_image_where_windows_keep_its_grid():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 4, stride=4).eval()
    images = torch.randn(1, 3, 80, 56)  # 24 pixels from window to window, and 8 are left over
    infer = SlidingWindow(model, 32, 8)
    with torch.no_grad():
        whole = F.interpolate(model(images), scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(infer(images), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("margin", [0, 2, None])
@pytest.mark.parametrize("blend", ["gaussian", "mean"])
def test_the_blend_is_the_slow_loop(blend, margin):
    """The usual way: a map of weights for the window, a map of their sum for the image. In float64."""
    torch.manual_seed(0)
    images, (h, w), overlap = torch.randn(1, 2, 41, 30).double(), (16, 12), 7
    infer = SlidingWindow(
        lambda x: x.cumsum(-1) - x.mean((2, 3), keepdim=True), (h, w), overlap, blend=blend, margin=margin
    )
    want, count = torch.zeros(41, 30).double(), torch.zeros(41, 30).double()
    cut = 3 if margin is None else margin
    for top in (0, 9, 18, 25):
        for left in (0, 5, 10, 15, 18):
            logits = infer.model(images[..., top : top + h, left : left + w])
            for i in range(h):
                for j in range(w):
                    y, x = top + i, left + j
                    if (top > 0 and i < cut) or (top + h < 41 and i >= h - cut):
                        continue
                    if (left > 0 and j < cut) or (left + w < 30 and j >= w - cut):
                        continue
                    from_centre = ((i - (h - 1) / 2) / h) ** 2 + ((j - (w - 1) / 2) / w) ** 2
                    weight = 1.0 if blend == "mean" else torch.tensor(-from_centre / (2 * SIGMA**2)).double().exp()
                    want[y, x] += weight * logits[0, 0, i, j]
                    count[y, x] += weight
    torch.testing.assert_close(infer(images)[0, 0], want / count, rtol=1e-5, atol=1e-6)


# ---- what models give ----


@pytest.mark.parametrize("classes", [1, 3, 21])
@pytest.mark.parametrize("stride", [1, 2, 8])
def test_any_number_of_classes_at_any_stride(classes, stride):
    model = nn.Conv2d(3, classes, stride, stride).eval()
    logits = SlidingWindow(model, (32, 16), 4)(torch.randn(2, 3, 50, 40))
    assert logits.shape == (2, classes, 50, 40)
    assert not logits.requires_grad


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_windows_of_all_images_share_batches(batch):
    seen = []
    infer = SlidingWindow(lambda x: seen.append(x.shape) or x, 16, 4, batch=batch)
    images = torch.rand(3, 2, 28, 40)  # 2 x 3 windows each
    torch.testing.assert_close(infer(images), images)
    assert sum(shape[0] for shape in seen) == 18
    assert {shape[1:] for shape in seen} == {(2, 16, 16)}
    assert [shape[0] for shape in seen[:-1]] == [batch] * (len(seen) - 1)


def test_images_do_not_see_each_other():
    infer, images = SlidingWindow(convolutions(2), 16, 6, batch=5), torch.randn(2, 3, 40, 40)
    before = infer(images)[0]
    images[1] = torch.nan
    assert torch.equal(infer(images)[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    model, images = nn.Conv2d(3, 4, 2, 2).eval().to(dtype), torch.randn(1, 3, 20, 50).to(dtype)
    logits = SlidingWindow(model, 32, 8)(images)
    assert logits.dtype == torch.float32
    want = SlidingWindow(model.float(), 32, 8)(images.float())
    torch.testing.assert_close(logits, want, rtol=0.02, atol=0.02)


def test_float64_stays():
    images = torch.randn(1, 3, 20, 50).double()
    assert SlidingWindow(nn.Identity(), 32, 8)(images).dtype == torch.float64


def test_windows_go_to_where_the_model_is():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.parameter = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, windows):
            assert windows.device.type == "meta"
            return torch.ones(windows.shape)

    logits = SlidingWindow(Elsewhere(), 16, 4)(torch.zeros(1, 2, 30, 30))
    torch.testing.assert_close(logits, torch.ones(1, 2, 30, 30))


def test_it_is_a_module_like_others():
    infer, images = SlidingWindow(convolutions(1), 16, 4), torch.randn(1, 3, 20, 20)
    infer.train()
    assert infer.model.training
    infer.eval()
    buffer = io.BytesIO()
    torch.save(infer.state_dict(), buffer)
    assert all(name.startswith("model.") for name in infer.state_dict())
    assert torch.equal(copy.deepcopy(infer)(images), infer(images))
    assert infer(images.requires_grad_()).grad_fn is None


# ---- memory ----


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are made within and still held: now, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.holders, self.bytes, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.hold(x, given)
        return result

    def hold(self, x, given):
        place, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        if place not in self.holders:
            if place in given:
                return  # a view of what was there before
            self.holders[place] = 0
            self.bytes += size
            self.most = max(self.most, self.bytes)
        self.holders[place] += 1
        weakref.finalize(x, self.release, place, size)

    def release(self, place, size):
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.bytes -= size


def most_beyond_output(images, **options):
    infer = SlidingWindow(nn.Conv2d(3, 5, 3, padding=1).eval(), 128, 32, **options)
    with Memory() as memory:
        logits = infer(images)
    assert memory.bytes >= logits.nbytes
    return memory.most - logits.nbytes


def test_memory_does_not_grow_with_the_image():
    small, large, four = (
        most_beyond_output(torch.zeros(n, 3, side, side)) for n, side in ((1, 500), (1, 1500), (4, 500))
    )
    print(f"beyond the output: {small / 2**20:.2f} MiB for 500 x 500, {large / 2**20:.2f} for nine times that")
    assert small > 4 * 128 * 128 * 5 * 4  # it does see a batch of windows with its logits
    assert large - small < 100 * (1500 - 500)  # bytes for each row and column: their weights
    assert four <= small


def test_memory_grows_with_the_batch():
    one, eight = (most_beyond_output(torch.zeros(1, 3, 500, 500), batch=batch) for batch in (1, 8))
    assert eight > 4 * one


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window = 0: at least 1"),
        ({"window": 32.5}, "window = 32.5: a whole number"),
        ({"window": (32, 32, 32)}, "window = .*: a whole number of pixels or"),
        ({"overlap": 32}, "overlap = 32: from 0 to 31"),
        ({"overlap": -1}, "overlap = -1: from 0 to 31"),
        ({"window": (64, 8), "overlap": 16}, "overlap = 16: from 0 to 7, less than the window of 8"),
        ({"overlap": 8, "margin": 5}, "margin = 5: from 0 to 4"),
        ({"margin": -1}, "margin = -1"),
        ({"batch": 0}, "batch = 0: at least 1"),
        ({"blend": "cosine"}, "blend = 'cosine': gaussian or mean"),
        ({"context": "local"}, "context = 'local': aligned, tokens or None"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message) as error:
        SlidingWindow(nn.Identity(), **({"window": 32, "overlap": 8} | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x.mean((2, 3)), r"model gave torch.float32 \(1, 3\): a tensor of logits"),
        (lambda x: {"out": x}, "model gave dict: a tensor of logits"),
        (lambda x: x.argmax(1, keepdim=True), "model gave torch.int64"),
        (lambda x: x[..., 1:-1, 1:-1], r"model gave \(1, 3, 30, 30\): \(1, K, 32, 32\) would be right"),
        (lambda x: x[..., ::2, :], r"model gave \(1, 3, 16, 32\)"),
        (lambda x: x[..., :0, :], r"model gave \(1, 3, 0, 32\)"),
        (lambda x: F.interpolate(x, scale_factor=2), r"model gave \(1, 3, 64, 64\)"),
        (lambda x: torch.cat([x, x]), r"model gave \(2, 3, 32, 32\): \(1, K"),
    ],
)
def test_models_that_cannot_be(model, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindow(model, 32, 8)(torch.zeros(1, 3, 20, 20))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 20, 20), r"images = float32 \(3, 20, 20\): floating point \(B, C, H, W\)"),
        (torch.zeros(1, 3, 20, 20, dtype=torch.uint8), "images = uint8"),
        (torch.zeros(0, 3, 20, 20), "no size 0"),
        (torch.zeros(1, 3, 0, 20), "no size 0"),
    ],
)
def test_images_that_cannot_be(images, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindow(nn.Identity(), 32, 8)(images)
