"""Every head is walked: shapes, gradients, any size; and each is its paper's formula, in float64."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from ssl_global.finetuning import heads
from ssl_global.finetuning.heads.aspp import rates_for
from ssl_global.finetuning.heads.auxiliary import WEIGHT, AuxiliaryHead
from ssl_global.finetuning.pyramid import Features

NAMES = heads.names()
CHANNELS, STRIDES, CLASSES = (8, 12, 16, 24), (4, 8, 16, 32), 3
JOIN_SCALES = {"upernet"}
SIZES = [[(8, 12), (4, 6), (2, 3), (1, 2)], [(7, 5), (4, 3), (2, 2), (1, 1)], [(1, 1)] * 4]


def build(name, seed=0, **options):
    options = options if name == "linear" else {"width": 8} | options
    torch.manual_seed(seed)
    return heads.build(name, CHANNELS, STRIDES, CLASSES, **options)


def moved(name, **options):
    """As after some training: no parameter, and no mean or spread of a norm, is where it began."""
    module = build(name, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for key, buffer in module.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer += 0.3 * torch.rand(buffer.shape, generator=generator)
    return module


def maps(batch=2, sizes=SIZES[0], seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, *size, generator=generator) for c, size in zip(CHANNELS, sizes, strict=True)]


def doubles(batch=2, sizes=((9, 7), (5, 6), (5, 4), (3, 4))):
    return [x.double() for x in maps(batch, sizes)]


def test_the_walk_finds_the_heads():
    print(f"{len(NAMES)} heads: {', '.join(NAMES)}")
    assert set(NAMES) == {"aspp", "ccnet", "danet", "fcn", "linear", "ppm", "upernet"}
    assert {name for name in NAMES if heads.head_class(name).joins_scales} == JOIN_SCALES


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_and_a_single_image(name, batch, training):
    for sizes in SIZES:
        head = moved(name).train(training)
        features = [x.requires_grad_() for x in maps(batch, sizes)]
        logits = head(features)
        size = sizes[0] if name in JOIN_SCALES else sizes[-1]
        assert logits.main.shape == (batch, CLASSES, *size)
        assert len(logits.auxiliary) == (2 if name == "danet" else 0)
        everything = [logits.main, *logits.auxiliary]
        assert all(each.shape == logits.main.shape and each.isfinite().all() for each in everything)
        sum(each.square().sum() for each in everything).backward()
        used = features if name in JOIN_SCALES else features[-1:]
        assert all(x.grad is not None and x.grad.isfinite().all() for x in used)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    """But a key's bias, which moves all logits of a query alike."""
    head = moved(name, dropout=0.0).train()
    logits = head([torch.randn(4, c, s, s) for c, s in zip(CHANNELS, (32, 24, 16, 12), strict=True)])
    sum(each.square().sum() for each in [logits.main, *logits.auxiliary]).backward()
    without = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in without if not n.endswith("key.bias")] == []


@pytest.mark.parametrize("name", NAMES)
def test_in_evaluation_images_do_not_see_each_other_and_nothing_is_dropped(name):
    head = moved(name).eval()
    x = maps()
    other = [torch.stack([each[0], torch.randn_like(each[1])]) for each in x]
    assert torch.equal(head(x).main, head(x).main)
    assert torch.equal(head(x).main[0], head(other).main[0])
    assert not torch.equal(head(x).main[1], head(other).main[1])


@pytest.mark.parametrize("name", NAMES)
def test_in_training_as_much_is_dropped_as_is_asked(name):
    x = maps()
    for dropout in (0.0, 0.5):
        head = moved(name, dropout=dropout).train()
        assert torch.equal(head(x).main, head(x).main) == (dropout == 0)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_state_dicts(name):
    head, twin = moved(name).eval(), build(name, seed=3).eval()
    twin.load_state_dict(head.state_dict())
    assert torch.equal(head(maps()).main, twin(maps()).main)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(maps()).main.isfinite().all()


@given(rows=st.integers(1, 9), cols=st.integers(1, 9), batch=st.integers(1, 2), name=st.sampled_from(NAMES))
@settings(max_examples=30)
def test_sizes_that_fit_no_pyramid(rows, cols, batch, name):
    """A map need be no half of the one before it."""
    sizes = [(rows, cols), (cols, rows), (1, cols), (rows, 1)]
    logits = build(name).train()(maps(batch, sizes)).main
    assert logits.shape == (batch, CLASSES, *(sizes[0] if name in JOIN_SCALES else sizes[-1]))
    assert logits.isfinite().all()


# --------------------------------------------------------------------------------------------------------- formulas


def conv(part, x, kernel=3):
    """Convolution without bias, norm in evaluation, ReLU."""
    weight, norm = part[0].weight, part[1]
    assert weight.shape[2:] == (kernel, kernel)
    x = F.conv2d(x, weight, padding=kernel // 2)
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps)[:, None, None].sqrt()
    return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp_min(0)


def classes(part, x):
    return F.conv2d(x, part[1].weight, part[1].bias)


def flat(x):
    return x.flatten(2).transpose(1, 2)


def as_map(tokens, like):
    return tokens.transpose(1, 2).reshape(like.shape)


def gathered(module, x, mask=None):
    logits = flat(module.query(x)) @ flat(module.key(x)).transpose(1, 2)
    logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
    return x + module.gamma * as_map(logits.softmax(-1) @ flat(module.value(x)), x)


def resized(x, like):
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def pooled(part, x):
    beside = [conv(layer, F.adaptive_avg_pool2d(x, n), 1) for n, layer in zip((1, 2, 3, 6), part.pooled, strict=True)]
    beside = [F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=True) for y in beside]
    return conv(part.join, torch.cat([x, *beside], dim=1))


def test_linear_is_a_norm_and_a_matrix():
    head, x = moved("linear").double().eval(), doubles()
    mean, spread = head.norm.running_mean, (head.norm.running_var + head.norm.eps).sqrt()
    y = (flat(x[-1]) - mean) / spread * head.norm.weight + head.norm.bias
    y = y @ head.classify[1].weight[:, :, 0, 0].T + head.classify[1].bias
    torch.testing.assert_close(flat(head(x).main), y)


def test_fcn_is_two_convolutions():
    head, x = moved("fcn").double().eval(), doubles()
    y = conv(head.convolve[1], conv(head.convolve[0], x[-1]))
    torch.testing.assert_close(head(x).main, classes(head.classify, y))


def test_ppm_is_the_pooled_map():
    head, x = moved("ppm").double().eval(), doubles()
    torch.testing.assert_close(head(x).main, classes(head.classify, pooled(head.pool, x[-1])))


def test_aspp_is_torchvisions_head():
    """Which has 256 channels: all is copied, in its order."""
    head = moved("aspp", width=256, rates=(12, 24, 36)).double()
    other = DeepLabHead(CHANNELS[-1], CLASSES).double()
    mine, theirs = head.state_dict(), other.state_dict()
    assert [v.shape for v in mine.values()] == [v.shape for v in theirs.values()]
    other.load_state_dict(dict(zip(theirs, mine.values(), strict=True)))
    x = doubles()
    torch.testing.assert_close(head.eval()(x).main, other.eval()(x[-1]))
    torch.manual_seed(5)
    expected = other.train()(x[-1])
    torch.manual_seed(5)
    torch.testing.assert_close(head.train()(x).main, expected)


def test_aspps_taps_are_as_far_apart_in_pixels_at_any_stride():
    assert rates_for(8) == (12, 24, 36)
    assert rates_for(16) == (6, 12, 18)
    assert rates_for(32) == (3, 6, 9)
    assert rates_for(1000) == (1, 1, 1)
    assert build("aspp").rates == (3, 6, 9)


@pytest.mark.parametrize("energy", ["official", "paper"])
def test_danet_is_both_attentions_and_their_sum(energy):
    head, x = moved("danet", energy=energy).double().eval(), doubles()
    position = gathered(head.position[1], conv(head.position[0], x[-1]))
    position = conv(head.position[2], position)
    channel = conv(head.channel[0], x[-1])
    rows = channel.flatten(2)
    likeness = rows @ rows.transpose(1, 2)
    weights = (likeness if energy == "paper" else -likeness).softmax(-1)
    channel = channel + head.channel[1].gamma * (weights @ rows).view_as(channel)
    channel = conv(head.channel[2], channel)
    logits = head(x)
    torch.testing.assert_close(logits.main, classes(head.classify, position + channel))
    torch.testing.assert_close(logits.auxiliary[0], classes(head.classify_position, position))
    torch.testing.assert_close(logits.auxiliary[1], classes(head.classify_channel, channel))
    assert head.auxiliary_weight == 1.0


@pytest.mark.parametrize("recurrence", [1, 2])
def test_ccnet_is_masked_attention_beside_the_map(recurrence):
    head, x = moved("ccnet", recurrence=recurrence).double().eval(), doubles()
    rows, cols = x[-1].shape[2:]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    mask = (places[:, None] == places[None]).any(-1)
    y = conv(head.gather[0], x[-1])
    for _ in range(recurrence):
        y = gathered(head.gather[1], y, mask)
    y = conv(head.join, torch.cat([x[-1], conv(head.gather[2], y)], dim=1))
    torch.testing.assert_close(head(x).main, classes(head.classify, y))


def test_ccnet_goes_round_twice():
    assert build("ccnet").gather[1].recurrence == 2


def test_upernet_is_a_pyramid_from_the_top_down():
    head, x = moved("upernet").double().eval(), doubles()
    p5 = pooled(head.top, x[3])
    p4 = conv(head.lateral[2], x[2], 1) + resized(p5, x[2])
    p3 = conv(head.lateral[1], x[1], 1) + resized(p4, x[1])
    p2 = conv(head.lateral[0], x[0], 1) + resized(p3, x[0])
    levels = [conv(head.smooth[0], p2), conv(head.smooth[1], p3), conv(head.smooth[2], p4), p5]
    y = conv(head.join, torch.cat([resized(level, x[0]) for level in levels], dim=1))
    torch.testing.assert_close(head(x).main, classes(head.classify, y))


def test_the_auxiliary_head_looks_at_the_last_map_but_one():
    torch.manual_seed(0)
    head, x = AuxiliaryHead(CHANNELS, STRIDES, CLASSES, width=8).double().eval(), doubles()
    torch.testing.assert_close(head(x), classes(head.classify, conv(head.convolve, x[-2])))
    assert WEIGHT == 0.4
    assert AuxiliaryHead(CHANNELS, STRIDES, CLASSES)(maps(1, SIZES[2])).shape == (1, CLASSES, 1, 1)
    with pytest.raises(ValueError, match="one map"):
        AuxiliaryHead((8,), (32,), CLASSES)


# --------------------------------------------------------------------------------------- what cannot be; on backbones


def test_what_there_is_not_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"'upernett'.*nearest are upernet"):
        heads.build("upernett", CHANNELS, STRIDES, CLASSES)
    with pytest.raises(ValueError, match="none; the nearest are"):
        heads.build("base", CHANNELS, STRIDES, CLASSES)
    with pytest.raises(ValueError, match="no option 'widht'; there are width, dropout"):
        heads.build("fcn", CHANNELS, STRIDES, CLASSES, widht=8)
    with pytest.raises(ValueError, match="no option 'width'"):
        heads.build("linear", CHANNELS, STRIDES, CLASSES, width=8)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_cannot_be_are_refused(name):
    for channels, strides, num_classes, said in [
        ((), (), 3, "at least one map"),
        ((8, 0), (4, 8), 3, "each at least 1"),
        ((8, 8), (4,), 3, "one for each of 2 maps"),
        ((8, 8), (8, 4), 3, "fine to coarse"),
        ((8,), (4,), 0, "num_classes = 0"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: .*{said}"):
            heads.build(name, channels, strides, num_classes)


SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 4}
BACKBONES = {
    "resnet": ("resnet18", {}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN | {"strict_img_size": False}),
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 16, "depth": 3, "num_heads": 2, "dynamic_img_size": True}),
}


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    torch.manual_seed(0)
    name, options = BACKBONES[request.param]
    return timm.create_model(name, features_only=True, **options)


def test_all_heads_run_on_all_families(backbone):
    """And leave no parameter without a gradient, where a head gets the maps that it is for."""
    images = torch.randn(1, 3, 50, 37)
    for name in NAMES:
        head_class = heads.head_class(name)
        features = Features(backbone, pyramid=head_class.joins_scales, width=8)
        head = heads.build(
            name, features.channels, features.strides, CLASSES, **({} if name == "linear" else {"width": 8})
        )
        beside = AuxiliaryHead(features.channels, features.strides, CLASSES, width=8)
        both = torch.nn.ModuleList([features, head, beside]).train()
        both.zero_grad(set_to_none=True)
        x = features(images)
        outputs = [*head(x), beside(x)]
        outputs = [outputs[0], *outputs[1], outputs[2]]
        logits = [features.to_image(each, (50, 37)) for each in outputs]
        assert all(each.shape == (1, CLASSES, 50, 37) and each.isfinite().all() for each in logits)
        sum(each.square().sum() for each in logits).backward()
        assert [n for n, p in both.named_parameters() if p.grad is None] == [], name
