"""DINOv2: each loss is its docstring's loop, the student sees no hidden pixel, parts of a batch add up to the whole."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from recipes_under_test import load_recipe
from timm.optim import param_groups_layer_decay

from ssl_global.encoders.weights import Weights
from ssl_global.errors import UserError
from ssl_global.methods.chunks import AT_ONCE
from ssl_global.methods.gram import gram_loss, resized
from ssl_global.methods.ibot_loss import ibot_loss
from ssl_global.methods.koleo import koleo_loss
from ssl_global.methods.masking import block_hidden
from ssl_global.methods.sinkhorn import sinkhorn_offsets
from ssl_global.schedules import Progress

LATER = Progress(step=50, num_steps=100, steps_per_epoch=10)
SMALL = {"prototypes": 64, "head_hidden": 32, "head_bottleneck": 16, "koleo_images": 2, "koleo_weight": 0.1}
SINKHORN = {"centring": "sinkhorn", "separate_heads": True}
GRAM = {"gram_weight": 2.0, "gram_every_steps": 3}
VIT = {"width": 32, "depth": 2, "heads": 2}
SWIN = {"width": 16, "depths": (1, 2), "heads": (1, 2), "patch": 4, "tokens": 2}
ENCODERS = {"dinov2": VIT, "dinov2_swin": SWIN}
WAYS = [("dinov2", {}), ("dinov2", SINKHORN), ("dinov2", GRAM), ("dinov2_swin", {}), ("dinov2_swin", SINKHORN)]


def build(name="dinov2", *, function="demo", **method):
    recipe = load_recipe(name, function, drop_path=0.0, **ENCODERS[name])
    recipe = replace(recipe, method=replace(recipe.method, **SMALL | method))
    recipe.check()
    torch.manual_seed(0)
    built = recipe.method.build(recipe)
    with torch.no_grad():  # centres, a teacher and a Gram teacher that are not the student's copies
        for centre in built.centres():
            centre.value.normal_(std=0.1)
        for parameter in built.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for parameter in built.gram_teacher.parameters() if built.gram_teacher else ():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return built


def batch(num_images=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(num_images, 3, size, size, generator=generator) for size in (32, 32, 16, 16)]
    seeds = torch.randint(2**62, (num_images,), generator=generator)
    return {"views": views, "seed": seeds, "seeds": seeds.tolist(), "key": []}


def part(whole, images):
    views = [view[images] for view in whole["views"]]
    return whole | {"views": views, "seed": whole["seed"][images], "seeds": whole["seeds"][images]}


# ------------------------------------------------------------------------------------------------------ what is hidden


@settings(deadline=None)
@given(rows=st.integers(1, 20), cols=st.integers(1, 20), ratio=st.floats(0, 0.99), seed=st.integers(0, 2**63 - 1))
def test_exactly_so_many_patches_are_hidden(rows, cols, ratio, seed):
    (hidden,) = block_hidden([seed], (rows, cols), view=0, share=1.0, ratios=(ratio, ratio))
    assert hidden.dtype == bool
    assert hidden.shape == (rows, cols)
    assert hidden.sum() == max(int(rows * cols * ratio), 1)


def test_what_is_hidden_depends_on_the_image_and_the_view_only():
    settings = {"share": 0.5, "ratios": (0.1, 0.5)}
    seeds = list(range(2000))
    first, second = (torch.from_numpy(block_hidden(seeds, (14, 14), view=view, **settings)) for view in (0, 1))
    assert np.array_equal(first[5:9], block_hidden(seeds[5:9], (14, 14), view=0, **settings))
    assert not torch.equal(first, second)
    share = first.flatten(1).float().mean(1)
    assert (share > 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    some = share[share > 0]
    assert int(196 * 0.1) / 196 <= some.min() <= 0.12
    assert 0.48 <= some.max() <= 0.5
    assert some.mean().item() == pytest.approx(0.3, abs=0.01)
    places = first.float().mean(0)  # the middle is hidden more often than the edge, as by any blocks that lie inside
    assert all((places - other).abs().max() < 0.06 for other in (places.flip(0), places.flip(1), places.T))
    # In blocks: a hidden patch's right neighbour is hidden far more often than patches are.
    beside = (first[..., 1:] & first[..., :-1]).sum() / first[..., :-1].sum()
    assert beside > 0.75


@pytest.mark.parametrize("name", ENCODERS)
def test_the_student_sees_no_hidden_pixel(name):
    """No gradient reaches them, and other pixels there change nothing that the student says; the teacher sees all."""
    method, whole = build(name), batch(8)
    hidden = method.hide(whole)
    pixels = hidden.replaced.repeat_interleave(method.patch, 1).repeat_interleave(method.patch, 2)[:, None]
    assert 0 < hidden.replaced.float().mean() < 0.5
    seen = torch.cat(whole["views"][:2]).requires_grad_()
    local = whole["views"][2:]

    def say(images):
        said = method.student(images, hidden.index, local, replaced=hidden.replaced, token=method.token)
        return torch.cat([said.logits, said.patch_logits])

    said = say(seen)
    (said * torch.randn_like(said)).sum().backward()
    assert not (seen.grad * pixels).any()
    assert (seen.grad * ~pixels).any()
    other = torch.where(pixels, torch.randn_like(seen), seen)
    with torch.no_grad():
        assert torch.equal(say(other), say(seen))
        assert not torch.equal(method.ask_teacher(other, hidden)[1], method.ask_teacher(seen, hidden)[1])


# ------------------------------------------------------------------------------------------------- losses, slow loops


@settings(deadline=None)
@given(m=st.integers(0, 9), k=st.integers(2, 40), temp=st.sampled_from([0.04, 0.1, 1.0]), at_once=st.integers(1, 100))
def test_the_loss_on_hidden_patches_is_the_slow_loop(m, k, temp, at_once):
    generator = torch.Generator().manual_seed(m * 100 + k)
    student = torch.randn(m, k, generator=generator, requires_grad=True)
    teacher = (5 * torch.randn(m, k, generator=generator)).softmax(-1)
    weight = torch.rand(m, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AT_ONCE, "cpu", at_once)
        fast = ibot_loss(student, teacher, weight, student_temp=temp)
    slow = torch.zeros((), dtype=torch.float64)
    for i in range(m):
        slow = slow - weight[i] * (teacher[i].double() * torch.log_softmax(student[i].double() / temp, -1)).sum()
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5, abs=1e-6)
    (3 * fast).backward()
    if m:
        (expected,) = torch.autograd.grad(3 * slow, student)
        torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-4)


def test_fp16_with_its_scale_loses_no_gradient_of_hidden_patches():
    student, teacher = torch.randn(32, 2**16).mul_(0.05), torch.full((32, 2**16), 2.0**-17)
    teacher[:, 0] += 0.5
    weight = torch.linspace(1e-4, 1e-3, 32)  # of a few thousand hidden patches, more in some views than in others
    gradients = []
    for precision, scale in ((torch.float32, 1), (torch.float16, 2**16)):
        logits = student.to(precision, copy=True).requires_grad_()
        (ibot_loss(logits, teacher, weight, student_temp=0.1) * scale).backward()
        gradients.append(logits.grad[:, 1:].double() / scale)
    wanted, found = gradients
    assert (found - wanted).norm() < 2e-2 * wanted.norm()


def slow_sinkhorn(logits, temp, rounds):
    """In numpy; the largest exponent is taken off first, which the first round cancels."""
    q = np.exp((logits - logits.max()) / temp)
    for _ in range(rounds):
        q = q / q.sum(0, keepdims=True)
        q = q / q.sum(1, keepdims=True)
    return q


@settings(deadline=None)
@given(
    cut=st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any), k=st.integers(2, 30),
    temp=st.floats(0.01, 1), rounds=st.integers(1, 4),
)  # fmt: skip
def test_sinkhorn_is_the_slow_loop_however_the_batch_is_cut(cut, k, temp, rounds):
    """float64 to its precision, float32 to its own; of cosines, as the heads give them."""
    logits = np.random.default_rng(sum(cut) * 100 + k).uniform(-1, 1, (sum(cut), k))
    expected = slow_sinkhorn(logits, temp, rounds)
    whole = torch.from_numpy(logits)
    offsets = sinkhorn_offsets(whole.split(cut), temp=temp, rounds=rounds)
    np.testing.assert_allclose((whole / temp + offsets).softmax(-1), expected, rtol=1e-9, atol=1e-12)
    offsets = sinkhorn_offsets(whole.float().split(cut), temp=temp, rounds=rounds)
    assert offsets.dtype == torch.float32
    np.testing.assert_allclose((whole.float() / temp + offsets).softmax(-1), expected, rtol=2e-4, atol=1e-6)


def test_sinkhorn_uses_all_prototypes_and_a_few_rows_at_a_time_are_the_same(monkeypatch):
    """Where a softmax would give all to one; and where exp(logit / temp) is beyond float32 and below it."""
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    logits[:, 3] += 5
    for temp in (0.01, 0.04, 1.0):
        assert torch.isinf((logits / temp).exp()).any() == (temp <= 0.04)
        p = (logits / temp + sinkhorn_offsets([logits], temp=temp, rounds=50)).softmax(-1)
        torch.testing.assert_close(p.mean(0), torch.full((16,), 1 / 16), rtol=0.05, atol=0)
    at_once = sinkhorn_offsets([logits], temp=0.04, rounds=3)
    monkeypatch.setitem(AT_ONCE, "cpu", 80)
    torch.testing.assert_close(sinkhorn_offsets([logits], temp=0.04, rounds=3), at_once)
    assert sinkhorn_offsets([logits[:0]], temp=0.04, rounds=3).shape == (16,)


@settings(deadline=None)
@given(groups=st.integers(1, 3), among=st.integers(2, 6), d=st.integers(2, 8))
def test_koleo_is_the_slow_loop(groups, among, d):
    x = torch.randn(groups * among, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d * 10 + among))
    x.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(x)):
        first = b // among * among
        others = [n for n in range(first, first + among) if n != b]
        nearest = max(others, key=lambda n: torch.cosine_similarity(x[b], x[n], dim=0).item())
        total = total - torch.log((x[b] / x[b].norm() - x[nearest] / x[nearest].norm()).norm() + 1e-8)
    slow, fast = total / len(x), koleo_loss(x, among=among)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (fast, slow)))


def test_koleo_of_images_that_are_alike_is_finite():
    x = torch.ones(4, 8, requires_grad=True)
    loss = koleo_loss(x, among=4)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-4)
    assert x.grad.isfinite().all()


def test_the_gram_loss_is_the_slow_loop():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, d, dtype=torch.float64, generator=generator) for d in (6, 4))
    student.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                mine, theirs = (torch.cosine_similarity(x[b, i], x[b, j], dim=0) for x in (student, teacher))
                total = total + (mine - theirs) ** 2
    fast = gram_loss(student, teacher)
    torch.testing.assert_close(fast, total / 50)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (fast, total / 50))
    )


def test_features_are_resized_as_pillow_does():
    """Antialiased bicubic, each feature as a picture of its own; the same grid is left alone."""
    x = torch.randn(2, 8 * 6, 3, generator=torch.Generator().manual_seed(0))
    small = resized(x, (8, 6), (4, 3))
    for b in range(2):
        for d in range(3):
            picture = Image.fromarray(x[b, :, d].view(8, 6).numpy()).resize((3, 4), Image.Resampling.BICUBIC)
            torch.testing.assert_close(small[b, :, d].view(4, 3), torch.from_numpy(np.array(picture)))
    assert resized(x, (8, 6), (8, 6)) is x


# ----------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_forward_is_the_paper_in_float64(name, way):
    """Spelled out, from the encoders' own tokens: all targets, all pairs, each hidden patch by its image's weight."""
    method, whole = build(name, ibot_weight=0.7, **way), batch(6)
    method.begin_step(LATER)
    output = method(whole, LATER)
    views, hidden = whole["views"], method.hide(whole)
    student, teacher = method.student, method.teacher
    with torch.no_grad():
        seen = teacher.encoder(torch.cat(views[:2]))
        looked = student.encoder(torch.cat(views[:2]), replaced=hidden.replaced, token=method.token)
        local = student.encoder(torch.cat(views[2:]))
        logits = [teacher.head(seen.summary).double(), None]
        student_logits = student.head(torch.cat([looked.summary, local.summary])).double().unflatten(0, (4, 6))
        of_hidden = [(i, n) for i, one in enumerate(hidden.replaced.flatten(1)) for n in one.nonzero()[:, 0].tolist()]
        patch_head = (student.patch_head or student.head, teacher.patch_head or teacher.head)
        mine = torch.stack([patch_head[0](looked.patches[i, n]) for i, n in of_hidden]).double()
        logits[1] = torch.stack([patch_head[1](seen.patches[i, n]) for i, n in of_hidden]).double()
    if way is SINKHORN:
        targets = [torch.from_numpy(slow_sinkhorn(x.numpy(), 0.04, 3)) for x in logits]
    else:
        targets = [((x - c.value.double()) / 0.04).softmax(-1) for x, c in zip(logits, method.centres(), strict=True)]
    log_p = (student_logits / 0.1).log_softmax(-1)
    of_view = targets[0].unflatten(0, (2, 6))
    pairs = [-(of_view[g] * log_p[v]).sum(-1).mean() for g in range(2) for v in range(4) if v != g]
    view_loss = sum(pairs) / len(pairs)
    patch_loss = 0.0
    for (i, _), x, target in zip(of_hidden, mine, targets[1], strict=True):
        patch_loss -= (target * (x / 0.1).log_softmax(-1)).sum() / hidden.replaced[i].sum() / 12
    koleo = sum(koleo_loss(looked.summary[g * 6 : g * 6 + 6].double(), among=2) for g in range(2))
    loss = view_loss + 0.7 * patch_loss + 0.1 * koleo
    if way is GRAM:
        large = F.interpolate(torch.cat(views[:2]), scale_factor=2, mode="bicubic")
        patches = method.gram_teacher(large).patches.detach()
        anchor = gram_loss(looked.patches.double(), resized(patches, (8, 8), (4, 4)).double())
        assert output["gram_loss"].item() == pytest.approx(anchor.item(), rel=1e-4)
        loss = loss + 2 * anchor
    found = {name: value.item() for name, value in output.items()}
    assert found["view_loss"] == pytest.approx(view_loss.item(), rel=1e-4)
    assert found["patch_loss"] == pytest.approx(patch_loss.item(), rel=1e-4)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)
    entropies = [-(t * t.clamp(min=1e-300).log()).sum(-1).mean().item() for t in targets]
    assert found["teacher_entropy_share"] == pytest.approx(entropies[0] / math.log(64), rel=1e-3)
    assert found["patch_entropy_share"] == pytest.approx(entropies[1] / math.log(64), rel=1e-3)
    assert found["teacher_kl"] == pytest.approx(view_loss.item() - entropies[0], rel=1e-3)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_parts_of_a_batch_add_up_to_the_whole(name, way):
    """Loss, gradient and centres, in float64: eight images at once, or two by two, of which some have less hidden."""
    whole, parted, images = (x.double() if isinstance(x, torch.nn.Module) else x for x in (
        build(name, **way), build(name, **way), batch(8)
    ))  # fmt: skip
    images["views"] = [view.double() for view in images["views"]]
    whole.begin_step(LATER)
    loss = whole(images, LATER)["loss"]
    loss.backward()
    whole.after_step(LATER)
    parts = [part(images, slice(first, first + 2)) for first in range(0, 8, 2)]
    counts = [len(parted.hide(one).index) for one in parts]
    assert len(set(counts)) > 1
    parted.begin_step(LATER)
    if parted.looks_ahead():
        with torch.no_grad():
            assert all(parted(one, LATER, ahead=True) == {} for one in parts)
    losses = []
    for one in parts:
        losses.append(parted(one, LATER)["loss"] / 4)
        losses[-1].backward()
    assert not parted.answers
    parted.after_step(LATER)
    assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(parted.centres(), whole.centres(), strict=True):
        torch.testing.assert_close(mine.value, theirs.value)
    for mine, theirs in zip(whole.parameters(), parted.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_sinkhorn_over_a_part_is_not_that_over_the_whole():
    """Why the loop looks ahead."""
    method, images = build(**SINKHORN), batch(4)
    method.begin_step(LATER)
    whole = method(images, LATER)["loss"].item()
    halves = [method(part(images, half), LATER)["loss"].item() for half in (slice(0, 2), slice(2, 4))]
    assert abs(sum(halves) / 2 - whole) > 3e-4


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_gradients_reach_all_of_the_student_and_none_of_the_teachers(name, way):
    method = build(name, **way)
    method.begin_step(LATER)
    method(batch(), LATER)["loss"].backward()
    learning = [(n, p) for n, p in method.named_parameters() if n.startswith(("student.", "token"))]
    assert [n for n, p in learning if p.grad is None or not p.grad.any()] == []
    others = [p for n, p in method.named_parameters() if not n.startswith(("student.", "token"))]
    assert all(p.grad is None and not p.requires_grad for p in others)
    assert {id(p) for group in method.parameter_groups() for p in group["params"]} == {id(p) for _, p in learning}


def test_a_step_in_which_nothing_is_hidden():
    """The loss is DINO's and KoLeo's, every gradient is there, and the patches' centre stays where it is."""
    for way in ({}, {"separate_heads": True}, SINKHORN):
        method = build(hidden_share=0.0, **way)
        before = [centre.value.clone() for centre in method.centres()]
        method.begin_step(LATER)
        output = method(batch(), LATER)
        assert output["patch_loss"] == 0
        assert output["patch_entropy_share"] == 0
        output["loss"].backward()
        assert [n for n, p in method.student.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        method.after_step(LATER)
        for centre, was, stays in zip(method.centres(), before, (False, True), strict=False):
            assert torch.equal(centre.value, was) == stays


def test_a_skipped_step_leaves_nothing_behind():
    for way in ({}, SINKHORN):
        method, other = build(**way), build(**way)
        method.begin_step(LATER)
        if method.looks_ahead():
            with torch.no_grad():
                for seed in (1, 2):
                    method(batch(seed=seed), LATER, ahead=True)
        method(batch(seed=1), LATER)  # this step ends in its midst: no after_step
        for one in (method, other):
            one.begin_step(LATER)
            output = one(batch(seed=3), LATER)
            one.after_step(LATER)
        mine, theirs = method.state_dict(), other.state_dict()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
        assert output["loss"] == build(**way)(batch(seed=3), LATER)["loss"]


def test_the_gram_teacher_begins_and_follows_in_steps():
    """From epoch 0.5, of 10 steps: not before step 5, then the teacher of steps 5, 8, 11."""
    method = build(gram_start_epochs=0.5, **GRAM)
    copied, teacher = [], None
    for step in range(12):
        progress = Progress(step=step, num_steps=20, steps_per_epoch=10)
        method.begin_step(progress)
        output = method(batch(2), progress)
        assert ("gram_loss" in output) == (step >= 5)
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.add_(0.01)
        before = copy.deepcopy(method.gram_teacher.state_dict())
        method.after_step(progress)
        teacher, now = method.teacher.encoder.state_dict(), method.gram_teacher.state_dict()
        if any(not torch.equal(now[name], before[name]) for name in now):
            copied.append(step + 1)
            assert all(torch.equal(now[name], teacher[name]) for name in now)
    assert copied == [5, 8, 11]


def test_weights_that_exist_are_the_gram_teachers_too():
    """At gram_start_epochs 0 the first steps are anchored to it, and it is not copied before gram_every_steps."""
    method = build(**GRAM)
    theirs = {name: tensor + 1 for name, tensor in method.student.encoder.model.state_dict().items()}
    method.begin_with(Weights("somewhere", theirs))
    for encoder in (method.student.encoder, method.teacher.encoder, method.gram_teacher):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in encoder.model.state_dict().items())


def test_rates_of_layers_are_timms_and_the_patch_embedding_has_its_own():
    """timm counts the layers for its own layer decay; with a head above them each is once more smaller."""
    method = build("dinov2", layer_decay=0.7, patch_embed_lr=0.2)
    model = method.student.encoder.model
    theirs = {
        id(p): group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.7) for p in group["params"]
    }
    mine = {id(p): group["lr_scale"] for group in method.parameter_groups() for p in group["params"]}
    for name, parameter in model.named_parameters():
        embeds = 0.2 if "patch_embed" in name else 1
        assert mine[id(parameter)] == pytest.approx(0.7 * embeds * theirs[id(parameter)])
    assert mine[id(method.token)] == pytest.approx(0.7**3)  # with the embeddings: below two blocks and a head
    assert {mine[id(p)] for p in method.student.head.parameters()} == {1.0}
    decays = {id(p): group["decays"] for group in method.parameter_groups() for p in group["params"]}
    assert all(decays[id(p)] == (p.ndim > 1) for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"koleo_images": 48}, "method.koleo_images = 48: must divide train.global_batch = 64"),
        ({"hidden_ratio": (0.5, 0.1)}, "method.hidden_ratio = (0.5, 0.1): two shares"),
        ({"hidden_share": 1.5}, "method.hidden_share = 1.5: between 0 and 1"),
        ({"sinkhorn_rounds": 0}, "method.sinkhorn_rounds = 0: 1 or more"),
        ({"teacher_temp": (0.0, 0.04)}, "method.teacher_temp = (0.0, 0.04): both above 0"),
        ({"layer_decay": 0}, "method.layer_decay = 0: above 0"),
        ({"gram_weight": 1, "gram_enlarge": 1.1}, "method.gram_enlarge = 1.1: 35.2 pixels are not a multiple"),
    ],
)
def test_what_cannot_be_is_one_line(changed, words):
    recipe = load_recipe("dinov2", "demo")
    with pytest.raises(UserError) as error:
        replace(recipe, method=replace(recipe.method, **changed)).check()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
