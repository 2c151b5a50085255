"""What a step takes, without taking it: against torch's profiler, formulas, and steps that are taken."""

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from recipes_under_test import TUNING, load_recipe
from torch.profiler import ProfilerActivity, profile

from ssl_global.command_line import recipe_files
from ssl_global.errors import UserError
from ssl_global.planning.dry_run import dry_run, one_step
from ssl_global.planning.planner import with_classes


def by_profiler(recipe, images):
    """The most that torch's allocator has handed out at once in a real step."""
    method = recipe.method.build(recipe).train()
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    one_step(method, recipe, images)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        one_step(method, recipe, images)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def small(name):
    recipe = load_recipe(name, "demo")
    return replace(recipe, encoder=replace(recipe.encoder, depth=2)) if hasattr(recipe.encoder, "depth") else recipe


dried = cache(lambda name: dry_run(small(name)))  # the dry run of a recipe, once for all tests


def test_bytes_are_those_of_a_real_step():
    _, step = dried("dino")
    assert step.bytes(24) == pytest.approx(by_profiler(small("dino"), 24), rel=0.02)
    assert step.cast_bytes == 0


def test_bytes_in_bf16():
    """Kernels have some buffers of their own."""
    recipe = small("mae")
    recipe = replace(recipe, train=replace(recipe.train, precision="bf16"))
    _, step = dry_run(recipe)
    assert step.bytes(24) == pytest.approx(by_profiler(recipe, 24), rel=0.08)
    assert step.bytes(24) < 0.8 * dried("mae")[1].bytes(24)
    matrices = [p for p in recipe.method.build(recipe).parameters() if p.requires_grad and p.ndim > 1]
    assert 0 < step.cast_bytes <= 2 * sum(p.numel() for p in matrices) * 1.1


def test_recomputing_takes_less():
    recipe = small("mae")
    _, step = dried("mae")
    _, recomputed = dry_run(replace(recipe, train=replace(recipe.train, recompute_activations=True)))
    assert recomputed.bytes_each < step.bytes_each
    assert recomputed.flops_each > step.flops_each


def test_flops_of_mae_by_hand():
    """Two to a multiply-add; backward is twice the forward's products, and attention's five products for its two.

    The demo has 64 patches of 4 x 4 pixels, 16 of them seen, with a class token.
    """
    width, narrow, pixels = 192, 64, 4 * 4 * 3

    def blocks(tokens, width, depth):
        return depth * 2 * tokens * 12 * width**2, depth * 2 * 2 * tokens**2 * width

    embed = 2 * 16 * pixels * width
    (encoder, encoder_attention), (decoder, decoder_attention) = blocks(17, width, 2), blocks(65, narrow, 2)
    linear = encoder + decoder + 2 * 17 * width * narrow + 2 * 48 * narrow * pixels
    attention = encoder_attention + decoder_attention
    _, step = dried("mae")
    assert step.flops_each == 2 * embed + 3 * linear + 3.5 * attention  # the pixels themselves get no gradient


def test_parts_of_dino():
    parts, _ = dried("dino")
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=2)
    head = 192 * 512 + 512 + 512 * 512 + 512 + 512 * 128 + 128 + 128 * 1024
    of_encoder = sum(parameter.numel() for parameter in encoder.parameters())
    assert (parts.learning, parts.fixed, parts.heads) == (of_encoder + head, of_encoder + head, head)
    of_block = sum(parameter.numel() for parameter in encoder.blocks[0].parameters())
    assert (parts.largest_block, parts.blocks) == (of_block, 2 * 2 * of_block)


def test_what_waits_for_values_is_one_line():
    recipe = small("mae")

    class Config(type(recipe.method)):
        def build(self, recipe):
            made = super().build(recipe)
            plain = made.forward
            made.forward = lambda batch, progress: plain(batch, progress) if batch["seed"].sum().item() else {}
            return made

    waiting = replace(recipe, method=Config(**vars(recipe.method)))
    with pytest.raises(UserError, match="step cannot be run without content"):
        dry_run(waiting)


WALKED = {"dino", "mae"}  # above
CANNOT = {"distill"}
LONG = {"dino_swin", "global_swin_tune", "mae_swin", "hires", "global_cnn", "small_resnet"}
NAMES = [*sorted(recipe_files().keys() - WALKED - LONG - CANNOT), "finetune:segment_demo"]


@pytest.mark.parametrize("name", sorted(CANNOT))
def test_what_learns_from_a_model_elsewhere_says_so(name):
    with pytest.raises(UserError, match="learns from a model that lies elsewhere"):
        dry_run(load_recipe(name, "demo"))


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(LONG))])
def test_every_recipes_step_can_be_taken_so(name):
    recipe_name, _, function = name.partition(":")
    recipe = load_recipe(recipe_name, function or "demo")
    recipe = with_classes(recipe, 5) if recipe_name in TUNING else recipe
    parts, step = dry_run(recipe)
    assert parts.learning == sum(p.numel() for p in recipe.method.build(recipe).parameters() if p.requires_grad)
    assert step.flops_each > 0
    assert step.bytes_each > 0
