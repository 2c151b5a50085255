"""Features as pictures: against SVD in float64, slow loops, and timm's own ways to the same features."""

import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from recipes_under_test import load_recipe

import ssl_global  # noqa: F401 - registers our models
from ssl_global.errors import UserError
from ssl_global.explain import features as f
from ssl_global.explain.places import patch_features

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 2), "num_heads": (1, 2, 4), "window_size": 4}


def made(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------- patch features


@torch.no_grad()
def test_they_are_the_models_own_patches_row_by_row():
    x = images(32, 48)
    vit = made("vit_tiny_patch16_224", **VIT, dynamic_img_size=True, reg_tokens=2)
    assert torch.equal(patch_features(vit, x), vit.forward_features(x)[:, 3:].reshape(2, 4, 6, 48))
    resnet = made("resnet18", num_classes=0)
    assert torch.equal(patch_features(resnet, x), resnet.forward_features(x).permute(0, 2, 3, 1))
    stage = timm.create_model("resnet18", features_only=True, out_indices=[2]).eval()
    stage.load_state_dict(resnet.state_dict(), strict=False)
    assert torch.equal(patch_features(resnet, x, "layer2"), stage(x)[0].permute(0, 2, 3, 1))
    swin, square = made("swin_tiny_patch4_window7_224", **SWIN), images(64, 64)
    assert torch.equal(patch_features(swin, square), swin.forward_features(square))
    ours = made("global_swin_tiny_patch4_window7_224", **SWIN, global_pool="token")
    expected = ours.forward_tokens(images(64, 96))[0]
    assert torch.equal(patch_features(ours, images(64, 96)), expected)
    assert patch_features(ours, images(64, 96), "layers.1").shape == (2, 8, 12, 32)


@torch.no_grad()
def test_padded_patches_are_in_the_map_too():
    vit = made("vit_tiny_patch16_224", **VIT | {"patch_size": 16}, dynamic_img_size=True, dynamic_img_pad=True)
    assert patch_features(vit, images(100, 150)).shape == (2, 7, 10, 48)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dino", "dino_swin"])
def test_an_encoder_of_ours_says_the_same(name):
    recipe = load_recipe(name, "demo")
    encoder = recipe.encoder.build(recipe).train()
    found = patch_features(encoder, images(32, 64))
    assert encoder.training
    tokens = encoder.eval().encode(images(32, 64))
    assert found.shape[1:3] == tokens.grid
    assert torch.equal(found.flatten(1, 2), tokens.patches)


def test_places_that_there_are_not():
    with pytest.raises(UserError, match=r"features at layer7: layer7: not in this ResNet"):
        patch_features(made("resnet18"), images(32, 32), "layer7")
    with pytest.raises(UserError, match=r"features at fc: gives \(1, 1000\): no map"):
        patch_features(made("resnet18"), images(32, 32), "fc")
    with pytest.raises(UserError, match=r"Conv2d: has no forward_features; name a place"):
        patch_features(torch.nn.Conv2d(3, 4, 1), images(32, 32))


# ------------------------------------------------------------------------------------------------------------------ PCA


def maps(seed, rows, cols, width=12):
    """Features with a few strong directions."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(4, width)) * [[5], [3], [2], [1]]
    return torch.from_numpy(random.normal(size=(2, rows, cols, 4)) @ mixing + 0.1 * random.normal(size=width)).float()


def test_components_are_those_of_numpys_svd():
    x = np.random.default_rng(0).normal(size=(50, 6)) * [9, 7, 5, 3, 2, 1] + 4
    mean, components, variances = f.main_components(torch.from_numpy(x))
    _, values, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(variances, values**2 / 49, rtol=1e-9)
    np.testing.assert_allclose(np.abs((components.numpy() * rows).sum(1)), 1, rtol=1e-9)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_colours_are_the_foregrounds_components_over_all_images():
    several = [maps(0, 5, 7), maps(1, 6, 4)]
    basis = f.fit_basis(several)
    flat = np.concatenate([one.numpy().reshape(-1, 12) for one in several]).astype(np.float64)
    _, _, rows = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    first = (flat - flat.mean(0)) @ rows[0]
    first *= np.sign(first @ (flat - flat.mean(0)) @ basis.split.numpy())
    found = np.concatenate([basis.foreground(one).numpy().reshape(-1) for one in several])
    assert (found == (first > 0)).all()
    front = flat[first > 0]
    _, _, rows = np.linalg.svd(front - front.mean(0), full_matrices=False)
    along = (front - front.mean(0)) @ rows[:3].T
    low, high = np.quantile(along, 0.01, axis=0), np.quantile(along, 0.99, axis=0)
    expected = np.clip((along - low) / (high - low), 0, 1)
    colours = np.concatenate([basis.colours(one).numpy().reshape(-1, 3) for one in several])[first > 0]
    for channel in range(3):  # a component has no sign of its own
        same = np.abs(colours[:, channel] - expected[:, channel]).max()
        other = np.abs(colours[:, channel] - (1 - expected[:, channel])).max()
        assert min(same, other) < 1e-5
    again = f.fit_basis([one.clone() for one in several])
    assert torch.equal(again.colours(several[0]), basis.colours(several[0]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_foreground_is_what_is_less_at_the_edges(sign):
    x = 0.1 * torch.randn(1, 8, 8, 6, generator=torch.Generator().manual_seed(0))
    x[0, 2:6, 3:6, 0] += 5 * sign
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 3:6] = True
    assert torch.equal(f.fit_basis([x]).foreground(x)[0], inside)
    with pytest.raises(UserError, match=r"threshold = 9: 0 of 64 places are foreground; at least 4 .* split=False"):
        f.fit_basis([x], threshold=9)
    assert f.fit_basis([x], split=False).centre.allclose(x.double().mean((0, 1, 2)))


def test_features_that_are_all_alike_have_no_colours():
    with pytest.raises(UserError, match="0 of 32 places are foreground"):
        f.fit_basis([torch.ones(2, 4, 4, 8)])
    with pytest.raises(UserError, match="features of 2 channels: three colours need three"):
        f.fit_basis([torch.randn(2, 4, 4, 2)])


def test_a_colour_picture_has_a_box_for_each_place_and_a_dark_background():
    colours = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    made = np.asarray(f.colour_picture(colours, (4, 8), foreground=torch.tensor([[True, False]])))
    assert (made[:, :4] == (255, 0, 0)).all()
    assert (made[:, 4:] == 26).all()


# ----------------------------------------------------------------------------------------------------------- similarity


def test_similarity_is_the_slow_loop():
    x = maps(3, 3, 4)
    found = f.similarity(x, (2, 1), image=1)
    here = x[1, 2, 1].double()
    for b in range(2):
        for row in range(3):
            for col in range(4):
                there = x[b, row, col].double()
                cosine = float((here * there).sum() / (here.square().sum() * there.square().sum()).sqrt())
                assert found[b, row, col].item() == pytest.approx(cosine, abs=1e-6)
    assert found[1, 2, 1] == pytest.approx(1)


def test_a_point_lies_in_its_place_or_is_refused():
    assert f.place_of((0, 0), (60, 80), (6, 8)) == (0, 0)
    assert f.place_of((79.9, 59.9), (60, 80), (6, 8)) == (5, 7)
    assert f.place_of((25, 40), (60, 80), (6, 8)) == (4, 2)
    for point in ((80, 10), (10, 60), (-1, 5)):
        with pytest.raises(UserError, match=r"outside of the image, which is 80 x 60 pixels"):
            f.place_of(point, (60, 80), (6, 8))
    with pytest.raises(UserError, match=r"image = 2: 0 to 1"):
        f.similarity(maps(0, 3, 4), (0, 0), image=2)
    with pytest.raises(UserError, match=r"place = \(3, 0\): the map has 3 rows and 4 columns"):
        f.similarity(maps(0, 3, 4), (3, 0))


# ----------------------------------------------------------------------------------------------------------- neighbours


def test_neighbours_are_the_slow_loop():
    random = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(3, 5, generator=random), torch.randn(9, 5, generator=random)
    indices, cosines = f.neighbours(queries, bank, 4)
    for m in range(3):
        all_cosines = [float(torch.cosine_similarity(queries[m], one, dim=0)) for one in bank]
        order = sorted(range(9), key=lambda i: -all_cosines[i])[:4]
        assert indices[m].tolist() == order
        assert cosines[m].tolist() == pytest.approx([all_cosines[i] for i in order], abs=1e-6)
    with pytest.raises(UserError, match=r"k = 10: 1 to 9"):
        f.neighbours(queries, bank, 10)


def test_a_sheet_of_neighbours_shows_each_query_and_no_image_twice():
    x = torch.eye(6) + 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    x[4] = x[1]  # the same image once more
    shown = []

    def picture(i):
        shown.append(i)
        return Image.new("RGB", (30, 20), (40 * i, 0, 0))

    made = f.neighbours_sheet(x, picture, [f"a/{i}.jpg" for i in range(6)], [1, 4], k=2)
    for row in (shown[:3], shown[3:]):  # the query, its double, and one other
        assert len(row) == len(set(row)) == 3
        assert {1, 4} <= set(row)
    assert made.width > 3 * 128
    with pytest.raises(UserError, match="query 6: 0 to 5"):
        f.neighbours_sheet(x, picture, [""] * 6, [6])
    with pytest.raises(UserError, match="k = 6: 1 to 5, the number of other images"):
        f.neighbours_sheet(x, picture, [""] * 6, [0], k=6)


# ---------------------------------------------------------------------------------------------------------------- plane


def test_the_plane_is_the_two_main_components():
    x = np.random.default_rng(0).normal(size=(30, 8)) * np.arange(8, 0, -1)
    found = f.in_the_plane(torch.from_numpy(x)).numpy()
    u, values, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u[:, :2] * values[:2]), atol=1e-5)
    with pytest.raises(UserError, match="2 images: a plane needs at least 3"):
        f.in_the_plane(torch.zeros(2, 4))
    with pytest.raises(UserError, match="method = tsne: pca or umap"):
        f.in_the_plane(torch.zeros(4, 4), "tsne")


def test_umap_is_asked_for_cosines_with_a_seed_and_missed_by_name(monkeypatch):
    asked = {}

    class UMAP:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, x):
            return x[:, :2].astype(np.float64)

    x = torch.randn(5, 3)
    monkeypatch.setitem(sys.modules, "umap", type(sys)("umap"))
    sys.modules["umap"].UMAP = UMAP
    assert torch.equal(f.in_the_plane(x, "umap", seed=3), x[:, :2])
    assert asked == {"metric": "cosine", "n_neighbors": 4, "random_state": 3, "n_jobs": 1}
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match="needs the package umap-learn; pip install umap-learn"):
        f.in_the_plane(x, "umap")


def contrast(a, b):
    """As WCAG 2 defines it."""

    def luminance(colour):
        values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_all_colours_can_be_read_on_white_and_on_dark():
    for colour in (*f.CLASS_COLOURS, f.GREY):
        assert contrast(colour, "#ffffff") > 3, colour
        assert contrast(colour, "#1a1a1a") > 3, colour
    assert len(set(f.CLASS_COLOURS)) == len(f.CLASS_COLOURS) == 10


def test_the_plane_has_a_dot_of_each_class_and_a_legend():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    named = f.plane_picture(points, [0, 0, 1, -1], ["cats", "dogs"])
    assert named.mode == "RGBA"
    drawn = np.asarray(named)
    assert (drawn[..., 3] == 0).mean() > 0.9
    seen = drawn[drawn[..., 3] > 200][:, :3].astype(int)
    for colour in (*f.CLASS_COLOURS[:2], f.GREY):
        expected = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(seen - expected).max(1) <= 3).sum() > 20, colour
    absent = [int(f.CLASS_COLOURS[2][i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(seen - absent).max(1) <= 3).sum() == 0
    with pytest.raises(UserError, match="3 labels for 4 images"):
        f.plane_picture(points, [0, 1, 2])
