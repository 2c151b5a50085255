"""Batch and length as arithmetic, and what cannot be shared out is refused with what could."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes_under_test import load_recipe

from ssl_global.errors import UserError
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
