"""Rates as functions of the step, against the formulas and against the authors' way of writing them down as tables."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipes_under_test import load_recipe

from ssl_global.methods.method import Method
from ssl_global.recipe import Optim
from ssl_global.schedules import Progress, cosine, linear, share_of, warmup_cosine
from ssl_global.training.optim import build_optimizer, peak_lr, set_rates


def table(base, final, epochs, steps_per_epoch, warmup_epochs):
    """DINO's learning rates, a number for each step of the run."""
    warmup = np.linspace(0, base, warmup_epochs * steps_per_epoch, endpoint=False)
    rest = np.arange(epochs * steps_per_epoch - len(warmup))
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest)))])


@given(epochs=st.integers(1, 30), steps_per_epoch=st.integers(1, 20), warmup=st.integers(0, 30))
def test_warmup_and_cosine_are_the_table(epochs, steps_per_epoch, warmup):
    warmup = min(warmup, epochs - 1)
    expected = table(3e-3, 1e-6, epochs, steps_per_epoch, warmup)
    for step, want in enumerate(expected):
        progress = Progress(step=step, num_steps=epochs * steps_per_epoch, steps_per_epoch=steps_per_epoch)
        assert warmup_cosine(3e-3, 1e-6, warmup_epochs=warmup, progress=progress) == pytest.approx(want, abs=1e-9)


def test_cosine_and_line_begin_end_and_stay():
    assert cosine(0.996, 1.0, 0) == 0.996
    assert cosine(0.996, 1.0, 1) == 1.0
    assert cosine(0.04, 0.4, 0.5) == pytest.approx(0.22)
    assert cosine(0.04, 0.4, 0.25) == pytest.approx(0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi / 4)))
    assert [linear(1, 3, share) for share in (-1, 0, 0.25, 1, 9)] == [1, 1, 1.5, 3, 3]
    assert share_of(3, 12) == 0.25
    assert share_of(3, 0) == 1


def test_the_papers_learning_rates():
    """MAE: 1.5e-4 x 4096 / 256 = 2.4e-3; DINO: 5e-4 x 512 / 256 = 1e-3."""
    for name, expected in (("mae", 2.4e-3), ("dino", 1e-3)):
        recipe = load_recipe(name, "recipe")
        assert peak_lr(recipe.optim, recipe.train.global_batch) == pytest.approx(expected)


def test_groups_and_rates():
    """Matrices decay, 1-D parameters do not, frozen ones are not there; rates come from the step."""
    method = Method()
    method.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    method.model[2].requires_grad_(False)
    optim = Optim(lr_per_256_images=0.1, warmup_epochs=1, weight_decay=(0.04, 0.4))
    optimizer = build_optimizer(method, optim)
    assert [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups] == [[(4, 3)], [(4,)] * 3]
    lr = set_rates(optimizer, optim, 128, Progress(step=5, num_steps=10, steps_per_epoch=5))
    assert lr == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(0.22), 0]
