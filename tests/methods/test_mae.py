"""MAE: the loss is its docstring's loop, hidden patches are truly unseen, everything learns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipes_under_test import load_recipe

from ssl_global.methods.mae import mae_loss, patchify
from ssl_global.methods.masking import num_hidden, random_hidden
from ssl_global.schedules import Progress

START = Progress(step=0, num_steps=10, steps_per_epoch=5)


def build(**changes):
    recipe = load_recipe("mae", "demo")
    torch.manual_seed(0)
    return recipe.method.build(recipe)


def batch(images):
    return {"views": [images], "seed": torch.arange(len(images)), "key": [], "label": None}


def test_loss_is_the_slow_loop():
    torch.manual_seed(0)
    rebuilt, patches = torch.randn(3, 10, 12, dtype=torch.float64), torch.randn(3, 10, 12, dtype=torch.float64)
    hidden = random_hidden(torch.arange(3), (2, 5), 0.7).flatten(1)
    total, count = 0.0, 0
    for b in range(3):
        for n in range(10):
            if hidden[b, n]:
                mean = sum(patches[b, n].tolist()) / 12
                var = sum((p - mean) ** 2 for p in patches[b, n].tolist()) / 11
                want = [(p - mean) / (var + 1e-6) ** 0.5 for p in patches[b, n].tolist()]
                total += sum((r - w) ** 2 for r, w in zip(rebuilt[b, n].tolist(), want, strict=True)) / 12
                count += 1
    assert count == 21
    loss = mae_loss(rebuilt, patches, hidden)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_loss_is_float32_under_autocast():
    rebuilt, patches = torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    hidden = random_hidden(torch.arange(2), (2, 2), 0.5).flatten(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert mae_loss(rebuilt.bfloat16(), patches, hidden) == mae_loss(rebuilt.bfloat16().float(), patches, hidden)


def test_patchify_cuts_row_by_row():
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).float()
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    torch.testing.assert_close(patches[1, 4].view(4, 4, 3), images[1, :, 4:8, 4:8].permute(1, 2, 0))


def test_hidden_patches_do_not_reach_the_encoder():
    """Neither their values nor a gradient: the encoder's tokens are the same whatever the hidden pixels are."""
    mae = build().eval()
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    hidden = random_hidden(torch.arange(4), (8, 8), 0.75)
    tokens = mae.encoder(images, hidden)
    assert tokens.patches.shape == (4, 16, 192)
    (tokens.patches.sum() + tokens.summary.sum()).backward()
    pixels_hidden = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    assert images.grad[pixels_hidden].abs().max() == 0
    assert images.grad[~pixels_hidden].abs().max() > 0

    garbage = torch.where(pixels_hidden, 1e6, images.detach())
    again = mae.encoder(garbage, hidden)
    assert torch.equal(again.patches, tokens.patches)
    assert torch.equal(again.summary, tokens.summary)


def test_every_parameter_gets_a_gradient():
    mae = build()
    mae(batch(torch.randn(4, 3, 32, 32)), START)["loss"].backward()
    without = [n for n, p in mae.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    assert [n for n, p in mae.named_parameters() if not p.requires_grad] == ["encoder.model.pos_embed"]


def test_it_learns_to_rebuild_a_single_image():
    mae = build()
    image = batch(torch.nn.functional.interpolate(torch.randn(1, 3, 4, 4), size=(32, 32), mode="bicubic"))
    optimizer = torch.optim.AdamW(mae.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = mae(image, START)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_works_on_other_sizes_and_shapes():
    mae = build()
    assert mae(batch(torch.randn(2, 3, 48, 20)), START)["loss"].isfinite()


@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    ratio=st.floats(0.01, 0.99),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
)
def test_random_hidden_hides_equally_many_whoever_else_is_in_the_batch(rows, cols, ratio, seeds):
    hidden = random_hidden(torch.tensor(seeds), (rows, cols), ratio)
    assert hidden.shape == (len(seeds), rows, cols)
    assert hidden.flatten(1).sum(1).tolist() == [num_hidden(rows * cols, ratio)] * len(seeds)
    alone = random_hidden(torch.tensor(seeds[-1:]), (rows, cols), ratio)
    assert torch.equal(alone[0], hidden[-1])


def test_random_hidden_is_even_over_the_grid():
    """Each patch is hidden in 75 % of 4000 images, with a binomial's spread."""
    share = random_hidden(torch.arange(4000), (14, 14), 0.75).float().mean(0)
    deviation = (0.75 * 0.25 / 4000) ** 0.5
    assert (share - 0.75).abs().max() < 5 * deviation
    assert share.std() == pytest.approx(deviation, rel=0.25)


def test_paper_hides_147_of_196():
    assert num_hidden(196, 0.75) == 147
