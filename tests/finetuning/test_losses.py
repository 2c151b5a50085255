"""The loss is its slow loop, in float64; and what it is where nothing, or little, counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_global.finetuning.losses import pixel_loss

K = 4


def slowly(logits, target, **options):
    """Image by image."""
    return torch.stack([of_image(*pair, **options) for pair in zip(logits, target, strict=True)]).mean()


def of_image(logits, target, ignore_index=255, class_weights=None, dice=1.0):
    """Pixel by pixel, class by class."""
    weights = [1.0] * len(logits) if class_weights is None else class_weights.tolist()
    pixels = [
        (logits[:, y, x].softmax(0), int(target[y, x]))
        for y in range(logits.shape[1]) for x in range(logits.shape[2])
        if target[y, x] != ignore_index
    ]  # fmt: skip
    if not pixels:
        return logits.sum() * 0
    weight = sum(weights[k] for _, k in pixels)
    loss = sum(weights[k] * -p[k].log() for p, k in pixels) / weight if weight else 0.0
    overlaps = []
    for k in {k for _, k in pixels}:
        both = sum(p[k] for p, true in pixels if true == k)
        overlaps.append(2 * both / sum(p[k] ** 2 + (true == k) for p, true in pixels))
    return loss + dice * (1 - sum(overlaps) / len(overlaps))


@given(
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    num_classes=st.integers(1, 5),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    ignore_index=st.sampled_from([255, -100, 0]),
    weighted=st.booleans(),
    dice=st.sampled_from([0.0, 1.0, 0.3]),
)
def test_it_is_the_slow_loop(seed, shape, num_classes, ignored, ignore_index, weighted, dice):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape[0], num_classes, *shape[1:], generator=generator).double()).requires_grad_()
    target = torch.randint(num_classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = ignore_index
    weights = torch.rand(num_classes, generator=generator).round(decimals=1).double() if weighted else None
    options = {"ignore_index": ignore_index, "class_weights": weights, "dice": dice}
    fast, slow = pixel_loss(logits, target, **options), slowly(logits, target, **options)
    assert fast.dtype == torch.float64
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (fast, slow)))


def test_a_batch_in_parts_has_the_same_loss():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(4, K, 5, 6, generator=generator), torch.randint(K, (4, 5, 6), generator=generator)
    target[1, :3] = 255
    parts = [pixel_loss(x, y) for x, y in zip(logits.split(2), target.split(2), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), pixel_loss(logits, target))


def test_where_no_pixel_counts_it_is_0_and_so_is_its_gradient():
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(2, K, 3, 3, dtype=dtype, requires_grad=True)
        loss = pixel_loss(logits, torch.full((2, 3, 3), 255, dtype=torch.uint8), class_weights=torch.rand(K))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_what_is_ignored_has_no_gradient():
    logits = torch.randn(1, K, 2, 2, requires_grad=True)
    pixel_loss(logits, torch.tensor([[[0, 255], [3, 1]]])).backward()
    assert not logits.grad[0, :, 0, 1].any()
    assert logits.grad[0, :, 0, 0].all()


def test_a_perfect_answer_costs_nothing_and_a_wrong_one_all():
    target = torch.tensor([[[0, 1], [1, 255]]])
    right = torch.zeros(1, K, 2, 2).scatter_(1, target.clamp_max(K - 1)[:, None], 100.0)
    assert pixel_loss(right, target).item() == pytest.approx(0, abs=1e-6)
    wrong = torch.zeros(1, K, 2, 2)
    wrong[:, 2] = 100.0
    assert (pixel_loss(wrong, target) - pixel_loss(wrong, target, dice=0.0)).item() == pytest.approx(1)


def test_half_precision_is_computed_in_single():
    logits = torch.randn(1, K, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.randint(K, (1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    assert pixel_loss(logits, target).dtype == torch.float32
    torch.testing.assert_close(pixel_loss(logits, target), pixel_loss(logits.float(), target), rtol=0, atol=0)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\).*\(1, 4, 4\)"):
        pixel_loss(torch.randn(1, K, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64))
