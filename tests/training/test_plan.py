"""Batch and length as arithmetic, and what cannot be shared out is refused with what could."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes_under_test import load_recipe

from ssl_global.errors import UserError
from ssl_global.recipe import Data
from ssl_global.training.plan import plan_run

MAE = load_recipe("mae", "recipe")


def train(**changes):
    return replace(MAE, train=replace(MAE.train, **changes))


def test_the_papers_run():
    plan = plan_run(MAE, num_images=1_281_167, num_processes=64)
    assert plan.num_steps == round(800 * 1_281_167 / 4096)
    assert (plan.micro_batch, plan.accumulate) == (64, 1)
    assert (plan_run(MAE, num_images=1_281_167, num_processes=1)).accumulate == 64


@given(
    processes=st.integers(1, 16), micro=st.integers(1, 64), accumulate=st.integers(1, 8), images=st.integers(1, 9999)
)
def test_the_parts_make_the_whole(processes, micro, accumulate, images):
    recipe = train(global_batch=processes * micro * accumulate, micro_batch=micro, epochs=40)
    plan = plan_run(recipe, num_images=images, num_processes=processes)
    assert plan.num_processes * plan.accumulate * plan.micro_batch == plan.global_batch == recipe.train.global_batch
    assert plan.steps_per_epoch * plan.global_batch == pytest.approx(images)


@given(share=st.integers(1, 500), processes=st.integers(1, 9), micro=st.integers(1, 600), repeats=st.integers(1, 4))
def test_the_batch_is_the_recipes_on_any_number_of_processes(share, processes, micro, repeats):
    """The parts are as large as they may be, whatever the machine; a repeated sample's views stay together."""
    recipe = replace(train(global_batch=processes * share * repeats, micro_batch=micro), data=Data(repeats=repeats))
    fitting = [n for n in range(1, micro + 1) if share * repeats % n == 0 and n % repeats == 0]
    if not fitting:
        with pytest.raises(UserError, match=r"data\.repeats = "):
            plan_run(recipe, num_images=10**6, num_processes=processes)
        return
    plan = plan_run(recipe, num_images=10**6, num_processes=processes)
    assert plan.num_processes * plan.accumulate * plan.micro_batch == recipe.train.global_batch
    assert plan.micro_batch == max(fitting)


def test_the_rest_of_an_epoch_may_be_left_out():
    recipe = replace(train(global_batch=12, epochs=50), data=Data(last_batch="drop"))
    plan = plan_run(recipe, num_images=50, num_processes=1)
    assert (plan.epoch_images, plan.steps_per_epoch, plan.num_steps) == (48, 4, 200)
    repeated = replace(recipe, data=Data(last_batch="drop", repeats=3))  # a step takes four samples
    assert plan_run(repeated, num_images=50, num_processes=1).epoch_images == 48
    assert plan_run(repeated, num_images=55, num_processes=1).epoch_images == 52
    with pytest.raises(UserError, match=r"data\.last_batch = drop: 11 images are less than a step"):
        plan_run(recipe, num_images=11, num_processes=1)


def test_repeats_divide_what_a_process_takes_at_once():
    recipe = replace(train(global_batch=24, micro_batch=6), data=Data(repeats=2))
    assert plan_run(recipe, num_images=5000, num_processes=2).micro_batch == 6
    assert plan_run(replace(recipe, data=Data(repeats=4)), num_images=5000, num_processes=2).micro_batch == 4
    for repeats, words in ((5, "must divide train.global_batch = 24"), (8, "12 images, at most 6 of them at once")):
        with pytest.raises(UserError, match=f"data.repeats = {repeats}: .*{words}"):
            plan_run(replace(recipe, data=Data(repeats=repeats)), num_images=5000, num_processes=2)


def test_images_that_a_method_keeps_together_are_not_parted():
    """DINOv2's demo looks for neighbours among 64 images, and so many are its step: two processes cannot share it."""
    recipe = load_recipe("dinov2", "demo")
    assert plan_run(recipe, num_images=5000, num_processes=1).micro_batch == 64
    with pytest.raises(UserError, match=r"train\.global_batch = 64: .* share of the batch is 32 .* multiple of 64"):
        plan_run(recipe, num_images=5000, num_processes=2)


def test_steps_and_epochs():
    recipe = replace(train(epochs=None, steps=100, global_batch=10), optim=replace(MAE.optim, warmup_epochs=5))
    plan = plan_run(recipe, num_images=50, num_processes=1)
    assert plan.num_steps == 100
    assert plan.steps_per_epoch == 5


@pytest.mark.parametrize(
    ("recipe", "processes", "message"),
    [
        (
            train(),
            3,
            "train.global_batch = 4096: cannot be shared by 3 processes; 4095 or 4098 can, "
            "or 2 or 4 processes can share it",
        ),
        (train(epochs=None, steps=1), 1, "optim.warmup_epochs = 40: longer than the run, which has 4.096 epochs"),
    ],
)
def test_what_does_not_fit_is_refused(recipe, processes, message):
    with pytest.raises(UserError, match=message):
        plan_run(recipe, num_images=1000, num_processes=processes)
