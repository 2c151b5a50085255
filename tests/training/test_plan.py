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
    for repeats, words in ((5, "must divide train.global_batch = 24"), (4, "at once, 6 images")):
        with pytest.raises(UserError, match=f"data.repeats = {repeats}: .*{words}"):
            plan_run(replace(recipe, data=Data(repeats=repeats)), num_images=5000, num_processes=2)


def test_steps_and_epochs():
    recipe = replace(train(epochs=None, steps=100, global_batch=10), optim=replace(MAE.optim, warmup_epochs=5))
    plan = plan_run(recipe, num_images=50, num_processes=1)
    assert plan.num_steps == 100
    assert plan.steps_per_epoch == 5


@pytest.mark.parametrize(
    ("recipe", "processes", "message"),
    [
        (train(), 3, "train.global_batch = 4096: cannot be shared by 3 processes; 4095 or 4098 can"),
        (
            train(micro_batch=60),
            2,
            "train.micro_batch = 60: does not divide a process's share of the batch, 2048; 64 does",
        ),
        (train(epochs=None, steps=1), 1, "optim.warmup_epochs = 40: longer than the run, which has 4.096 epochs"),
    ],
)
def test_what_does_not_fit_is_refused(recipe, processes, message):
    with pytest.raises(UserError, match=message):
        plan_run(recipe, num_images=1000, num_processes=processes)
