"""Rollout against products of whole matrices in numpy, float64: a row at a time in ours, N x N in theirs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from looked_at import (
    NAMED,
    SEQUENCES,
    SWINS,
    VIT,
    dense,
    fused,
    global_swin,
    hooks_of,
    images_of,
    kernel_weights,
    made,
    timm_swin,
    unfused_weights,
)

from ssl_global.attention.attach import attach
from ssl_global.encoders.global_swin import GlobalSwinConfig, GlobalSwinEncoder
from ssl_global.errors import UserError
from ssl_global.explain import layer as layer_file
from ssl_global.explain.maps import record
from ssl_global.explain.rollout import carry_back, rollout

FUSE = {"mean": np.mean, "max": np.max, "min": np.min}


def whole_rollout(matrices, heads="mean", discard=0.0, counts=None):
    """The product of (A + I) / rowsum, or of what is no attention as it is: (B, after, before).

    matrices  in the order of the layers: (B, heads, N, N) of attention, or (N', N) of merging
    counts    for each attention (N, N), whether a pair may attend; None: all
    """
    product = None
    for number, matrix in enumerate(matrices):
        if matrix.ndim == 4:
            A = FUSE[heads](matrix, axis=1)
            may = np.ones(A.shape[1:], bool) if counts is None else counts[number]
            A = np.stack([without_smallest(one, may, discard) for one in A])
            A = A + np.eye(A.shape[-1])
            matrix = A / A.sum(-1, keepdims=True)
        product = matrix if product is None else matrix @ product
    return product


def without_smallest(A, may, share):
    A = A.copy()
    for query in range(len(A)):
        keys = [key for key in range(len(A)) if may[query, key]]
        keys.sort(key=lambda key: A[query, key])
        A[query, keys[: int(len(keys) * share)]] = 0
    return A


@pytest.mark.parametrize("name", ["no token", "class token", "registers", "dinov3", "parallel"])
def test_rollout_of_a_vit_is_the_product_of_its_matrices(name):
    architecture, options, prefix, class_token = SEQUENCES[name]
    model, images = made(architecture, **VIT | options | {"depth": 3}), images_of(2, 3, 48, 64)
    matrices = [weights.numpy() for weights in unfused_weights(model, images)]
    for heads, discard in (("mean", 0.0), ("max", 0.0), ("min", 0.0), ("mean", 0.3), ("max", 0.9)):
        product = whole_rollout(matrices, heads, discard)
        asked = {(4, 7): product[:, prefix + 4 * 8 + 7], "mean": product[:, prefix:].mean(1)}
        asked |= {token: product[:, token] for token in range(prefix)}
        asked[None] = product[:, 0] if class_token else asked["mean"]
        for query, expected in asked.items():
            found = rollout(model, images, query=query, heads=heads, discard=discard)
            assert found.shape == (2, 6, 8)
            assert np.allclose(found.flatten(1).numpy(), expected[:, prefix:], atol=1e-12)
    assert hooks_of(model) == []


def merging(grid):
    """(N', N): the even mean of the up to four patches that each is made of."""
    (rows, cols), (fewer_rows, fewer_cols) = grid, (-(-grid[0] // 2), -(-grid[1] // 2))
    matrix = np.zeros((fewer_rows * fewer_cols, rows * cols))
    for row in range(rows):
        for col in range(cols):
            matrix[row // 2 * fewer_cols + col // 2, row * cols + col] = 1
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("name", SWINS)
def test_rollout_of_a_swin_is_the_product_of_its_whole_matrices(name):
    model, images, grids = timm_swin(name)
    blocks = [block for stage in model.layers for block in stage.blocks]
    captured = unfused_weights(model, images)
    matrices = [
        dense(weights, grids[number // 2], block.window_size, block.shift_size, pads_first=False)
        for number, (weights, block) in enumerate(zip(captured, blocks, strict=True))
    ]
    # What the mask hides has e^-100 of the weight: nothing, but not 0.
    counts = [(matrix > 1e-30).all((0, 1)) for matrix in matrices]
    matrices.insert(2, merging(grids[0]))
    counts.insert(2, None)
    rows, cols = grids[1]
    for heads, discard in (("mean", 0.0), ("max", 0.4), ("min", 0.0)):
        product = whole_rollout(matrices, heads, discard, counts)
        for query, expected in (
            ((1, 2), product[:, cols + 2]),
            ((rows - 1, cols - 1), product[:, -1]),
            (None, product.mean(1)),
        ):
            found = rollout(model, images, query=query, heads=heads, discard=discard)
            assert found.shape == (2, *grids[0])
            assert np.allclose(found.flatten(1).numpy(), expected, atol=1e-12)
            assert np.allclose(found.sum((1, 2)).numpy(), 1)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rollout_through_global_tokens(pool, monkeypatch):
    model, images = fused(global_swin("scratch", global_pool=pool, global_after="pair")), images_of(2, 3, 42, 51)
    with kernel_weights(monkeypatch) as captured, torch.no_grad():
        model(images)
    product = None
    for number, weights in enumerate(captured):
        grid = ((11, 13), (6, 7))[number // 4]
        A = np.zeros((2, 3 + grid[0] * grid[1], 3 + grid[0] * grid[1]))
        if number % 4 < 2:
            shift = (2, 2) if number % 4 else (0, 0)
            A[:, 3:, 3:] = dense(weights, grid, (4, 4), shift, pads_first=True).mean(1)
        elif number % 4 == 2:
            A[:, :3, 3:] = weights.mean(1).numpy()
        else:
            A[:, 3:, :3] = weights.mean(1).numpy()
        A = A + np.eye(A.shape[-1])
        matrix = A / A.sum(-1, keepdims=True)
        if number == 4:
            merge = np.eye(3 + 42, 3 + 143)
            merge[3:, 3:] = merging((11, 13))
            matrix = matrix @ merge
        product = matrix if product is None else matrix @ product
    asked = {"mean": product[:, 3:].mean(1), 1: product[:, 1], (5, 6): product[:, -1]}
    asked[None] = product[:, :3].mean(1) if pool == "token" else asked["mean"]
    for query, expected in asked.items():
        found = rollout(model, images, query=query).flatten(1).numpy()
        assert np.allclose(found, expected[:, 3:], atol=1e-12)


def test_small_pieces_give_the_same(monkeypatch):
    vit, swin = made("vit_tiny_patch16_224", **VIT | NAMED), timm_swin("padded")
    whole = [rollout(vit, images_of(2, 3, 48, 64), discard=0.5), rollout(*swin[:2], heads="max")]
    monkeypatch.setattr(layer_file, "AT_ONCE", 2000)
    assert torch.allclose(rollout(vit, images_of(2, 3, 48, 64), discard=0.5), whole[0])
    assert torch.allclose(rollout(*swin[:2], heads="max"), whole[1])


def test_one_forward_serves_maps_and_rollout():
    model, images = made("vit_tiny_patch16_224", **VIT | NAMED), images_of(2, 3, 48, 64)
    with record(model) as recorded, torch.no_grad():
        model(images)
    row = torch.zeros(2, 49, dtype=torch.float64)
    row[:, 0] = 1
    found = carry_back(recorded.events, row, heads="mean", discard=0.0)
    assert torch.equal(found, rollout(model, images))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": "median"}, "heads = median: mean, max or min"),
        ({"discard": 1.0}, "discard = 1.0: a share"),
        ({"discard": -0.1}, "discard = -0.1: a share"),
        ({"discard": float("nan")}, "discard = nan: a share"),
        ({"query": (6, 0)}, "query = .6, 0.: outside of the grid of the last layer: rows 0 to 5, columns 0 to 7"),
        ({"query": 1}, "query = 1: in the last layer tokens 0 to 0"),
        ({"query": "cls"}, "query = 'cls': None"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, says):
    model, images = made("vit_tiny_patch16_224", **VIT | NAMED), images_of(1, 3, 48, 64)
    with pytest.raises(UserError, match=says) as error:
        rollout(model, images, **options)
    assert "\n" not in str(error.value)


def test_models_that_rollout_is_not_for():
    model, images = made("vit_tiny_patch16_224", **VIT | NAMED | {"depth": 3}), images_of(1, 3, 48, 64)
    attach(model, {"blocks.0": "se"}, input_size=(3, 48, 64))
    assert rollout(model, images).shape == (1, 6, 8)  # gates move nothing
    attach(model, {"blocks.1": "non_local"}, input_size=(3, 48, 64))
    with pytest.raises(UserError, match=r"blocks\.1\.attached\.attention moves features between places"):
        rollout(model, images)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = made("vit_tiny_patch16_224", **VIT | NAMED)

        def forward(self, x):
            return self.vit(x) + self.vit(x)

    with pytest.raises(UserError, match=r"vit\.blocks\.0\.attn is called 2 times"):
        rollout(Twice(), images)


def test_hidden_patches_have_no_rollout():
    config = GlobalSwinConfig(patch=4, width=16, depths=(2, 2), heads=(2, 4), window=4, tokens=3)
    encoder = GlobalSwinEncoder(config, pixels=32, channels=3)
    hidden = torch.ones(1, 4, 4, dtype=torch.bool)
    hidden[0, :2] = False
    with record(encoder) as recorded, torch.no_grad():
        encoder.encode(torch.randn(1, 3, 32, 32), hidden)
    with pytest.raises(UserError, match="places are not known"):
        carry_back(recorded.events, torch.ones(1, 19), heads="mean", discard=0.0)


# -------------------------------------------------------------------------------------------------------------- memory

PEAK = """
import resource, sys, timm, torch
from ssl_global.explain.rollout import rollout
name, pixels, options = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
model = timm.create_model(name, img_size=pixels, num_classes=0, **options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = rollout(model, torch.randn(1, 3, pixels, pixels))
assert found.shape == (1, pixels // 4, pixels // 4) and abs(found.sum() - 1) < 1e-3
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_megabytes(name, pixels, options):
    """Before the rollout, and in all, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, name, str(pixels), repr(options)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    per_megabyte = 2**20 if sys.platform == "darwin" else 2**10
    return [int(n) / per_megabyte for n in done.stdout.split()]


def test_memory_is_linear_in_the_pixels():
    """16384 patches: one matrix of them would be 1024 MB."""
    before, peak = peak_megabytes("swin_tiny_patch4_window7_224", 512, {"embed_dim": 12, "depths": (2, 2)})
    print(f"{before:.0f} MB before, {peak:.0f} at the most")
    assert peak - before < 300


@pytest.mark.slow
def test_memory_at_1024_pixels():
    """65536 patches: one matrix of them would be 16 GB."""
    before, peak = peak_megabytes("swin_tiny_patch4_window7_224", 1024, {})
    print(f"{before:.0f} MB before, {peak:.0f} at the most")
    assert peak < 2000
