"""A Swin with global tokens is timm's Swin until it is trained, sees the whole image after, and nothing hidden."""

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes_under_test import load_recipe
from timm.models.swin_transformer import default_cfgs as swin_cfgs
from timm.optim import param_groups_layer_decay

from ssl_global.attention.windows import Whole, biases
from ssl_global.encoders.global_swin import NAMES, GlobalSwinConfig, GlobalSwinEncoder, is_new
from ssl_global.errors import UserError
from ssl_global.methods.masking import random_hidden, uniform_hidden
from ssl_global.training.engine import compile_blocks

SMALL = {
    "embed_dim": 16,
    "depths": (2, 2, 3),
    "num_heads": (1, 2, 4),
    "window_size": 4,
    "img_size": 64,
    "num_classes": 5,
}
BUILT = GlobalSwinConfig(width=16, depths=(2, 2, 2), heads=(1, 2, 4), window=8)


def create(name="global_swin_tiny_patch4_window7_224", seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **(SMALL | options)).eval()


def encoder(pixels=64, channels=3, seed=0, **changes) -> GlobalSwinEncoder:
    torch.manual_seed(seed)
    return GlobalSwinEncoder(GlobalSwinConfig(**(vars(BUILT) | changes)), pixels=pixels, channels=channels).eval()


def pair(size, **options):
    """timm's Swin and ours with its weights."""
    torch.manual_seed(0)
    plain = timm.create_model(f"swin_{size}_patch4_window7_224", strict_img_size=False, drop_path_rate=0.2, **options)
    ours = timm.create_model(f"global_swin_{size}_patch4_window7_224", start="identity", drop_path_rate=0.2, **options)
    keys = ours.load_state_dict(plain.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys
    assert all(map(is_new, keys.missing_keys))
    return plain, ours


# ---------------------------------------------------------------------------------------------------- as timm's Swin


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ("tiny", (224, 224)),
        ("tiny", (256, 320)),
        pytest.param("base", (224, 224), marks=pytest.mark.slow),
        pytest.param("base", (256, 320), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_identity_start_is_timms_swin_bitwise(size, pixels):
    """Of the larger one all blocks; of the tiny one two of each stage: with shifted windows and without."""
    plain, ours = pair(size, **({"depths": (2, 2, 2, 2)} if size == "tiny" else {}))
    images = torch.randn(1, 3, *pixels)
    for dtype in (torch.float32, torch.bfloat16):
        for training in (False, True):
            said = []
            for model in (plain, ours):
                model.to(dtype).train(training)
                torch.manual_seed(1)
                with torch.no_grad():
                    said.append((features := model.forward_features(images.to(dtype)), model.forward_head(features)))
            for theirs, mine in zip(*said, strict=True):
                assert torch.equal(theirs, mine)


@pytest.mark.parametrize("after", ["stage", "pair"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_identity_start_is_timms_swin_under_autocast(after, dtype):
    """The gates are float32 there, and must not widen what passes."""
    plain, ours = (
        create("swin_tiny_patch4_window7_224", strict_img_size=False),
        create(start="identity", global_after=after),
    )
    ours.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        theirs, mine = plain.forward_features(images), ours.forward_features(images)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
        assert torch.equal(plain(images), ours(images))


def test_identity_start_has_timms_gradients():
    """Also the tokens' gates get one: they learn from the first step."""
    plain, ours = pair("tiny", num_classes=3)
    images = torch.randn(2, 3, 64, 96)
    for model in (plain, ours):
        torch.manual_seed(2)
        model.train()(images).square().sum().backward()
    own = dict(ours.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, msg=name)
    gates = {name: p for name, p in own.items() if name.endswith("gate")}
    assert len(gates) == 4
    assert all(gate.grad.abs().max() > 0 for gate in gates.values())


def test_features_only_is_timms_too():
    torch.manual_seed(0)
    plain = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False)
    options = {"features_only": True, "pretrained": True}
    overlay = {"state_dict": plain.state_dict()}
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", strict_img_size=False, **options, pretrained_cfg_overlay=overlay
    ).eval()
    ours = timm.create_model(
        "global_swin_tiny_patch4_window7_224", start="identity", **options, pretrained_cfg_overlay=overlay
    ).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for mine, other in zip(ours(images), theirs(images), strict=True):
            assert torch.equal(mine, other)
    assert ours.feature_info.channels() == theirs.feature_info.channels() == [96, 192, 384, 768]
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    assert ours.output_fmt == theirs.output_fmt


def test_all_names_have_timms_parameters_and_new_ones_only():
    for name in NAMES:
        with torch.device("meta"):
            plain = timm.create_model(name).state_dict()
            ours = timm.create_model(f"global_{name}").state_dict()
        assert {key: value.shape for key, value in ours.items() if not is_new(key)} == {
            key: value.shape for key, value in plain.items()
        }
        assert 0 < sum(v.numel() for k, v in ours.items() if is_new(k)) < 0.1 * sum(v.numel() for v in plain.values())
        assert timm.models.get_pretrained_cfg(f"global_{name}").input_size == swin_cfgs[name].default.input_size
    print(f"{len(NAMES)} names")
    assert set(NAMES) == set(timm.list_models("swin_*", module="swin_transformer"))


def test_timms_weights_load_from_a_file_as_pretrained(tmp_path):
    plain = create("swin_tiny_patch4_window7_224", seed=3, strict_img_size=False, num_classes=1000)
    torch.save(plain.state_dict(), tmp_path / "swin.pth")
    ours = create(pretrained=True, num_classes=1000, start="identity",
                  pretrained_cfg_overlay={"file": str(tmp_path / "swin.pth")})  # fmt: skip
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(plain(images), ours(images))


def test_loading_is_strict_about_all_but_the_new_parameters(tmp_path):
    state = create("swin_tiny_patch4_window7_224", num_classes=1000).state_dict()
    state.pop("layers.1.blocks.0.norm1.weight")
    torch.save(state, tmp_path / "swin.pth")
    with pytest.raises(RuntimeError, match=r"layers.1.blocks.0.norm1.weight"):
        create(pretrained=True, num_classes=1000, pretrained_cfg_overlay={"file": str(tmp_path / "swin.pth")})


# ------------------------------------------------------------------------------------------------------------- reach


def first_stage(model, images):
    with torch.no_grad():
        return model.forward_intermediates(images, indices=[0], intermediates_only=True, output_fmt="NHWC")[0]


def test_a_corner_reaches_every_position_of_the_first_stage_only_with_tokens():
    images = torch.randn(1, 3, 96, 128)
    changed = images.clone()
    changed[:, :, :4, :4] += 1
    without, with_tokens = create(global_stages=[2]), create()
    moved = [(first_stage(m, images) - first_stage(m, changed)).abs().amax(-1)[0] for m in (without, with_tokens)]
    assert moved[0].shape == (24, 32)
    assert (moved[1] > 0).all()
    # Windows of 4, then the same shifted by 2: the corner is seen from 6 tokens away at most, wrapping excluded.
    assert (moved[0][:6, :6] > 0).any()
    assert (moved[0][6:] == 0).all()
    assert (moved[0][:, 6:] == 0).all()


def test_a_patch_reaches_the_tokens_whatever_is_between():
    model = create(global_pool="token")
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    features = model.forward_features(images)
    assert features.shape == (1, 8 + 16, 64)
    features[:, : model.num_prefix_tokens].square().sum().backward()
    assert (images.grad.abs().amax(1) > 0).all()


# -------------------------------------------------------------------------------------------------- sizes and shapes


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), channels=st.sampled_from([1, 3, 5]), pool=st.booleans())
def test_any_size(height, width, channels, pool):
    """That the windows' padding is seen by nobody, attention/test_windows.py shows by loops."""
    built = encoder(channels=channels, pool="token" if pool else "avg")
    images = torch.randn(1, channels, height, width)
    with torch.no_grad():
        tokens = built.encode(images)
    assert tokens.grid == (-(-height // 16), -(-width // 16))
    assert tokens.patches.shape == (1, tokens.grid[0] * tokens.grid[1], 64)
    assert tokens.summary.shape == (1, 64)
    assert tokens.summary.isfinite().all()
    with torch.no_grad():
        assert torch.equal(tokens.summary, built.model(images))  # what timm's users get


def test_images_do_not_see_each_other():
    built = encoder()
    images = torch.randn(3, 3, 40, 72)
    with torch.no_grad():
        together = built.encode(images)
        for index in range(3):
            alone = built.encode(images[index : index + 1])
            torch.testing.assert_close(alone.patches[0], together.patches[index])
            torch.testing.assert_close(alone.summary[0], together.summary[index])


@pytest.mark.parametrize("start", ["identity", "scratch"])
@pytest.mark.parametrize("after", ["stage", "pair"])
@pytest.mark.parametrize("stages", [None, (0,), (1, 2)])
def test_channels_of_every_stage_and_choices_of_places(start, after, stages):
    model = create(start=start, global_after=after, global_stages=stages)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(2, 3, 50, 70), intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 13, 18), (2, 32, 7, 9), (2, 64, 4, 5)]
    places = [list(stage.mixers) for stage in model.layers]
    per_stage = [["1"], ["1"], ["1", "2"] if after == "pair" else ["2"]]
    assert places == [want if stages is None or index in stages else [] for index, want in enumerate(per_stage)]


def test_bf16_and_every_parameter_gets_a_gradient():
    for pool in ("token", "avg"):
        built = encoder(pool=pool).train()
        with torch.autocast("cpu", torch.bfloat16):
            summary = built.encode(torch.randn(2, 3, 60, 44)).summary
        summary.float().square().sum().backward()
        assert summary.isfinite().all()
        assert [n for n, p in built.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_recomputed_activations_change_no_gradient():
    plain, frugal = encoder(drop_path=0.3).train(), encoder(drop_path=0.3).train()
    frugal.recompute_activations()
    images = torch.randn(2, 3, 64, 64)
    for built in (plain, frugal):
        torch.manual_seed(5)
        built.encode(images).summary.square().sum().backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# ------------------------------------------------------------------------------------------------ timm's contract


@pytest.mark.parametrize("start", ["scratch", pytest.param("identity", marks=pytest.mark.slow)])
def test_stages_compile_without_a_break(start):
    model = create(start=start, depths=(1, 2), num_heads=(1, 2))
    images = torch.randn(2, 3, 36, 30)
    torch._dynamo.reset()  # sizes that other tests have compiled for would make these symbolic: minutes
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # a break is an error
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))
    model.train()
    compiled(images).sum().backward()
    assert model.global_tokens.grad is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of what it compiles
def test_blocks_compile_by_themselves_as_training_does():
    """Four stages, views of two sizes, with and without gradient, hidden patches: none falls back to eager."""
    built, same = (encoder(depths=(1, 2, 2, 1), heads=(1, 1, 2, 2)).train() for _ in range(2))
    torch._dynamo.reset()
    compile_blocks(built, backend="aot_eager")
    views, hidden = [torch.randn(2, 3, side, side) for side in (64, 32)], uniform_hidden(torch.arange(2), (4, 4))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for images in views:
            with torch.no_grad():
                torch.testing.assert_close(built.encode(images).summary, same.encode(images).summary)
            torch.testing.assert_close(built.encode(images).summary, same.encode(images).summary)
        torch.testing.assert_close(built.encode(views[0], hidden).summary, same.encode(views[0], hidden).summary)


@pytest.mark.parametrize("start", ["identity", "scratch"])
def test_it_can_be_exported_for_any_batch(start):
    model = create(start=start, depths=(1, 2), num_heads=(1, 2))
    images = torch.randn(2, 3, 48, 72)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (images, torch.randn(5, 3, 48, 72)):
        torch.testing.assert_close(program.module()(batch), model(batch))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_heads_copies_and_pickles(pool):
    model = create(global_pool=pool)
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    last, maps = model.forward_intermediates(images)
    assert torch.equal(last, features)
    assert [m.shape[1] for m in maps] == [16, 32, 64]
    assert model.forward_head(features, pre_logits=True).shape == (2, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))
    create(seed=1, global_pool=pool).load_state_dict(model.state_dict())
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0, "avg")
    assert torch.equal(model(images), model.forward_tokens(images)[0].mean((1, 2)))
    model.reset_classifier(0, "token")
    assert torch.equal(model(images), model.forward_tokens(images)[1].mean(1))


@pytest.mark.filterwarnings("ignore")  # timm's interpolation warns
def test_input_size_and_windows_can_be_set():
    model = create()
    model.set_input_size(img_size=(96, 128), window_size=(6, 8))
    assert model(torch.randn(1, 3, 96, 128)).shape == (1, 5)
    assert {stage.blocks[0].window_size for stage in model.layers} == {(6, 8)}


def test_layer_decay_puts_tokens_with_the_blocks_that_they_follow():
    model = create()
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    of = {name: scale[id(p)] for name, p in model.named_parameters()}
    for stage, last in ((0, 1), (1, 1), (2, 2)):
        block = of[f"layers.{stage}.blocks.{last}.mlp.fc1.weight"]
        assert of[f"layers.{stage}.mixers.{last}.of_patches.weight"] == block
        assert of[f"layers.{stage}.mixers.{last}.gate"] == (block[0], 0.0)
    assert of["layers.2.carry.weight"][0] == of["layers.2.downsample.reduction.weight"][0]
    assert of["global_tokens"] == (of["patch_embed.proj.weight"][0], 0.0)
    assert of["layers.0.blocks.0.attn.relative_position_bias_table"][1] == 0.0


def test_features_of_an_early_stage_leave_the_rest_out():
    model = create(features_only=True, out_indices=(0, 1))
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 64, 64))] == [(1, 16, 16, 16), (1, 8, 8, 32)]
    assert not any("layers.2" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "warm"}, "start = 'warm': identity or scratch"),
        ({"global_after": "block"}, "global_after = 'block': stage or pair"),
        ({"num_global_tokens": 0}, "num_global_tokens = 0: at least 1"),
        ({"global_stages": (3,)}, r"global_stages = \(3,\): some of 0 to 2"),
        ({"global_stages": (0,), "global_pool": "token"}, "the last stage has no global tokens"),
        ({"global_bottleneck": 17}, "global_bottleneck = 17: 1 to 16"),
        ({"global_bottleneck": 0}, "global_bottleneck = 0: 1 to 16"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_a_summary_that_is_not_there_is_refused_later_too():
    with pytest.raises(ValueError, match="the last stage has no global tokens"):
        create(global_stages=(0,)).reset_classifier(3, "token")


def test_weights_of_a_model_without_memory_can_be_made():
    """As timm's: meta device, to_empty, init_weights."""
    with torch.device("meta"):
        model = create(start="identity")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model.init_weights(needs_reset=True)
    assert [n for n, p in model.named_parameters() if p.eq(7).any()] == []
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("gate"))


def test_an_option_that_is_not_there_is_an_error():
    with pytest.raises(TypeError, match="num_global_token"):
        create(num_global_token=8)


# ---------------------------------------------------------------------------------------------------- hidden patches


def masks(kind):
    """What is hidden, what is replaced, and all that is unseen: of 64 x 64 pixels."""
    seeds = torch.arange(3)
    if kind == "uniform":
        hidden = uniform_hidden(seeds, (8, 8))
        replaced = ~hidden & torch.tensor([True, False]).repeat(4)[None, None]
        return hidden, replaced, hidden | replaced
    unseen = random_hidden(seeds, (4, 4), 0.6)
    return (unseen, None, unseen) if kind == "random" else (None, unseen, unseen)


@pytest.mark.parametrize("kind", ["uniform", "random", "dense"])
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_hidden_pixels_change_nothing_and_get_no_gradient(kind, pool):
    built = encoder(pool=pool)
    hidden, replaced, unseen = masks(kind)
    images = torch.randn(3, 3, 64, 64, requires_grad=True)
    token = torch.randn(16)
    tokens = built.encode(images, hidden, replaced=replaced, token=token)
    (tokens.patches.square().sum() + tokens.summary.square().sum() + tokens.globals.square().sum()).backward()
    side = 64 // unseen.shape[1]
    pixels_unseen = unseen.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None].expand_as(images)
    assert images.grad[pixels_unseen].abs().max() == 0
    assert (images.grad[~pixels_unseen] != 0).float().mean() > 0.99
    garbage = torch.where(pixels_unseen, 1e6, images.detach())
    again = built.encode(garbage, hidden, replaced=replaced, token=token)
    for name in ("patches", "summary", "globals"):
        assert torch.equal(getattr(tokens, name), getattr(again, name)), name


@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_places_and_hidden_patches_cover_the_image_once(kind):
    hidden, _, _ = masks(kind)
    tokens = encoder().encode(torch.randn(3, 3, 64, 64), hidden)
    assert tokens.grid == hidden.shape[1:]
    for b in range(3):
        found = tokens.places[b].flatten().tolist()
        assert sorted(found + hidden[b].flatten().nonzero().flatten().tolist()) == list(range(hidden[b].numel()))


def test_cells_beyond_the_edge_stand_for_nothing():
    hidden = uniform_hidden(torch.arange(2), (7, 5))
    tokens = encoder().encode(torch.randn(2, 3, 56, 40), hidden)
    assert tokens.patches.shape[1] == 2 * 2
    real = [[p for p in places.flatten().tolist() if p < 35] for places in tokens.places]
    assert [len(found) for found in real] == [12, 12]
    assert tokens.places.max() == 35


def dense_stages(model, images, hidden, stages):
    """The whole image through the blocks themselves, hidden tokens there but attended by nobody: after each stage."""
    x, tokens = model.embed(images), model.global_tokens.expand(len(images), -1, -1)
    outputs = []
    for stage in model.layers[:stages]:
        x = stage.downsample(x)
        tokens = stage.carry(tokens)
        seen = ~hidden.repeat_interleave(x.shape[1] // hidden.shape[1], 1).repeat_interleave(
            x.shape[2] // hidden.shape[2], 2
        )
        for index, block in enumerate(stage.blocks):
            attention = block.attn
            windows = Whole().windows(x, block.window_size, shifted=bool(index % 2))
            normal = block.norm1(x)
            groups = windows.split(normal)
            q, k, v = attention.qkv(groups).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            logits = q @ k.transpose(-2, -1) * attention.scale + biases(attention, windows, num_groups=len(groups))
            keys_seen = windows.split(seen[..., None].float())[:, None, None, :, 0] > 0
            weights = logits.masked_fill(~keys_seen, -1e9).softmax(-1)
            mixed = attention.proj((weights @ v).transpose(1, 2).flatten(2))
            x = x + windows.join(mixed, like=normal)
            x = x + block.mlp(block.norm2(x))
            if str(index) in stage.mixers:
                flat = x.clone()
                for b in range(len(x)):
                    mixed_b, tokens_b = stage.mixers[str(index)](x[b][seen[b]][None], tokens[b : b + 1])
                    flat[b][seen[b]] = mixed_b[0]
                    tokens = torch.cat([tokens[:b], tokens_b, tokens[b + 1 :]])
                x = flat
        outputs.append((x, tokens, seen))
    return outputs


@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_dropping_hidden_patches_is_not_attending_to_them(kind):
    """The sparse encoder is the dense one with hidden keys masked out: tokens, maps, stage by stage.

    Windows of 16 tokens on 128 pixels. Units: all stages. Uniform: all but the last, whose merging joins patches that
    are no neighbours in the whole image.
    """
    built = encoder(pixels=128, depths=(2, 2, 2), window=16)
    seeds = torch.arange(2)
    hidden = uniform_hidden(seeds, (16, 16)) if kind == "uniform" else random_hidden(seeds, (8, 8), 0.7)
    images = torch.randn(2, 3, 128, 128)
    found = []
    with torch.no_grad():
        model = built.model
        stages = type(model).stages

        def recorded(self, x, layout, **options):
            for step in stages(self, x, layout, **options):
                found.append(step)
                yield step

        type(model).stages, kept = recorded, stages
        try:
            places = built.encode(images, hidden).places
        finally:
            type(model).stages = kept
        for (x, tokens), (whole, whole_tokens, seen) in zip(
            found, dense_stages(model, images, hidden, 2 if kind == "uniform" else 3), strict=False
        ):
            torch.testing.assert_close(tokens, whole_tokens)
            for b in range(2):
                mine = x[b].reshape(-1, x.shape[-1])
                theirs = whole[b][seen[b]]
                # The same vectors in another order: sort both by their first channels.
                assert len(mine) == len(theirs)
                torch.testing.assert_close(
                    mine[mine[:, 0].argsort()], theirs[theirs[:, 0].argsort()], rtol=1e-4, atol=1e-5
                )
    assert places is not None


@settings(max_examples=30, deadline=None)
@given(height=st.integers(9, 90), width=st.integers(9, 90), kind=st.sampled_from(["uniform", "random", "dense"]))
def test_hidden_pixels_change_nothing_at_any_size(height, width, kind):
    """Also of patches that reach over the edge."""
    side = 8 if kind == "uniform" else 16
    grid = (-(-height // side), -(-width // side))
    unseen = uniform_hidden(torch.arange(2), grid) if kind == "uniform" else random_hidden(torch.arange(2), grid, 0.5)
    if kind == "random" and unseen.all():
        return
    masked = {"replaced": unseen, "token": torch.randn(16)} if kind == "dense" else {"hidden": unseen}
    images = torch.randn(2, 3, height, width)
    pixels = unseen.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None, :height, :width].expand_as(images)
    built = encoder()
    with torch.no_grad():
        tokens, again = (built.encode(x, **masked) for x in (images, torch.where(pixels, 1e6, images)))
    assert torch.equal(tokens.patches, again.patches)
    assert torch.equal(tokens.summary, again.summary)
    assert tokens.patches.isfinite().all()


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(
        ValueError, match=r"hidden patches are \(3, 4\), of these .* \(4, 6\), 16 pixels each or \(8, 12\)"
    ):
        encoder().encode(torch.randn(1, 3, 64, 96), torch.zeros(1, 3, 4, dtype=torch.bool))


def test_a_mask_that_is_not_uniform_is_refused():
    with pytest.raises(ValueError, match="one patch visible in each cell"):
        encoder().encode(torch.randn(1, 3, 64, 64), torch.zeros(1, 8, 8, dtype=torch.bool))


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "swin_tiny_patch4_window7_224"}, "not a global_swin_.*global_swin_tiny_patch4_window7_224"),
        ({"heads": (2, 4, 7)}, "7 does not divide stage 2's width, 192"),
        ({"heads": (2, 4)}, "one number for each stage"),
        ({"depths": (1, 0, 2)}, "at least 1 block in each stage"),
        ({"tokens": 0}, "encoder.tokens = 0: at least 1"),
        ({"window": 0}, "encoder.window = 0: at least 1"),
        ({"mix_stages": (0, 1)}, "with pool = token 2 must be there"),
        ({"mix_stages": (5,), "pool": "avg"}, "some of 0 to 2"),
        ({"name": "global_swin_s3_tiny_224", "window": None}, "encoder.window = None: .* are not for 3 stages"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as refusal:
        load_recipe("dino_swin", "demo", **changes).check()
    assert "\n" not in str(refusal.value)
