"""DINO: the loss is its docstring's loop, the teacher only follows, parts of a batch add up to the whole."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes_under_test import load_recipe

from ssl_global.methods import heads
from ssl_global.methods.chunks import AT_ONCE
from ssl_global.methods.dino import Said, region_loss
from ssl_global.methods.dino_loss import dino_loss
from ssl_global.schedules import Progress

START = Progress(step=0, num_steps=100, steps_per_epoch=10)
LATER = Progress(step=50, num_steps=100, steps_per_epoch=10)


def build(name="dino", **method):
    recipe = load_recipe(name, "demo", drop_path=0.0)
    recipe = replace(recipe, method=replace(recipe.method, **method))
    recipe.check()
    torch.manual_seed(0)
    return recipe.method.build(recipe)


WAYS = {"vit": {}, "vit_regions": {"region_loss": True}, "swin": {"name": "dino_swin"},
        "swin_regions": {"name": "dino_swin", "region_loss": True}}  # fmt: skip


def batch(num_images=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [32, 32, 16, 16, 16, 16]
    return {"views": [torch.randn(num_images, 3, s, s, generator=generator) for s in sizes], "seed": None, "key": []}


def part(whole, images):
    return whole | {"views": [view[images] for view in whole["views"]]}


def slow_loss(student, teacher, temp):
    total, pairs = 0.0, 0
    for g in range(len(teacher)):
        for v in range(len(student)):
            if v == g:
                continue
            log_p = torch.log_softmax(student[v].double() / temp, -1)
            total += -(teacher[g].double() * log_p).sum(-1).mean()
            pairs += 1
    return total / pairs


@given(num_global=st.integers(1, 3), num_local=st.integers(0, 6), num_images=st.integers(1, 4), k=st.integers(2, 50))
def test_loss_is_the_slow_loop(num_global, num_local, num_images, k):
    if num_global + num_local < 2:
        with pytest.raises(ValueError, match="different views"):
            dino_loss(torch.zeros(1, 1, k), torch.zeros(1, 1, k), student_temp=0.1)
        return
    generator = torch.Generator().manual_seed(k)
    student = torch.randn(num_global + num_local, num_images, k, generator=generator, requires_grad=True)
    teacher = (5 * torch.randn(num_global, num_images, k, generator=generator)).softmax(-1)
    fast, slow = dino_loss(student, teacher, student_temp=0.1), slow_loss(student, teacher, 0.1)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5, abs=1e-6)
    (gradient,) = torch.autograd.grad(fast, student)
    (expected,) = torch.autograd.grad(slow, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 100, 2**18])
def test_loss_is_the_same_however_many_images_at_once(monkeypatch, at_once):
    """Values and gradients are the slow loop's; the gradient carries what the loss is scaled by."""
    monkeypatch.setitem(AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 7, 30, generator=generator, requires_grad=True)
    teacher = (5 * torch.randn(2, 7, 30, generator=generator)).softmax(-1)
    loss = dino_loss(student, teacher, student_temp=0.1)
    (3 * loss).backward()
    (expected,) = torch.autograd.grad(3 * slow_loss(student, teacher, 0.1), student)
    torch.testing.assert_close(student.grad, expected.float(), rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert dino_loss(student, teacher, student_temp=0.1) == loss


def test_the_gradient_can_be_had_once():
    loss = dino_loss(torch.randn(3, 2, 8, requires_grad=True), torch.randn(2, 2, 8).softmax(-1), student_temp=0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="kept for one time only"):
        loss.backward()


def test_fp16_with_its_scale_loses_no_gradient():
    """65 536 prototypes share 1: without the loss's scale fp16 has no numbers so small as what each of them gets."""
    student, teacher = torch.randn(4, 64, 2**16).mul_(0.05), torch.full((2, 64, 2**16), 2.0**-17)
    teacher[..., 0] += 0.5
    gradients = []
    for precision, scale in ((torch.float32, 1), (torch.float16, 2**16)):
        logits = student.to(precision, copy=True).requires_grad_()
        (dino_loss(logits, teacher, student_temp=0.1) * scale).backward()
        gradients.append(logits.grad[..., 1:].double() / scale)
    wanted, found = gradients
    assert (found - wanted).norm() < 5e-3 * wanted.norm()


def test_loss_is_float32_under_autocast():
    student, teacher = torch.randn(4, 2, 8), torch.randn(2, 2, 8).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert dino_loss(student, teacher, student_temp=0.1) == dino_loss(student, teacher, student_temp=0.1)
        assert dino_loss(student.bfloat16(), teacher, student_temp=0.1).dtype == torch.float32


def test_forward_is_the_paper_in_float64():
    """Teacher softmax((t - c) / tau_t) on global views, student on all of them, against the two spelled out."""
    dino, views = build(), batch()
    dino.centre.value.normal_(std=0.1)
    dino.begin_step(LATER)
    output = dino(views, LATER)
    teacher = torch.stack([dino.teacher.head(dino.teacher.encoder(v).summary) for v in views["views"][:2]]).double()
    student = torch.stack([dino.student.head(dino.student.encoder(v).summary) for v in views["views"]]).double()
    targets = ((teacher - dino.centre.value.double()) / 0.04).softmax(-1)
    assert output["loss"].item() == pytest.approx(slow_loss(student, targets, 0.1).item(), rel=1e-4)
    entropy = -(targets * targets.log()).sum(-1).mean()
    assert output["teacher_entropy_share"].item() == pytest.approx(entropy.item() / math.log(1024), rel=1e-4)
    assert output["teacher_kl"].item() == pytest.approx(output["loss"].item() - entropy.item(), rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_all_of_the_student_and_none_of_the_teacher(way):
    dino = build(**WAYS[way])
    dino.begin_step(LATER)
    dino(batch(), LATER)["loss"].backward()
    assert [n for n, p in dino.student.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None and not p.requires_grad for p in dino.teacher.parameters())


def test_prototypes_are_frozen_in_the_first_epoch_only():
    end_of_epoch = Progress(step=9, num_steps=100, steps_per_epoch=10)
    for progress, frozen in ((START, True), (end_of_epoch, True), (LATER, False)):
        dino = build(region_loss=True)
        dino.begin_step(progress)
        dino(batch(), progress)["loss"].backward()
        dino.gradients_done(progress)
        for head in (dino.student.head, dino.student.region_head):
            assert (head.prototypes.weight.grad is None) == frozen


def test_teacher_and_centre_move_as_the_paper_says():
    dino, views = build(), batch()
    with torch.no_grad():
        for parameter in dino.student.parameters():
            parameter.add_(0.1)
    before = copy.deepcopy(dino.teacher.state_dict())
    with torch.no_grad():
        logits = dino.teacher(views["views"][:2]).logits
    dino.begin_step(LATER)
    dino(views, LATER)
    dino.after_step(LATER)
    momentum = 1 - (1 - 0.99) * (math.cos(math.pi * 0.5) + 1) / 2
    student = dino.student.state_dict()
    for name, tensor in dino.teacher.state_dict().items():
        torch.testing.assert_close(tensor, momentum * before[name] + (1 - momentum) * student[name])
    torch.testing.assert_close(dino.centre.value, 0.1 * logits.mean(0))


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_batch_add_up_to_the_whole(way):
    """Loss, gradient and centre: four images at once, or two and two."""
    whole, parted, views = build(**WAYS[way]), build(**WAYS[way]), batch(4)
    whole.begin_step(LATER)
    loss = whole(views, LATER)["loss"]
    loss.backward()
    whole.after_step(LATER)
    parted.begin_step(LATER)
    losses = []
    for images in (slice(0, 2), slice(2, 4)):
        losses.append(parted(part(views, images), LATER)["loss"] / 2)
        losses[-1].backward()
    parted.after_step(LATER)
    assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(parted.centres(), whole.centres(), strict=True):
        torch.testing.assert_close(mine.value, theirs.value)
    for mine, theirs in zip(whole.student.parameters(), parted.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_pieces_by_view_add_up_to_the_whole(way):
    """Loss, every figure, gradient and centre: all views in one backward pass, or in three."""
    whole, split, views = build(**WAYS[way]), build(**WAYS[way]), batch(4)
    split.split_views = True
    for model in (whole, split):
        torch.manual_seed(1)
        torch.nn.init.normal_(model.centre.value, std=0.1)
        model.begin_step(LATER)
    at_once = whole(views, LATER)
    at_once["loss"].backward()
    found = []
    pieces = split.pieces(views)
    assert [list(piece["student_views"]) for piece in pieces] == [[0], [1], [2, 3, 4, 5]]
    for piece in pieces:
        found.append(split(piece, LATER))
        found[-1]["loss"].backward()
    for name, figure in at_once.items():
        assert sum(of[name].item() for of in found) == pytest.approx(figure.item(), rel=1e-5, abs=1e-6)
    for model in (whole, split):
        model.after_step(LATER)
    for mine, theirs in zip(split.centres(), whole.centres(), strict=True):
        assert torch.equal(mine.value, theirs.value)
    for mine, theirs in zip(split.student.parameters(), whole.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_pieces_of_a_step_that_was_given_up_leave_nothing_to_the_next():
    split = build()
    split.split_views = True
    split.begin_step(LATER)
    split(split.pieces(batch(4))[0], LATER)
    split.begin_step(LATER)
    fresh = build()
    fresh.begin_step(LATER)
    other = batch(4, seed=1)
    assert torch.equal(split(split.pieces(other)[0], LATER)["teacher_kl"].isfinite(), torch.tensor(True))
    losses = [split(piece, LATER)["loss"].item() for piece in split.pieces(other)[1:]]
    split.begin_step(LATER)
    again = [split(piece, LATER)["loss"].item() for piece in split.pieces(other)]
    assert losses == again[1:]
    assert sum(again) == pytest.approx(fresh(other, LATER)["loss"].item(), rel=1e-5)


@given(rows=st.integers(1, 40), width=st.integers(1, 40), at_once=st.integers(1, 200))
def test_rows_of_unit_length_are_torchs(rows, width, at_once):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, width, generator=generator).requires_grad_()
    of_unit = torch.randn(rows, width, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AT_ONCE, "cpu", at_once)
        unit = heads.UnitRows.apply(weight)
        unit.backward(of_unit)
    slow = weight.detach().double().requires_grad_()
    torch.nn.functional.normalize(slow, dim=-1).backward(of_unit.double())
    torch.testing.assert_close(unit.double(), torch.nn.functional.normalize(slow, dim=-1), rtol=1e-6, atol=1e-6)
    scale = slow.grad.abs().max().item() + 1 / weight.detach().norm(dim=1).min().item()
    torch.testing.assert_close(weight.grad.double(), slow.grad, rtol=1e-5, atol=1e-5 * scale)


def slow_region_loss(student, teacher, temp):
    """Of `Said`: a loop over views, images and patches, in float64."""
    total, pairs = 0.0, 0
    for g in range(len(teacher.region_logits)):
        for v in range(len(student.region_logits)):
            if v == g:
                continue
            num_images, num_patches, _ = student.region_logits[v].shape
            for b in range(num_images):
                for i in range(num_patches):
                    cosines = torch.cosine_similarity(
                        student.patches[v][b, i].double()[None], teacher.patches[g][b].double(), dim=-1
                    )
                    target = teacher.region_logits[g][b, cosines.argmax()].double()
                    log_p = torch.log_softmax(student.region_logits[v][b, i].double() / temp, -1)
                    total += -(target * log_p).sum() / (num_patches * num_images)
            pairs += 1
    return total / pairs


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), num_global=st.integers(1, 2), k=st.integers(2, 20))
def test_the_region_loss_is_the_slow_loop(sizes, num_global, k):
    """Views of any numbers of patches."""
    generator = torch.Generator().manual_seed(k)

    def said(views, logits):
        of = [torch.randn(2, n, 6, generator=generator) for n in views]
        return Said(
            torch.zeros(1), torch.zeros(1), of, [logits(torch.randn(2, n, k, generator=generator)) for n in views]
        )

    student = said(sizes, lambda x: x.requires_grad_())
    teacher = said(sizes[:num_global], lambda x: (5 * x).softmax(-1))
    if len(sizes) < 2:
        with pytest.raises(ValueError, match="different views"):
            region_loss(student, teacher, student_temp=0.1)
        return
    fast, slow = region_loss(student, teacher, student_temp=0.1), slow_region_loss(student, teacher, 0.1)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-4, abs=1e-5)
    gradients = [torch.autograd.grad(loss, student.region_logits, allow_unused=True) for loss in (fast, slow)]
    for mine, expected in zip(*gradients, strict=True):
        assert (mine is None) == (expected is None)  # one global view alone is compared with no other
        if mine is not None:
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["dino", "dino_swin"])
def test_with_regions_the_loss_is_half_of_each_and_both_centres_move(name):
    dino, views = build(name, region_loss=True), batch()
    dino.region_centre.value.normal_(std=0.1)
    before = dino.region_centre.value.clone()
    dino.begin_step(LATER)
    output = dino(views, LATER)
    assert output["loss"].item() == pytest.approx((output["view_loss"] + output["region_loss"]).item() / 2, rel=1e-6)
    with torch.no_grad():
        student, teacher = dino.student(views["views"]), dino.teacher(views["views"][:2])
    raw = torch.cat([logits.flatten(0, 1) for logits in teacher.region_logits])
    targets = [((logits - before) / 0.04).softmax(-1) for logits in teacher.region_logits]
    expected = slow_region_loss(student, replace(teacher, region_logits=targets), 0.1)
    assert output["region_loss"].item() == pytest.approx(expected.item(), rel=1e-3)
    dino.after_step(LATER)
    torch.testing.assert_close(dino.region_centre.value, 0.9 * before + 0.1 * raw.mean(0))


def test_a_skipped_step_leaves_nothing_behind():
    dino = build()
    dino.begin_step(LATER)
    dino(batch(seed=1), LATER)  # this step is skipped: no after_step
    dino.begin_step(LATER)
    dino(batch(seed=2), LATER)
    dino.after_step(LATER)
    other = build()
    other.begin_step(LATER)
    other(batch(seed=2), LATER)
    other.after_step(LATER)
    assert torch.equal(dino.centre.value, other.centre.value)


def test_logits_are_cosines():
    dino = build()
    features, weight = torch.randn(5, 192), dino.student.head.prototypes.weight
    narrow = dino.student.head.mlp(features)
    expected = torch.nn.functional.cosine_similarity(narrow[:, None], weight[None], dim=-1)
    torch.testing.assert_close(dino.student.head(features), expected)
