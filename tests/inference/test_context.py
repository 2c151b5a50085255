"""What lies under a window is what it is given: exact coordinates, its own image's tokens."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssl_global.inference.context import low_resolution
from ssl_global.inference.sliding_window import SlidingWindow


def centres(cells):
    """Of so many cells, as shares of the whole."""
    return (torch.arange(cells) + 0.5) / cells


def coordinates(rows, cols):
    """(1, 2, rows, cols): how far down and how far to the right."""
    return torch.stack(torch.meshgrid(centres(rows), centres(cols), indexing="ij"))[None]


class Recorded(nn.Module):
    """Gives its context as its logits; a global map of coordinates, or tokens that tell the image."""

    def __init__(self, stride, tokens=0):
        super().__init__()
        self.stride, self.tokens = stride, tokens
        self.seen, self.given = [], []

    def global_context(self, images):
        self.seen.append(tuple(images.shape))
        if self.tokens:
            return images.mean((2, 3))[:, None].expand(-1, self.tokens, -1)
        return coordinates(*(side // self.stride for side in images.shape[2:])).expand(len(images), -1, -1, -1)

    def forward(self, windows, context):
        self.given.append(context)
        return windows[:, :2] * 0 + 1


@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    window=st.sampled_from([(32, 32), (48, 32), (64, 96)]),
    stride=st.sampled_from([4, 8, 16]),
)
def test_of_a_map_of_coordinates_each_window_gets_its_own(size, window, stride):
    model = Recorded(stride)
    infer = SlidingWindow(model, window, 8, context="aligned", context_stride=16)
    infer(torch.zeros(2, 3, *size))
    ((_, _, *small),) = model.seen
    given = torch.cat(model.given)
    assert given.shape[1:] == (2, window[0] // stride, window[1] // stride)
    places = [
        (row.start, col.start)
        for _ in range(2)
        for row in infer.along(torch.zeros(1, 1, *size), 0)
        for col in infer.along(torch.zeros(1, 1, *size), 1)
    ]
    for context, corner in zip(given, places, strict=True):
        for axis in (0, 1):
            want = (corner[axis] + centres(window[axis] // stride) * window[axis]) / size[axis]
            outer = centres(small[axis] // stride)
            want = want.clamp(outer[0], outer[-1])  # a map goes on as it ends
            got = context[axis] if axis else context[axis].T
            torch.testing.assert_close(got, want.expand_as(got), rtol=0, atol=2e-6)


def test_in_the_interior_the_ramp_is_exact():
    """Without the clamp of the test above: windows whose cells all lie between the map's outer centres."""
    model = Recorded(4)
    infer = SlidingWindow(model, 64, 16, context="aligned", context_stride=4, batch=1)
    infer(torch.zeros(1, 3, 256, 256))
    assert model.seen == [(1, 3, 64, 64)]
    starts = [span.start for span in infer.along(torch.zeros(1, 1, 256, 256), 0)]
    inner = [(a, b) for a in starts for b in starts]
    checked = 0
    for context, (top, left) in zip(model.given, inner, strict=True):
        if min(top, left) >= 8 and max(top, left) + 64 <= 248:
            want = coordinates(16, 16) * 64 / 256 + torch.tensor([top, left]).view(1, 2, 1, 1) / 256
            torch.testing.assert_close(context, want, rtol=0, atol=1e-6)
            checked += 1
    assert checked == 9


def test_one_window_over_the_whole_image_gets_the_map_itself():
    model = Recorded(8)
    SlidingWindow(model, 64, 8, context="aligned")(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(model.given[0], coordinates(8, 8), rtol=0, atol=1e-6)


def test_the_example_of_the_header():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Conv2d(3, 8, 4, stride=4)
            self.head = nn.Conv2d(16, 5, 1)

        def global_context(self, images):
            return self.encoder(images)

        def forward(self, windows, context):
            return self.head(torch.cat([self.encoder(windows), context], dim=1))

    torch.manual_seed(0)
    model, images = Segmenter().eval(), torch.randn(2, 3, 100, 150)
    infer = SlidingWindow(model, window=64, overlap=16, context="aligned")
    logits = infer(images)
    assert logits.shape == (2, 5, 100, 150)
    images[0] += 1
    changed = infer(images)
    assert not torch.equal(changed[0], logits[0])
    assert torch.equal(changed[1], logits[1])


def test_each_window_is_given_its_images_tokens():
    model = Recorded(1, tokens=4)
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 6, 40, 70)
    SlidingWindow(model, 32, 8, context="tokens", batch=2)(images)
    assert model.seen == [(2, 6, 32, 32), (1, 6, 32, 32)]
    given = torch.cat(model.given)
    assert given.shape == (3 * 2 * 3, 4, 6)
    want = torch.arange(3.0).repeat_interleave(6).view(-1, 1, 1).expand_as(given)
    torch.testing.assert_close(given, want)


def test_by_its_context_a_window_knows_of_what_lies_outside():
    class Pooled(nn.Module):
        def global_context(self, images):
            return images.mean((2, 3))[:, None]

        def forward(self, windows, context):
            return windows + context[:, 0, :, None, None]

    infer, images = SlidingWindow(Pooled(), 32, 8, context="tokens"), torch.zeros(2, 3, 128, 128)
    images[0, :, 64:] = 1
    logits = infer(images)
    torch.testing.assert_close(logits[0, :, :64], torch.full((3, 64, 128), 0.5))  # half of the image is 1
    assert not logits[1].any()


def test_half_precision_knows_its_coordinates():
    class Half(Recorded):
        def global_context(self, images):
            assert images.dtype == torch.bfloat16
            return super().global_context(images).bfloat16()

    model = Half(8)
    SlidingWindow(model, 64, 16, context="aligned")(torch.zeros(1, 3, 100, 400).bfloat16())
    assert model.given[0].dtype == torch.bfloat16
    exact = Recorded(8)
    SlidingWindow(exact, 64, 16, context="aligned")(torch.zeros(1, 3, 100, 400))
    torch.testing.assert_close(model.given[0].float(), exact.given[0], rtol=0, atol=1 / 128)


@given(size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)), stride=st.sampled_from([1, 14, 32]))
def test_low_resolution_fits_the_window_and_keeps_the_aspect(size, stride):
    window = (512, 384)
    small = low_resolution(size, window, stride)
    assert all(side % stride == 0 and stride <= side <= limit for side, limit in zip(small, window, strict=True))
    scale = min(1, window[0] / size[0], window[1] / size[1])
    for side, length in zip(small, size, strict=True):
        assert abs(side - length * scale) <= stride


@pytest.mark.parametrize(
    ("size", "small"),
    [((1000, 1200), (416, 512)), ((300, 300), (288, 288)), ((1, 4000), (32, 512)), ((9, 9), (32, 32))],
)
def test_low_resolution(size, small):
    assert low_resolution(size, (512, 512), 32) == small


class Lacking(nn.Module):
    def global_context(self, images):
        return images

    def forward(self, windows):
        return windows


@pytest.mark.parametrize("model", [nn.Identity(), Lacking(), lambda windows, context: windows])
@pytest.mark.parametrize("context", ["aligned", "tokens"])
def test_models_without_the_contract_are_refused(model, context):
    with pytest.raises(
        ValueError, match=rf"context = '{context}': needs a model with global_context\(images\) and forw"
    ):
        SlidingWindow(model, 32, 8, context=context)


@pytest.mark.parametrize("stride", [0, 33])
def test_a_stride_that_fits_no_window_is_refused(stride):
    with pytest.raises(ValueError, match=f"context_stride = {stride}: from 1 to 32"):
        SlidingWindow(Recorded(8), (48, 32), 8, context="aligned", context_stride=stride)


def test_contexts_of_another_shape_are_refused():
    images = torch.zeros(2, 3, 40, 40)
    with pytest.raises(ValueError, match=r"gave \(2, 2, 4, 4\): \(B, G, D\) would be right for context='tokens'"):
        SlidingWindow(Recorded(8), 32, 8, context="tokens")(images)
    with pytest.raises(ValueError, match=r"gave \(2, 4, 3\): \(B, D, rows, cols\) would be right"):
        SlidingWindow(Recorded(8, tokens=4), 32, 8, context="aligned")(images)
    model = Recorded(8)
    model.global_context = lambda images: (images, images)
    with pytest.raises(ValueError, match="global_context gave tuple"):
        SlidingWindow(model, 32, 8, context="aligned")(images)


def test_the_grid_is_that_of_interpolate():
    """One window over the whole image: what F.interpolate makes of the map, for a map of any content."""
    torch.manual_seed(0)
    model, some = Recorded(8), torch.randn(1, 5, 4, 4)
    model.global_context = lambda images: some
    SlidingWindow(model, 128, 8, context="aligned", context_stride=32)(torch.zeros(1, 3, 128, 32))
    assert low_resolution((128, 32), (128, 128), 32) == (128, 32)
    # 4 x 4 cells over 128 x 32 pixels; the window is 128 x 128: 4 x 16 cells, of which the image's are 4 x 4
    assert model.given[0].shape == (1, 5, 4, 16)
    torch.testing.assert_close(model.given[0][..., :4], some, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.given[0][..., 4:], some[..., -1:].expand(-1, -1, -1, 12), rtol=0, atol=1e-6)
    large = torch.zeros(1, 3, 256, 256)
    model.given.clear()
    SlidingWindow(model, 128, 0, context="aligned", batch=4)(large)
    whole = F.interpolate(some, size=(8, 8), mode="bilinear", align_corners=False)
    parts = torch.cat([torch.cat([*model.given[0][2 * i : 2 * i + 2]], dim=2) for i in range(2)], dim=1)
    torch.testing.assert_close(parts, whole[0], rtol=0, atol=1e-6)
