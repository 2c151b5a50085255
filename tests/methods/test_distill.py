"""Distilling: each term is its docstring's loop, the teacher stays what it is, students of any family learn."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recipes_under_test import load_recipe
from tiny_runs import tiny_teacher

from ssl_global.encoders.encoder import Tokens
from ssl_global.encoders.timm_model import TimmConfig
from ssl_global.encoders.weights import Weights
from ssl_global.errors import UserError
from ssl_global.methods.distill import Standard, feature_loss, resampled
from ssl_global.recipe import Data
from ssl_global.schedules import Progress
from ssl_global.training.optim import build_optimizer

LATER = Progress(step=50, num_steps=100, steps_per_epoch=10)
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 2, "window_size": 4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "export")


def recipe_of(teacher, *, encoder=None, data=None, pixels=16, **method):
    recipe = load_recipe("distill", "demo", width=32, heads=2)
    views = replace(recipe.views, globals=replace(recipe.views.globals, pixels=pixels))
    views = replace(views, locals=replace(views.locals, pixels=pixels // 2, count=2))
    sizes = {"prototypes": 24, "head_hidden": 32, "head_bottleneck": 16}
    recipe = replace(
        recipe, views=views, data=data or recipe.data, encoder=encoder or recipe.encoder,
        method=replace(recipe.method, teacher=str(teacher), **sizes, **method),
    )  # fmt: skip
    recipe.check()
    return recipe


def build(teacher, **changes):
    recipe = recipe_of(teacher, **changes)
    recipe = replace(recipe, method=recipe.method.settled(recipe))
    torch.manual_seed(0)
    distill = recipe.method.build(recipe)
    distill.fetch(recipe)
    return distill.train()


def batch(num_images=3, pixels=16):
    generator = torch.Generator().manual_seed(0)
    sizes = (pixels, pixels, pixels // 2, pixels // 2)
    views = [torch.randn(num_images, 3, s, s, generator=generator) for s in sizes]
    return {"views": views, "seed": None, "key": []}


@given(views=st.integers(1, 3), patches=st.integers(1, 4), width=st.integers(1, 5))
def test_feature_loss_is_the_slow_loop(views, patches, width):
    generator = torch.Generator().manual_seed(width)
    said = torch.randn(views, patches, width, generator=generator, requires_grad=True)
    taught = torch.randn(views, patches, width, generator=generator)
    slow = sum(
        (said[m, n, d].double() - taught[m, n, d].double()) ** 2
        for m in range(views) for n in range(patches) for d in range(width)
    ) / (views * patches * width)  # fmt: skip
    fast = feature_loss(said, taught)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5)
    (mine,), (expected,) = torch.autograd.grad(fast, said), torch.autograd.grad(slow, said)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grid", [(3, 5), (7, 4), (1, 1), (14, 12)])
def test_patches_are_resampled_as_pil_resizes_a_map(grid):
    rows, cols = 6, 7
    maps = np.random.default_rng(0).normal(size=(2, rows, cols, 3)).astype(np.float32)
    patches = torch.from_numpy(maps).flatten(1, 2)
    tokens = Tokens(summary=torch.zeros(4, 3), patches=torch.cat([patches, patches + 9]), grid=(rows, cols))
    found = resampled(tokens, 2, grid).unflatten(1, grid).numpy()
    for view in range(2):
        for d in range(3):
            expected = Image.fromarray(maps[view, :, :, d]).resize(grid[::-1], Image.Resampling.BILINEAR)
            np.testing.assert_allclose(found[view, :, :, d], np.asarray(expected), atol=1e-5)
    assert torch.equal(resampled(tokens, 2, (rows, cols)), patches)


def test_features_are_measured_by_what_all_steps_before_had():
    """Mean and deviation against numpy's, of steps in two parts each."""
    generator = torch.Generator().manual_seed(0)
    steps = [30 + 5 * torch.randn(2, 40, 6, 4, generator=generator) for _ in range(3)]
    standard = Standard(4)
    for parts in steps:
        standard.begin_step()
        before = (standard.mean.clone(), standard.var.clone())
        for part in parts:
            expected = (part - before[0]) / (before[1] + 1e-6).sqrt()
            torch.testing.assert_close(standard(part), expected)
        standard.move()
    rows = [parts.reshape(-1, 4).numpy().astype(np.float64) for parts in steps]
    np.testing.assert_allclose(standard.mean, np.mean([x.mean(0) for x in rows], axis=0), rtol=1e-5)
    np.testing.assert_allclose(standard.var, np.mean([x.var(0) for x in rows], axis=0), rtol=1e-3)
    assert standard(torch.cat(list(torch.cat(steps, 1)))).mean().abs() < 0.1


def test_a_skipped_step_leaves_nothing_behind(teacher):
    distill, other = build(teacher), build(teacher)
    distill.begin_step(LATER)
    distill(batch(5), LATER)  # this step is skipped: no after_step
    for method in (distill, other):
        method.begin_step(LATER)
        method(batch(), LATER)
        method.after_step(LATER)
    for name, tensor in distill.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def slow_dino(student, teacher, temp):
    total, pairs = 0.0, 0
    for g in range(len(teacher)):
        for v in range(len(student)):
            if v != g:
                total += -(teacher[g] * torch.log_softmax(student[v] / temp, -1)).sum(-1).mean()
                pairs += 1
    return total / pairs


def test_forward_spelled_out_in_float64(teacher):
    """What timm says of the export, on images as they were normalised for it, and a student with all three terms."""
    data = Data(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    distill = build(teacher, data=data, summary_weight=2.0, patch_weight=3.0, dino_weight=0.5)
    student = distill.students["student"]
    student.centre.value.normal_(std=0.1)
    with torch.no_grad():
        for parameter in student.following_head.parameters():
            parameter.mul_(1.1)
        for standard in (distill.summary_standard, distill.patch_standard):
            standard.mean.normal_()
            standard.var.uniform_(0.5, 2)
    views = batch()["views"]
    distill.begin_step(LATER)
    output = distill(batch(), LATER)

    model = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    its = json.loads((teacher / "config.json").read_text())["pretrained_cfg"]
    mean, std, own_mean, own_std = (
        torch.tensor(x).view(3, 1, 1) for x in (its["mean"], its["std"], data.mean, data.std)
    )
    images = ((torch.cat(views[:2]) * own_std + own_mean) - mean) / std
    with torch.no_grad():
        features = model.forward_features(images).double()
        summary = (features[:, 0] - distill.summary_standard.mean) / (
            distill.summary_standard.var.double() + 1e-6
        ).sqrt()
        patches = (features[:, 1:] - distill.patch_standard.mean) / (distill.patch_standard.var.double() + 1e-6).sqrt()
        tokens = [student.encoder(view) for view in views]
        said = [student.summary_projector(t.summary) for t in tokens]
        maps = torch.cat([t.patches for t in tokens[:2]]).transpose(1, 2).unflatten(2, (2, 2))
        upsampled = torch.nn.functional.interpolate(maps, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2)
        terms = {
            "summary": (torch.cat(said[:2]).double() - summary).square().mean(),
            "patches": (student.patch_projector(upsampled).double() - patches).square().mean(),
        }
        logits = student.following_head(summary.float()).double() - student.centre.value.double()
        targets = (logits / 0.04).softmax(-1).unflatten(0, (2, 3))
        terms["dino"] = slow_dino(torch.stack([student.head(s) for s in said]).double(), targets, 0.1)
    for name, expected in terms.items():
        assert output[f"student_{name}"].item() == pytest.approx(expected.item(), rel=1e-4), name
    total = 2 * terms["summary"] + 3 * terms["patches"] + 0.5 * terms["dino"]
    assert output["loss"].item() == pytest.approx(total.item(), rel=1e-4)


def test_students_of_all_families_learn_at_once_and_the_teacher_does_not(teacher):
    swin = TimmConfig(name="swin_tiny_patch4_window7_224", model_args=json.dumps(SWIN))
    names = ("test_resnet", "test_convnext", "test_vit", "test_mambaout")
    distill = build(teacher, encoder=swin, pixels=64, students=names)
    before = {name: tensor.clone() for name, tensor in distill.teacher.state_dict().items()}
    distill.begin_step(LATER)
    output = distill(batch(pixels=64), LATER)
    output["loss"].backward()
    assert tuple(distill.backbones()) == ("student", *names)
    assert len(output) == 1 + 3 * 5
    still = [name for name, p in distill.named_parameters() if not p.requires_grad]
    assert all(name.startswith("teacher.") or ".following_head." in name for name in still)
    learning = {name: p.grad for name, p in distill.named_parameters() if p.requires_grad}
    unmoved = [name for name, gradient in learning.items() if gradient is None or not gradient.any()]
    # timm's ResNets begin with each block's last norm at 0: what is before it moves from the second step on.
    assert [name for name in unmoved if not name.startswith("students.test_resnet.encoder.model.layer")] == []
    assert all(gradient is not None for gradient in learning.values())
    assert not any(module.training for module in distill.teacher.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in distill.teacher.state_dict().items())


def test_weights_that_exist_are_for_the_encoder_and_it_alone_waits(teacher):
    distill = build(teacher, students=("test_resnet",))
    student, beside = (distill.students[name].encoder for name in ("student", "test_resnet"))
    theirs = {name: tensor + 1 for name, tensor in student.model.state_dict().items()}
    assert distill.begin_with(Weights("somewhere", theirs))[0].endswith(
        f"{len(theirs)} of {len(theirs)} tensors loaded"
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in student.model.state_dict().items())
    optimizer = build_optimizer(distill, load_recipe("distill", "demo").optim, waiting_epochs=1)
    waiting = {p for group in optimizer.param_groups if group["waiting_epochs"] for p in group["params"]}
    assert waiting == set(student.parameters())
    assert not waiting & set(beside.parameters())


def test_students_share_nothing_but_the_teacher(teacher):
    """Of two students each has half of the gradient that it has alone."""
    alone, beside = build(teacher), build(teacher, students=("test_resnet",))
    alone.students["student"].load_state_dict(beside.students["student"].state_dict())
    for method in (alone, beside):
        method.begin_step(LATER)
        method(batch(), LATER)["loss"].backward()
    theirs = dict(beside.named_parameters())
    compared = 0
    for name, parameter in alone.students["student"].encoder.named_parameters():
        torch.testing.assert_close(2 * theirs[f"students.student.encoder.{name}"].grad, parameter.grad, msg=name)
        compared += 1
    assert compared > 20


def test_only_what_has_a_weight_exists(teacher):
    matching = build(teacher, dino_weight=0.0, patch_weight=0.0)
    parts = {name.split(".")[1] for name, _ in matching.students.named_parameters()}
    assert parts == {"encoder", "summary_projector"}
    matching.begin_step(LATER)
    output = matching(batch(), LATER)
    matching.after_step(LATER)
    assert output.keys() == {"loss", "student_summary"}
    assert output["loss"] == output["student_summary"]


def test_the_head_follows_and_the_centre_moves(teacher):
    distill = build(teacher)
    student = distill.students["student"]
    with torch.no_grad():
        for parameter in student.head.parameters():
            parameter.add_(0.1)
    before = {n: p.clone() for n, p in student.following_head.named_parameters()}
    distill.begin_step(LATER)
    distill(batch(), LATER)
    distill.after_step(LATER)
    momentum = 1 - (1 - 0.99) / 2  # half of a cosine from 0.99 to 1
    for name, parameter in student.following_head.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * dict(student.head.named_parameters())[name]
        torch.testing.assert_close(parameter.detach(), expected.detach())
    assert student.centre.value.any()


def test_the_teacher_is_in_no_checkpoint(teacher):
    distill = build(teacher)
    assert [name for name in distill.state_dict() if "teacher" in name] == []
    assert any(name.startswith("teacher.encoder.model.blocks") for name, _ in distill.named_parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "runs/nobody/export"}, r"method.teacher = runs/nobody/export: no such folder; an export's or a"),
        ({"teacher": "resnet18"}, "method.teacher = resnet18: untrained; a timm name with the .tag"),
        ({"teacher": "resnet18.nobodys"}, "method.teacher = resnet18.nobodys: timm has no weights of that name"),
        ({"teacher": "vit_smal"}, "method.teacher = vit_smal: .*vit_small"),
        ({"teacher": ""}, "method.teacher = '': an export's or a run's folder"),
        ({"students": ("resnet1",)}, "method.students = .*resnet1: names of timm without a .tag"),
        ({"students": ("resnet18.a1_in1k",)}, "method.students = .*resnet18.a1_in1k: names of timm without a .tag"),
        ({"students": ("test_resnet", "test_resnet")}, "method.students = .*test_resnet: names of timm .* each once"),
        ({"students": ("vit_base_patch14_dinov2",)}, r"method.students = vit_base_patch14_dinov2: views.globals.pixel"),
        ({"patch_weight": -1.0}, "method.patch_weight = -1.0: 0"),
        ({"summary_weight": 0.0, "dino_weight": 0.0}, "method.summary_weight = 0.0: above 0, or method.dino_weight"),
        ({"teacher_temp": 0.0}, "method.teacher_temp = 0.0: above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(teacher, change, words):
    def settle():
        recipe = recipe_of(**({"teacher": teacher} | change))
        recipe.method.settled(recipe)

    with pytest.raises(UserError, match=words) as refused:
        settle()
    assert "\n" not in str(refused.value)


def test_a_teacher_that_does_not_take_the_views_is_one_line(teacher, tmp_path):
    """As timm's published ViTs, which take multiples of their patch; our own exports pad."""
    published = shutil.copytree(teacher, tmp_path / "published")
    found = json.loads((teacher / "config.json").read_text())
    del found["model_args"]["dynamic_img_pad"]
    (published / "config.json").write_text(json.dumps(found))
    student = load_recipe("distill", "demo", patch=3, width=32, heads=2).encoder
    recipe = recipe_of(published, pixels=18, encoder=student)
    with pytest.raises(UserError, match=r"views.globals.pixels = 18: the teacher, vit_tiny_patch16_224, does not"):
        recipe.method.settled(recipe)


def test_a_teacher_of_other_channels_or_with_other_weights_is_refused(teacher, tmp_path):
    grey = recipe_of(teacher, data=Data(channels=1, mean=(0.5,), std=(0.2,)))
    with pytest.raises(UserError, match=r"sees 3 channels, and data.channels is 1"):
        grey.method.settled(grey)
    recipe = recipe_of(teacher)
    recipe = replace(recipe, method=recipe.method.settled(recipe))
    other = replace(recipe.method, teacher=str(tiny_teacher(tmp_path / "export", seed=1)))
    with pytest.raises(UserError, match="not the weights that this run was begun with"):
        other.build(recipe).fetch(replace(recipe, method=other))
