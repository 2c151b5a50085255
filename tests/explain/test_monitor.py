"""The monitor's figures against slow loops over maps, and that watching changes nothing."""

import math

import pytest
import torch
from looked_at import NAMED, SEQUENCES, VIT, global_swin, hooks_of, images_of, made, timm_swin, unfused_weights

from ssl_global.encoders.global_swin import GlobalSwinConfig, GlobalSwinEncoder
from ssl_global.errors import UserError
from ssl_global.explain import layer as layer_file
from ssl_global.explain.layer import LayerMap
from ssl_global.explain.maps import attention_maps
from ssl_global.explain.monitor import FIGURES, AttentionMonitor

ALL = {"images": 10**6, "queries": 10**6}


def slow_figures(layers, num_heads):
    """Of LayerMaps of one layer, (heads,) each: query by query, key by key. Their weights and places are tested in
    test_maps.py."""
    result = []
    for head in range(num_heads):
        entropies, largest, near_zero, near_one, pixels, weight_between = [], [], [], [], 0.0, 0.0
        for layer in layers:
            weights = layer.weights()[:, :, head].tolist()
            may = layer.allowed if layer.allowed is not None else torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)
            may = may.expand(layer.weights().shape)[:, :, head].tolist()
            cols = layer.grid[1]
            for image in range(len(weights)):
                for group in range(len(weights[0])):
                    for q, query in enumerate(layer.queries[group].tolist()):
                        row, seen = weights[image][group][q], may[image][group][q]
                        for k, key in enumerate(layer.keys[group].tolist()):
                            if query >= layer.prefix and key >= layer.prefix:
                                a, b = query - layer.prefix, key - layer.prefix
                                down, right = (a // cols - b // cols), (a % cols - b % cols)
                                pixels += row[k] * math.hypot(down * layer.stride[0], right * layer.stride[1])
                                weight_between += row[k]
                        if query < 0 or sum(seen) < 2:
                            continue
                        entropies.append(-sum(w * math.log(w) for w in row if w > 0) / math.log(sum(seen)))
                        largest.append(max(row))
                        near_one.append(max(row) > 0.99)
                        near_zero += [w < 0.01 / sum(seen) for w, s in zip(row, seen, strict=True) if s]
        mean = [sum(values) / len(values) for values in (entropies, largest, near_zero, near_one)]
        result.append([mean[0], mean[1], pixels / weight_between if weight_between else None, mean[2], mean[3]])
    return result


def check(monitor, layers_of_calls):
    heads = monitor.heads()
    assert list(heads) == [layer.path for layer in layers_of_calls[0]]
    for layers in zip(*layers_of_calls, strict=True):
        table = heads[layers[0].path]
        for head, expected in enumerate(slow_figures(layers, layers[0].query.shape[2])):
            for name, value in zip(FIGURES, expected, strict=True):
                assert (name in table) == (value is not None)
                if value is not None:
                    assert table[name][head].item() == pytest.approx(value, rel=1e-9), (layers[0].path, name)


@pytest.mark.parametrize("name", ["registers", "no token", "relpos"])
def test_figures_of_a_vit_over_batches_of_two_sizes(name, monkeypatch):
    architecture, options, _, _ = SEQUENCES[name]
    model = made(architecture, **VIT | options | {"img_size": (48, 64), "patch_size": (16, 8)})
    batches = [images_of(2, 3, 48, 64), images_of(1, 3, 48, 64) + 1]
    monitor = AttentionMonitor(model, **ALL)
    for images in batches:
        with monitor.watching(), torch.no_grad():
            model(images)
    check(monitor, [attention_maps(model, images) for images in batches])
    figures = monitor.figures(heads=True)
    weights = unfused_weights(model, batches[0])[0], unfused_weights(model, batches[1])[0]
    largest = torch.cat(weights).amax(-1)
    assert figures["attention/blocks.0.attn/max"] == pytest.approx(largest.mean().item())
    assert figures["attention/blocks.0.attn/head_2/max"] == pytest.approx(largest[:, 2].mean().item())
    assert 0 < figures["attention/seconds"] < 60
    assert len(figures) == 1 + 2 * 5 * (1 + 4)
    assert len(monitor.figures()) == 1 + 2 * 5
    before = monitor.heads()
    monkeypatch.setattr(layer_file, "AT_ONCE", 300)  # in small pieces
    again = AttentionMonitor(model, **ALL)
    for images in batches:
        with again.watching(), torch.no_grad():
            model(images)
    for path, table in before.items():
        for figure, values in table.items():
            assert torch.allclose(again.heads()[path][figure], values)


@pytest.mark.parametrize("name", ["padded", "even"])
def test_figures_of_windows_leave_padding_out(name):
    model, images, _ = timm_swin(name)
    monitor = AttentionMonitor(model, **ALL)
    with monitor.watching(), torch.no_grad():
        model(images)
    check(monitor, [attention_maps(model, images)])


def test_figures_of_global_tokens():
    model, images = global_swin("scratch"), images_of(2, 3, 42, 51)
    monitor = AttentionMonitor(model, **ALL)
    with monitor.watching(), torch.no_grad():
        model(images)
    check(monitor, [attention_maps(model, images)])
    assert "distance" not in monitor.heads()["layers.0.mixers.1.read"]


def test_one_token_to_look_at_is_no_choice():
    model = global_swin("scratch", num_global_tokens=1)
    monitor = AttentionMonitor(model)
    with monitor.watching(), torch.no_grad():
        model(images_of(2, 3, 42, 51))
    assert monitor.heads()["layers.0.mixers.1.write"] == {}
    assert "write" not in "".join(monitor.warnings())


# ------------------------------------------------------------------------------------------------ what the figures mean


def one_layer(query, key):
    places = torch.arange(query.shape[-2])[None]
    return LayerMap(
        path="blocks.3.attn", query=query, key=key, queries=places, keys=places, grid=(2, 4), prefix=0,
        class_token=False, stride=(16.0, 16.0),
    )  # fmt: skip


def test_uniform_and_one_hot():
    model = made("vit_tiny_patch16_224", **VIT | NAMED)
    monitor = AttentionMonitor(model)
    query, key = torch.zeros(2, 1, 2, 8, 8), torch.eye(8).expand(2, 1, 2, 8, 8).clone()
    query[:, :, 1] = 1000 * torch.eye(8)  # the second head: each patch looks at itself
    monitor.see(one_layer(query, key))
    table = monitor.heads()["blocks.3.attn"]
    assert table["entropy"].tolist() == pytest.approx([1, 0])
    assert table["max"].tolist() == pytest.approx([1 / 8, 1])
    assert table["near_zero"].tolist() == pytest.approx([0, 7 / 8])
    assert table["near_one"].tolist() == [0, 1]
    assert table["distance"][1].item() == 0
    between = [math.hypot(a // 4 - b // 4, a % 4 - b % 4) * 16 for a in range(8) for b in range(8)]
    assert table["distance"][0].item() == pytest.approx(sum(between) / 64)
    assert monitor.warnings() == [
        "layer 0 (blocks.3.attn), head 0 attends uniformly: its entropy is 1.000 of the largest",
        "layer 0 (blocks.3.attn), head 1 is saturated: 1.00 of its weight on one token",
    ]


def test_a_whole_layer_that_attends_uniformly_is_one_warning():
    model, images = made("vit_tiny_patch16_224", **VIT | NAMED), images_of(2, 3, 48, 64)
    monitor = AttentionMonitor(model)
    with monitor.watching(), torch.no_grad():
        model(images)
    assert monitor.warnings() == []
    monitor.reset()
    assert monitor.heads() == {}
    assert monitor.figures() == {"attention/seconds": 0}
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[:64] = 0
    with monitor.watching(), torch.no_grad():
        model(images)
    (line,) = monitor.warnings()
    assert line == "layer 1 (blocks.1.attn) attends uniformly: its entropy is 1.000 of the largest possible"


# ------------------------------------------------------------------------------------------------ samples, and no trace


def test_samples_are_of_the_size_asked_for_and_drawn_anew():
    vit, (swin, swin_images, _) = made("vit_tiny_patch16_224", **VIT | NAMED), timm_swin("padded")
    for model, images, expected in (
        (vit, images_of(3, 3, 48, 64), (2, 1, 4, 20)),
        (swin, torch.cat([swin_images] * 2), (2, 1, 2, 16)),  # a window has 16
    ):
        monitor = AttentionMonitor(model, images=2, queries=20)
        seen, drawn = [], monitor.sample
        monitor.sample = lambda layer, to=seen, drawn=drawn: to.append(drawn(layer)) or to[-1]
        for _ in range(2):
            with monitor.watching(), torch.no_grad():
                model(images)
        assert seen[0].query.shape[:4] == expected
        assert len(seen[0].queries.unique()) > 5
        assert not torch.equal(seen[0].queries, seen[len(seen) // 2].queries)
        whole = {layer.path: layer for layer in attention_maps(model, images)}
        for part in seen:  # each sampled query has the weights that it has in the whole
            layer = whole[part.path]
            for group in range(len(part.queries)):
                a, b = place(layer, part, group)
                assert torch.allclose(part.weights()[:, group, :, 0], layer.weights()[:2, a, :, b], atol=1e-9)


def place(layer, part, group):
    """Group and number, in the whole layer, of the first query of a group of the part."""
    for a, keys in enumerate(layer.keys):
        if torch.equal(keys, part.keys[group]):
            return a, layer.queries[a].tolist().index(part.queries[group, 0].item())
    raise AssertionError


def test_every_so_many_steps_and_bitwise_the_same():
    model = made("vit_tiny_patch16_224", drop_path_rate=0.2, attn_drop_rate=0.2, **VIT | NAMED).train()
    images, monitor = images_of(2, 3, 48, 64), AttentionMonitor(model, every=3, images=1, queries=5)

    def step():
        torch.manual_seed(0)
        model.zero_grad()
        out = model(images)
        out.sum().backward()
        return out, model.blocks[0].attn.qkv.weight.grad.clone(), torch.get_rng_state()

    alone, watched = step(), []
    for _ in range(7):
        with monitor.watching():
            watched.append(bool(hooks_of(model)))
            for one, other in zip(step(), alone, strict=True):
                assert torch.equal(one, other)
    assert watched == [True, False, False, True, False, False, True]
    assert hooks_of(model) == []
    assert (
        sum(sums.of.numel() + sums.over.numel() for sums in monitor.sums.values()) == 2 * 2 * 5 * 4
    )  # all that is kept
    with pytest.raises(ZeroDivisionError), AttentionMonitor(model).watching():
        1 / 0  # noqa: B018
    assert hooks_of(model) == []


def test_hidden_patches_have_no_distance():
    config = GlobalSwinConfig(patch=4, width=16, depths=(2, 2), heads=(2, 4), window=4, tokens=3)
    encoder, hidden = GlobalSwinEncoder(config, pixels=32, channels=3), torch.ones(2, 4, 4, dtype=torch.bool)
    hidden[0, :2] = hidden[1, 2:] = False
    monitor = AttentionMonitor(encoder)
    with monitor.watching():
        encoder.encode(torch.randn(2, 3, 32, 32), hidden)
    names = {path: list(table) for path, table in monitor.heads().items()}
    assert names["model.layers.0.blocks.0.attn"] == ["entropy", "max", "near_zero", "near_one"]
    assert len(names) == 2 * (2 + 2) - 1


@pytest.mark.parametrize("option", ["every", "images", "queries"])
def test_numbers_that_cannot_be(option):
    model = made("vit_tiny_patch16_224", **VIT | NAMED)
    with pytest.raises(UserError, match=f"{option} = 0: at least 1"):
        AttentionMonitor(model, **{option: 0})
