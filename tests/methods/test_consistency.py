"""Consistency: the loss is its docstring's loop, an image's own views are never negatives, DINO can add it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from recipes_under_test import load_recipe

from ssl_global.errors import UserError
from ssl_global.methods.consistency_loss import consistency_loss
from ssl_global.schedules import Progress

LATER = Progress(step=50, num_steps=100, steps_per_epoch=10)


def build(name="consistency", **method):
    recipe = load_recipe(name, "demo", drop_path=0.0)
    recipe = replace(recipe, method=replace(recipe.method, **method))
    recipe.check()
    torch.manual_seed(0)
    return recipe.method.build(recipe)


def batch(num_images=4):
    generator = torch.Generator().manual_seed(0)
    sizes = [32, 32, 16, 16, 16, 16]
    return {"views": [torch.randn(num_images, 3, s, s, generator=generator) for s in sizes], "seed": None, "key": []}


def projections(count, num_images, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, num_images, width, generator=generator, requires_grad=True)


def slow_loss(global_views, local_views, temp):
    global_views, local_views = (
        v.double() / v.double().norm(dim=-1, keepdim=True) for v in (global_views, local_views)
    )
    num_images, total = global_views.shape[1], 0.0
    for anchors, others in ((global_views, local_views), (local_views, global_views)):
        for i in range(num_images):
            for anchor in anchors[:, i]:
                unlike = sum(
                    torch.exp(anchor @ other[j] / temp) for other in others for j in range(num_images) if j != i
                )
                for positive in others[:, i]:
                    alike = torch.exp(anchor @ positive / temp)
                    total += -torch.log(alike / (alike + unlike))
    return total / (2 * len(global_views) * len(local_views) * num_images)


@given(num_global=st.integers(1, 3), num_local=st.integers(1, 4), num_images=st.integers(1, 4), seed=st.integers(0, 9))
def test_loss_is_the_slow_loop(num_global, num_local, num_images, seed):
    views = projections(num_global, num_images, seed=seed), projections(num_local, num_images, seed=seed + 1)
    if num_images == 1:
        with pytest.raises(ValueError, match="at least 2 images"):
            consistency_loss(*views, temp=0.2)
        return
    fast, slow = consistency_loss(*views, temp=0.2), slow_loss(*views, 0.2)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5, abs=1e-6)
    for mine, expected in zip(torch.autograd.grad(fast, views), torch.autograd.grad(slow, views), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temp", [0.01, 0.1, 1.0])
def test_with_one_view_of_each_it_is_the_symmetric_cross_entropy(temp):
    first, second = projections(1, 5, seed=1), projections(1, 5, seed=2)
    cosines = F.cosine_similarity(first[0][:, None].double(), second[0][None].double(), dim=-1) / temp
    expected = (F.cross_entropy(cosines, torch.arange(5)) + F.cross_entropy(cosines.T, torch.arange(5))) / 2
    assert consistency_loss(first, second, temp=temp).item() == pytest.approx(expected.item(), rel=1e-4)


def test_views_of_one_image_are_never_negatives():
    """All views of an image alike, those of others at right angles: nothing is left to learn. With an image's own views
    among the negatives each term would be at least log 2."""
    alike = torch.eye(4)[None].repeat(6, 1, 1)
    assert consistency_loss(alike[:2], alike[2:], temp=0.05).item() < 1e-7


def test_loss_is_float32_and_the_same_under_autocast():
    views = projections(2, 3), projections(3, 3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert consistency_loss(*views, temp=0.1) == consistency_loss(*views, temp=0.1)
        assert consistency_loss(*(view.bfloat16() for view in views), temp=0.1).dtype == torch.float32


def test_forward_spelled_out_and_gradients_reach_everything():
    method, views = build(), batch()
    loss = method(views, LATER)["loss"]
    projected = torch.stack([method.projector(method.encoder(view).summary) for view in views["views"]])
    assert loss.item() == pytest.approx(slow_loss(projected[:2], projected[2:], 0.1).item(), rel=1e-4)
    loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_parts_that_are_taken_at_once_have_two_images_at_least():
    recipe = load_recipe("consistency", "demo")
    assert recipe.method.images_together() == 2
    dino = load_recipe("dino", "demo").method
    assert (dino.images_together(), replace(dino, consistency_weight=0.5).images_together()) == (1, 2)


def test_dino_adds_it_and_is_as_before_without():
    views = batch()
    plain, added = build("dino"), build("dino", consistency_weight=0.5, consistency_temp=0.2)
    own = {name for name, _ in added.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert own == {f"projector.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    for method in (plain, added):
        method.begin_step(LATER)
    without, with_it = plain(views, LATER), added(views, LATER)
    projected = torch.stack([added.projector(added.student.encoder(view).summary) for view in views["views"]])
    expected = slow_loss(projected[:2], projected[2:], 0.2).item()
    assert with_it["consistency_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert with_it["loss"].item() == pytest.approx(without["loss"].item() + 0.5 * expected, rel=1e-5)
    assert "consistency_loss" not in without
    with_it["loss"].backward()
    assert [name for name, p in added.student.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.any() for p in added.projector.parameters())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("consistency", {"temp": 0.0}, "method.temp = 0.0: above 0"),
        ("consistency", {"projector_width": 0}, "method.projector_width = 0: at least 1"),
        ("dino", {"consistency_weight": -1.0}, r"method.consistency_weight = -1.0: 0 \(none\) or more"),
        ("dino", {"consistency_temp": 0.0}, "method.consistency_temp = 0.0: above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, change, words):
    with pytest.raises(UserError, match=words):
        build(name, **change)


@pytest.mark.parametrize(("name", "change"), [("consistency", {}), ("dino", {"consistency_weight": 1.0})])
def test_without_local_views_it_is_refused(name, change):
    recipe = load_recipe(name, "demo")
    views = replace(recipe.views, locals=replace(recipe.views.locals, count=0))
    with pytest.raises(UserError, match=r"views\.locals\.count"):
        replace(recipe, views=views, method=replace(recipe.method, **change)).check()
