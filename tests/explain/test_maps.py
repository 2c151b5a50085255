"""Maps of fused attention against those of timm's unfused arithmetic, and that looking leaves no trace."""

import numpy as np
import pytest
import timm
import torch
from looked_at import (
    NAMED,
    SEQUENCES,
    SWINS,
    VIT,
    dense,
    drawn_anew,
    fused,
    global_swin,
    hooks_of,
    images_of,
    kernel_weights,
    made,
    timm_swin,
    unfused_weights,
)
from torch import nn

from ssl_global.attention.attach import attach
from ssl_global.encoders.global_swin import GlobalSwinConfig, GlobalSwinEncoder
from ssl_global.encoders.vit import Vit, VitConfig
from ssl_global.errors import UserError
from ssl_global.explain import layer as layer_file
from ssl_global.explain.maps import attention_layers, attention_maps, record
from ssl_global.explain.record import Looker, watch


@pytest.mark.parametrize("name", SEQUENCES)
def test_maps_of_fused_attention_are_those_of_the_unfused(name):
    architecture, options, prefix, class_token = SEQUENCES[name]
    model, images = made(architecture, **VIT | options), images_of(2, 3, 48, 64)
    assert all(m.fused_attn for m in model.modules() if hasattr(m, "fused_attn"))
    layers, expected = attention_maps(model, images), unfused_weights(model, images)
    assert len(layers) == len(expected) == 2
    assert [layer.path.split(".")[:2] for layer in layers] == [["blocks", "0"], ["blocks", "1"]]
    for layer, weights in zip(layers, expected, strict=True):
        assert (layer.grid, layer.prefix, layer.class_token) == ((6, 8), prefix, class_token)
        assert layer.stride == (8, 8)
        assert layer.weights().shape == (2, 1, 4, prefix + 48, prefix + 48)
        assert torch.allclose(layer.weights()[:, 0], weights, atol=1e-9)
        assert torch.allclose(layer.weights().sum(-1), torch.ones(1, dtype=torch.float64))
        assert weights.max() > 0.2  # far from uniform, or any map would do
    with_one_image = []
    with watch(Looker(model, images=1), with_one_image.append), torch.no_grad():
        model(images)
    for layer, weights in zip(with_one_image, expected, strict=True):
        assert torch.allclose(layer.weights()[:, 0], weights[:1], atol=1e-9)


def test_in_float32_to_a_millionth():
    model = made("vit_tiny_patch16_224", std=0.1, dtype=torch.float32, **VIT | NAMED)
    images = images_of(2, 3, 48, 64, dtype=torch.float32)
    for layer, weights in zip(attention_maps(model, images), unfused_weights(model, images), strict=True):
        assert (layer.weights()[:, 0] - weights).abs().max() < 1e-6


def test_under_autocast_the_softmax_is_in_float32():
    model = made("vit_tiny_patch16_224", std=0.1, dtype=torch.float32, **VIT | NAMED)
    images = images_of(2, 3, 48, 64, dtype=torch.float32)
    exact = attention_maps(model, images)[0].weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = attention_maps(model, images)[0]
        weights = layer.weights()
    assert layer.query.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(-1), torch.ones(1), atol=1e-6)
    assert (weights - exact).abs().max() < 0.02


def test_masks_of_sequences_are_kept():
    model, x = made("vit_tiny_patch16_224", **VIT | NAMED).blocks[0], images_of(2, 5, 32)
    near = torch.ones(5, 5, dtype=torch.bool).tril(1)
    for mask in (near, torch.zeros(5, 5).masked_fill(~near, -1e4).double()):
        with record(model) as recorded, torch.no_grad():
            model(x, attn_mask=mask)
        (layer,) = recorded.layers
        attention, seen = model.attn, []
        attention.fused_attn = False
        with torch.no_grad():
            hook = attention.attn_drop.register_forward_pre_hook(lambda _, inputs, to=seen: to.append(inputs[0]))
            model(x, attn_mask=mask)
            hook.remove()
        assert torch.allclose(layer.weights()[:, 0], seen[0], atol=1e-9)
        assert layer.num_allowed().flatten().tolist() == [2, 3, 4, 5, 5]
    with record(model), pytest.raises(UserError, match="is_causal"):
        model(x, is_causal=True)


# ------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("name", SWINS)
def test_windows_of_timms_swin(name):
    model, images, grids = timm_swin(name)
    layers, expected = attention_maps(model, images), unfused_weights(model, images)
    assert [layer.path for layer in layers] == [f"layers.{s}.blocks.{b}.attn" for s in (0, 1) for b in (0, 1)]
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert any(blocks[1].shift_size)
    for number, (layer, block, weights) in enumerate(zip(layers, blocks, expected, strict=True)):
        assert layer.grid == grids[number // 2]
        assert layer.stride == (4 * 2 ** (number // 2),) * 2
        assert torch.allclose(layer.weights().flatten(0, 1), weights, atol=1e-9)
        whole = dense(weights, layer.grid, block.window_size, block.shift_size, pads_first=False)
        check_pictures(layer, whole)
    with_one_image = []
    with watch(Looker(model, images=1), with_one_image.append), torch.no_grad():
        model(images)
    for layer, first in zip(layers, [e for e in with_one_image if hasattr(e, "query")], strict=True):
        assert torch.allclose(layer.weights()[:1], first.weights(), atol=1e-9)


def check_pictures(layer, whole):
    """Against the dense matrix of patches, (B, heads, N, N)."""
    rows, cols = layer.grid
    for row, col in ((0, 0), (rows - 1, 1), (rows // 2, cols - 1)):
        expected = whole[:, :, row * cols + col].reshape(*whole.shape[:2], rows, cols)
        assert np.allclose(layer.picture((row, col)).numpy(), expected, atol=1e-9)
    assert np.allclose(layer.picture("mean").numpy(), whole.mean(2).reshape(expected.shape), atol=1e-9)


@pytest.mark.parametrize("start", ["scratch", "identity"])
def test_windows_and_tokens_of_our_swin(start, monkeypatch):
    model, images = fused(global_swin(start, global_after="pair")), images_of(2, 3, 42, 51)
    with kernel_weights(monkeypatch) as expected, torch.no_grad():
        model(images)
    layers = attention_maps(model, images)
    of_a_stage = ["blocks.0.attn", "blocks.1.attn", "mixers.1.read", "mixers.1.write"]
    assert [layer.path for layer in layers] == [f"layers.{s}.{name}" for s in (0, 1) for name in of_a_stage]
    assert [layer.grid for layer in layers] == [(11, 13)] * 4 + [(6, 7)] * 4
    for number, (layer, weights) in enumerate(zip(layers, expected, strict=True)):
        assert (layer.prefix, layer.class_token) == (3, False)
        assert torch.allclose(layer.weights().flatten(0, 1), weights, atol=1e-9)
        rows, cols = layer.grid
        if number % 4 < 2:
            # timm's blocks never shift what was one window at the size that they are built for.
            shift = (2, 2) if number == 1 or (number == 5 and start == "scratch") else (0, 0)
            check_pictures(layer, dense(weights, layer.grid, (4, 4), shift, pads_first=start == "scratch"))
        elif number % 4 == 2:  # each token reads all patches
            assert torch.allclose(layer.picture(1).flatten(2), weights[:, :, 1], atol=1e-9)
            assert torch.allclose(layer.picture().flatten(2), weights.mean(2), atol=1e-9)
            with pytest.raises(UserError, match="only global tokens ask"):
                layer.picture((0, 0))
            with pytest.raises(UserError, match="picture"):
                layer.looking_at(0)
        else:
            assert torch.allclose(layer.looking_at(2), weights[..., 2].unflatten(2, (rows, cols)), atol=1e-9)
            with pytest.raises(UserError, match="looking_at"):
                layer.picture((0, 0))
    with_one_image = []
    with watch(Looker(model, images=1), with_one_image.append), torch.no_grad():
        model(images)
    for layer, first in zip(layers, [e for e in with_one_image if hasattr(e, "query")], strict=True):
        assert torch.allclose(layer.weights()[:1], first.weights(), atol=1e-9)


# With a window of 6 a shrunken one holds patches that are too far apart; that is behind another mask.
@pytest.mark.parametrize(("side", "window"), [(2, 4), (1, 4), (2, 6), (1, 2)])
def test_hidden_patches_have_maps_but_no_pictures(side, window, monkeypatch):
    config = GlobalSwinConfig(patch=4, width=16, depths=(2, 2), heads=(2, 4), window=window, tokens=3)
    encoder = drawn_anew(GlobalSwinEncoder(config, pixels=64, channels=3)).double().eval()
    hidden = torch.ones(2, 16 // side, 16 // side, dtype=torch.bool)
    if side == 2:
        hidden[0, ::3, ::2] = hidden[1, 1::2, 1::3] = False
    else:  # one of each 2 x 2
        hidden[0, ::2, ::2] = hidden[1, 1::2, ::2] = False
    images = images_of(2, 3, 64, 64)
    with kernel_weights(monkeypatch) as expected, torch.no_grad():
        encoder.encode(images, hidden)
    with record(encoder) as recorded, torch.no_grad():
        encoder.encode(images, hidden)
    first = []
    with watch(Looker(encoder, images=1), first.append), torch.no_grad():
        encoder.encode(images, hidden)
    first = [event for event in first if hasattr(event, "query")]
    for layer, weights, one in zip(recorded.layers, expected, first, strict=True):
        assert layer.grid is None
        assert torch.allclose(layer.weights().flatten(0, 1), weights, atol=1e-9)
        assert torch.allclose(layer.weights()[:1], one.weights(), atol=1e-9)
        seen = (weights > 0).sum(-1)
        allowed = layer.num_allowed().expand(layer.query.shape[:4]).flatten(0, 1)
        assert torch.equal(allowed, seen)
    with pytest.raises(UserError, match="places are not known"):
        recorded.layers[0].picture()


def test_patches_dropped_in_training_take_their_own_positions_with_them(monkeypatch):
    _, options, _, _ = SEQUENCES["eva02"]
    model, images = (
        made("eva02_tiny_patch14_224", **VIT | options, patch_drop_rate=0.5).train(),
        images_of(2, 3, 48, 64),
    )
    layers, first = [], []
    for limit, events in ((None, layers), (1, first)):
        torch.manual_seed(0)
        with kernel_weights(monkeypatch) as expected, watch(Looker(model, images=limit), events.append):
            model(images)
        for layer, weights in zip(events, expected, strict=True):
            assert layer.grid is None
            assert layer.weights().shape[-1] == 1 + 24
            assert torch.allclose(layer.weights()[:, 0], weights[:limit], atol=1e-9)


def test_a_stage_by_itself(monkeypatch):
    model, images = global_swin("scratch"), images_of(2, 3, 42, 51)
    with record(model.layers[1]) as recorded, kernel_weights(monkeypatch) as expected, torch.no_grad():
        model(images)
    assert [layer.path for layer in recorded.layers[2:]] == ["mixers.1.read", "mixers.1.write"]
    for layer, weights in zip(recorded.layers[2:], expected[-2:], strict=True):
        assert torch.allclose(layer.weights()[:, 0], weights, atol=1e-9)
        assert (layer.queries.shape[1], layer.keys.shape[1]) == weights.shape[2:]


def test_a_vit_of_which_patches_are_hidden():
    encoder = drawn_anew(Vit(VitConfig(patch=8, width=32, depth=2, heads=4), pixels=32, channels=3)).double().eval()
    hidden = torch.zeros(2, 4, 4, dtype=torch.bool)
    hidden[:, 1:] = True
    with record(encoder) as recorded, torch.no_grad():
        encoder.encode(images_of(2, 3, 32, 32), hidden)
        encoder.encode(images_of(2, 3, 32, 32))
    assert [layer.grid for layer in recorded.layers] == [None, None, (4, 4), (4, 4)]
    assert recorded.layers[0].weights().shape == (2, 1, 4, 5, 5)


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("name", ["no token", "class token", "registers", "registers alone"])
def test_pictures_of_a_vit(name):
    architecture, options, prefix, class_token = SEQUENCES[name]
    model, images = made(architecture, **VIT | options), images_of(2, 3, 48, 64)
    layer, weights = attention_maps(model, images)[1], unfused_weights(model, images)[1]
    check_pictures(layer, weights[:, :, prefix:, prefix:].numpy())
    for token in range(prefix):
        assert torch.allclose(layer.picture(token).flatten(2), weights[:, :, token, prefix:])
        assert torch.allclose(layer.looking_at(token).flatten(2), weights[:, :, prefix:, token])
    assert torch.equal(layer.picture(), layer.picture(0 if class_token else "mean"))


def test_a_picture_is_upright():
    """One bright patch, and a layer that looks at what is bright: it shines where the patch is."""
    model = timm.create_model("vit_tiny_patch16_224", **VIT | NAMED).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.patch_embed.proj.weight[:16] = 1
        model.blocks[0].attn.qkv.weight[:64].copy_(torch.eye(32).repeat(2, 1))
        model.blocks[0].attn.qkv.bias[:32] = torch.tensor([1.0] * 16 + [-1.0] * 16)
    images = torch.zeros(1, 3, 48, 64)
    images[:, :, 8:16, 40:48] = 1  # row 1, column 5
    picture = attention_maps(model, images)[0].picture()[0, 0]
    assert picture.argmax() == 1 * 8 + 5
    assert picture[1, 5] > 5 * picture[5, 1]


def test_small_pieces_make_the_same_picture(monkeypatch):
    vit, swin = made("vit_tiny_patch16_224", **VIT | NAMED), timm_swin("padded")
    layers = [*attention_maps(vit, images_of(2, 3, 48, 64)), *attention_maps(swin[0], swin[1])]
    whole = [layer.picture("mean") for layer in layers]
    tokens = layers[0].looking_at(0)
    monkeypatch.setattr(layer_file, "AT_ONCE", 2000)
    assert len(list(layers[0].chunks())) > 4
    assert len(list(layers[2].chunks())) > 4
    for layer, picture in zip(layers, whole, strict=True):
        assert torch.allclose(layer.picture("mean"), picture)
        asked = torch.cat([part.queries.flatten() for part, _ in layer.chunks()])
        assert torch.equal(asked.sort().values, layer.queries.flatten().sort().values)
    assert torch.allclose(layers[0].looking_at(0), tokens)


def test_our_encoders_of_any_size():
    encoder = Vit(VitConfig(patch=8, width=32, depth=2, heads=4, registers=2), pixels=32, channels=3)
    layers = attention_maps(encoder, torch.randn(3, 3, 44, 61))
    assert [layer.path for layer in layers] == ["model.blocks.0.attn", "model.blocks.1.attn"]
    assert (layers[0].grid, layers[0].prefix) == ((6, 8), 3)
    assert layers[0].picture().shape == (3, 4, 6, 8)


# ------------------------------------------------------------------------------------------------------------- no trace


def test_no_trace_is_left():
    for model, images in (
        (made("vit_tiny_patch16_224", attn_drop_rate=0.3, drop_path_rate=0.3, **VIT | NAMED), images_of(2, 3, 48, 64)),
        (global_swin("scratch", drop_path_rate=0.3), images_of(2, 3, 42, 51)),
        (timm_swin("padded")[:2]),
    ):
        model.train()

        def output(model=model, images=images):
            torch.manual_seed(0)
            return model(images)

        before = output()
        with record(model) as recorded:
            assert hooks_of(model)
            during = output()
        assert recorded.layers
        assert not recorded.layers[0].query.requires_grad
        assert hooks_of(model) == []
        assert torch.equal(before, during)
        assert torch.equal(before, output())
        model.patch_embed.eval()
        attention_maps(model, images)
        assert model.training
        assert model.layers[0].training if hasattr(model, "layers") else model.blocks[0].training
        assert not model.patch_embed.training


def test_maps_are_those_of_evaluation():
    model, images = made("vit_tiny_patch16_224", proj_drop_rate=0.5, **VIT | NAMED), images_of(2, 3, 48, 64)
    expected = attention_maps(model, images)[1].weights()
    assert torch.equal(attention_maps(model.train(), images)[1].weights(), expected)


def test_no_hook_is_left_after_an_error():
    model = made("vit_tiny_patch16_224", **VIT | NAMED)
    with pytest.raises(ZeroDivisionError), record(model):
        1 / 0  # noqa: B018
    assert hooks_of(model) == []
    with pytest.raises(AssertionError):
        attention_maps(model.train(), images_of(2, 3, 40, 40))  # not its size
    assert hooks_of(model) == []
    assert model.training


def test_what_is_kept_is_linear_in_the_tokens():
    def kept(size):
        model = made("vit_tiny_patch16_224", **VIT | {"patch_size": 4, "img_size": size}, dtype=torch.float32)
        with record(model) as recorded, torch.no_grad():
            model(torch.randn(1, 3, size, size))
        layer = recorded.layers[0]
        return sum(t.untyped_storage().nbytes() for t in (layer.query, layer.key, layer.queries, *layer.biases))

    assert kept(32) == (1 + 64) * (2 * 32 * 4 + 8)
    assert kept(64) == (1 + 256) * (2 * 32 * 4 + 8)


# ------------------------------------------------------------------------------------------------------------ refusals


def one_line(error):
    return "\n" not in str(error.value)


def test_models_that_cannot_be_read_are_named():
    with pytest.raises(UserError, match=r"ResNet has no attention to look at.*timm's ViT") as error:
        attention_maps(timm.create_model("resnet18"), torch.randn(1, 3, 32, 32))
    assert one_line(error)
    for name, says in (
        ("vit_dlittle_patch16_reg1_gap_256", r"blocks\.0\.attn is timm.*DiffAttention"),
        ("swinv2_cr_tiny_224", "WindowMultiHeadAttention"),
        ("maxvit_pico_rw_256", "attn_block is .*Attention"),
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(UserError, match=says) as error:
            attention_layers(model)
        assert one_line(error)
    with pytest.raises(UserError, match="MultiheadAttention"):
        attention_layers(nn.TransformerEncoderLayer(8, 2))


def test_a_subclass_that_computes_something_else_is_not_taken_for_what_it_is_not():
    model = made("vit_tiny_patch16_224", **VIT | NAMED)

    class Other(type(model.blocks[0].attn)):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    model.blocks[0].attn.__class__ = Other
    with pytest.raises(UserError, match=r"blocks\.0\.attn is .*Other"):
        attention_layers(model)
    swin, _, _ = timm_swin("even")
    swin.layers[0].blocks[0].attn = Other(16)
    with pytest.raises(UserError, match=r"layers\.0\.blocks\.0\.attn is .*Other"):
        attention_layers(swin)


def test_pooling_heads_and_attached_modules_are_passed_over():
    model = timm.create_model("vit_tiny_patch16_224", **VIT | NAMED | {"global_pool": "map", "class_token": False})
    attach(model, {"blocks.0": "global_tokens"}, input_size=(3, 48, 64))
    layers = attention_maps(model, torch.randn(1, 3, 48, 64))
    assert [layer.path for layer in layers] == ["blocks.0.attn", "blocks.1.attn"]


def test_chosen_layers_only():
    model, images = made("vit_tiny_patch16_224", **VIT | NAMED), images_of(1, 3, 48, 64)
    assert attention_layers(model) == ["blocks.0.attn", "blocks.1.attn"]
    (layer,) = attention_maps(model, images, layers=["blocks.1.attn"])
    assert layer.path == "blocks.1.attn"
    with pytest.raises(UserError, match=r"'blocks\.7' is no attention.*blocks\.0\.attn, blocks\.1\.attn"):
        attention_maps(model, images, layers=["blocks.7"])


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ((6, 0), "query = .6, 0.: outside of the grid of blocks.0.attn: rows 0 to 5, columns 0 to 7"),
        ((0, 8), "rows 0 to 5, columns 0 to 7"),
        ((-1, 0), "outside of the grid"),
        (1, "query = 1: in blocks.0.attn tokens 0 to 0 stand before the patches"),
        (-1, "tokens 0 to 0"),
        ("max", "the number of a token"),
        ((1, 2, 3), "the number of a token"),
        ((1.5, 2), "the number of a token"),
        (True, "the number of a token"),
    ],
)
def test_queries_that_are_not_there(query, says):
    layer = attention_maps(made("vit_tiny_patch16_224", **VIT | NAMED), images_of(1, 3, 48, 64))[0]
    with pytest.raises(UserError, match=says) as error:
        layer.picture(query)
    assert one_line(error)
    if isinstance(query, int):
        with pytest.raises(UserError, match=r"has 1 tokens before the patches|token = True") as error:
            layer.looking_at(query)


def test_images_and_compiled_models_that_cannot_be():
    model = made("vit_tiny_patch16_224", **VIT | NAMED)
    with pytest.raises(UserError, match=r"images \(3, 48, 64\): must be"):
        attention_maps(model, images_of(3, 48, 64))
    model.blocks[1].compile(backend="eager")
    with pytest.raises(UserError, match=r"blocks\.1 is compiled"), record(model):
        pass
    assert hooks_of(model) == []
