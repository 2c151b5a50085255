"""MAE: the loss is its docstring's loop, hidden patches are truly unseen, everything learns."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipes_under_test import load_recipe

from ssl_global.encoders.global_swin import GlobalSwinConfig
from ssl_global.encoders.vit import VitConfig
from ssl_global.errors import UserError
from ssl_global.methods.mae import MaeConfig, draw, l1_loss, mae_loss, patchify
from ssl_global.methods.masking import num_hidden, random_hidden, some_of, uniform_hidden
from ssl_global.schedules import Progress

START = Progress(step=0, num_steps=10, steps_per_epoch=5)


VIT = VitConfig(name="vit_tiny_patch16_224", patch=4, width=48, depth=2, heads=3, pool="avg", positions="sincos")
SWIN = GlobalSwinConfig(patch=2, width=16, depths=(1, 1, 2), heads=(1, 2, 4), window=8)
# Every masking on every kind of encoder that has it.
WAYS = {
    "vit_random": (VIT, {}),
    "vit_uniform": (VIT, {"masking": "uniform", "secondary_ratio": 0.25}),
    "vit_dense": (VIT, {"masking": "dense", "mask_ratio": 0.6}),
    "swin_random": (replace(SWIN, pool="token"), {"masking": "random"}),
    "swin_uniform": (replace(SWIN, pool="avg"), {"masking": "uniform", "secondary_ratio": 0.25}),
    "swin_uniform_token": (replace(SWIN, pool="token"), {"masking": "uniform"}),
    "swin_dense": (replace(SWIN, pool="avg"), {"masking": "dense", "mask_ratio": 0.6}),
}


def recipe_with(encoder, method, pixels=32):
    recipe = load_recipe("mae", "demo")
    method = MaeConfig(**({"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4} | method))
    views = replace(recipe.views, globals=replace(recipe.views.globals, pixels=pixels))
    return replace(recipe, encoder=encoder, method=method, views=views)


def build(way=None):
    recipe = load_recipe("mae", "demo") if way is None else recipe_with(*WAYS[way])
    recipe.check()
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
    loss = mae_loss(*(x[hidden].view(3, 7, 12) for x in (rebuilt, patches)))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_loss_is_float32_under_autocast():
    rebuilt, patches = torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert mae_loss(rebuilt.bfloat16(), patches) == mae_loss(rebuilt.bfloat16().float(), patches)


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


@pytest.mark.parametrize("way", WAYS)
def test_every_parameter_gets_a_gradient(way):
    mae = build(way)
    mae(batch(torch.randn(4, 3, 32, 32)), START)["loss"].backward()
    without = [n for n, p in mae.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    fixed = ["encoder.model.pos_embed"] if way.startswith("vit") else []
    assert [n for n, p in mae.named_parameters() if not p.requires_grad] == fixed


@pytest.mark.parametrize("way", WAYS)
def test_what_is_unseen_reaches_the_loss_as_its_target_only(way):
    """Whatever the unseen pixels are, what is foretold is the same; the seen ones are no target."""
    mae = build(way).eval()
    images = torch.randn(4, 3, 32, 32)
    grid = (32 // mae.patch, 32 // mae.patch)
    mask = draw(mae.config, torch.arange(4), grid)
    unseen = mask.unseen.repeat_interleave(mae.patch, 1).repeat_interleave(mae.patch, 2)[:, None].expand_as(images)
    foretold = []
    mae.decoder.register_forward_hook(lambda module, inputs, output: foretold.append(output.detach()))
    loss = mae(batch(images), START)["loss"]
    mae(batch(torch.where(unseen, 7.0, images)), START)
    assert torch.equal(foretold[0], foretold[1])
    true = patchify(images, mae.patch)[mask.unseen.flatten(1)].view(4, mask.num_unseen, -1)
    assert foretold[0].shape == true.shape
    of_targets = (l1_loss if mae.config.masking == "dense" else mae_loss)(foretold[0], true)
    assert loss.item() == pytest.approx(of_targets.item(), rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_foretold_of_some_patches_is_what_is_foretold_of_all(way):
    mae = build(way).eval()
    mask = draw(mae.config, torch.arange(4), (32 // mae.patch, 32 // mae.patch))
    with torch.no_grad():
        tokens = mae.encoder(
            torch.randn(4, 3, 32, 32), mask.hidden, num_hidden=mask.num_hidden, replaced=mask.replaced, token=mae.token
        )
        places = mask.unseen.flatten(1).nonzero()[:, 1].view(4, mask.num_unseen)
        some, of_all = mae.decoder(tokens, of=places), mae.decoder(tokens)
    torch.testing.assert_close(some, of_all[mask.unseen.flatten(1)].view_as(some), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("way", ["swin_uniform", "vit_uniform", "swin_random"])
def test_what_is_decoded_lies_where_it_was_seen(way):
    """Each decoder token is moved by the patches that it was made of: in its place, and in no other visible one."""
    mae = build(way).eval()
    seeds = torch.arange(2)
    mask = draw(mae.config, seeds, (32 // mae.patch, 32 // mae.patch))
    with torch.no_grad():
        tokens = mae.encoder(
            torch.randn(2, 3, 32, 32), mask.hidden, num_hidden=mask.num_hidden, replaced=mask.replaced, token=mae.token
        )
        inputs = []
        mae.decoder.blocks.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        mae.decoder(tokens)
        changed = tokens.patches.clone()
        changed[:, 1] += 1
        mae.decoder(replace(tokens, patches=changed))
    num_patches = mask.unseen[0].numel()
    moved = (inputs[0] - inputs[1]).abs().amax(-1)[:, -num_patches:] > 0
    for b in range(2):
        assert sorted(moved[b].nonzero().flatten().tolist()) == sorted(tokens.places[b, 1].tolist())
    assert not (moved & mask.hidden.flatten(1)).any()


def test_the_linear_loss_is_the_slow_loop():
    rebuilt, patches = torch.randn(3, 10, 12), torch.randn(3, 10, 12)
    hidden = random_hidden(torch.arange(3), (2, 5), 0.7).flatten(1)
    loss = l1_loss(*(x[hidden].view(3, 7, 12) for x in (rebuilt, patches)))
    errors = [
        (rebuilt[b, n] - patches[b, n]).abs().double().mean() for b in range(3) for n in range(10) if hidden[b, n]
    ]
    assert loss.item() == pytest.approx(sum(errors).item() / 21, rel=1e-5)


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


@pytest.mark.parametrize("way", WAYS)
def test_works_on_other_sizes_and_shapes(way):
    mae = build(way)
    for rows, cols in ((6, 2), (3, 5), (1, 7)):
        images = torch.randn(2, 3, rows * mae.patch, cols * mae.patch)
        assert mae(batch(images), START)["loss"].isfinite()


@pytest.mark.parametrize(
    ("encoder", "method", "pixels", "message"),
    [
        (SWIN, {"masking": "uniform", "mask_ratio": 0.6}, 32, "method.mask_ratio = 0.6: 0.75: uniform masking leaves"),
        (SWIN, {"secondary_ratio": 0.25}, 32, "method.secondary_ratio = 0.25: 0, or method.masking = uniform"),
        (SWIN, {"masking": "uniform", "secondary_ratio": 1.0}, 32, "method.secondary_ratio = 1"),
        (SWIN, {"masking": "uniform"}, 30, "views.globals.pixels = 30: .* patches' 4; 28 or 32 would be"),
        (SWIN, {}, 36, "views.globals.pixels = 36: .* patches' 8; 32 or 40 would be"),
        (SWIN, {}, 8, "views.globals.pixels = 8: a single patch of 8 pixels: at least 16"),
        (SWIN, {"masking": "uniform"}, 4, "views.globals.pixels = 4: a single patch of 4 pixels: at least 8"),
        (SWIN, {"mask_ratio": 0.9}, 16, "method.mask_ratio = 0.9: all of 4 patches would be hidden"),
        (replace(SWIN, depths=(2,), heads=(1,)), {"masking": "uniform"}, 32, "this encoder cannot"),
        (SWIN, {"masking": "dense"}, 32, "encoder.pool = token: use avg"),
    ],
    ids=str,
)
def test_maskings_that_cannot_be_are_refused_in_one_line(encoder, method, pixels, message):
    with pytest.raises(UserError, match=message) as refusal:
        recipe_with(encoder, method, pixels).check()
    assert "\n" not in str(refusal.value)


@given(
    rows=st.integers(1, 21), cols=st.integers(1, 21), seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)
)
def test_uniform_hidden_leaves_one_of_each_cell(rows, cols, seeds):
    hidden = uniform_hidden(torch.tensor(seeds), (rows, cols))
    for image in hidden:
        for r in range(0, rows, 2):
            for c in range(0, cols, 2):
                assert (~image[r : r + 2, c : c + 2]).sum() == 1
    assert torch.equal(uniform_hidden(torch.tensor(seeds[-1:]), (rows, cols))[0], hidden[-1])


def test_uniform_hidden_and_the_second_draw_are_even():
    """Each patch of a cell in a quarter of 4000 images; each visible one replaced in a quarter of those."""
    seeds = torch.arange(4000)
    visible = ~uniform_hidden(seeds, (8, 8)).flatten(1)
    replaced = some_of(visible, seeds, 4)
    assert (replaced.sum(1) == 4).all()
    assert not (replaced & ~visible).any()
    for share, expected in ((visible.float().mean(0), 1 / 4), (replaced.float().mean(0), 1 / 16)):
        deviation = (expected * (1 - expected) / 4000) ** 0.5
        assert (share - expected).abs().max() < 5 * deviation
    again = some_of(visible, seeds + 1, 4)
    assert (again & replaced).float().mean() < 0.1  # no echo of the neighbour's seed


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
