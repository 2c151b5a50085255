"""Attention pooling in models of timm: against the formula, over the kinds of heads, and what is refused."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from recipes_under_test import load_recipe
from torch import nn

from ssl_global.encoders.pooling import AttentionPool, attention_pool, pool_by_attention
from ssl_global.encoders.pretrained import Pretrained, PretrainedConfig
from ssl_global.errors import UserError

SWIN = json.dumps({"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]})
OTHERS = {
    "test_resnet": "{}",
    "test_convnext": "{}",  # a norm between pooling and classifier
    "mobilenetv3_small_050": "{}",  # a convolution there
    "swin_tiny_patch4_window7_224": SWIN,  # channels last
    "global_swin_tiny_patch4_window7_224": SWIN,
}


def built(name: str, **config: str) -> Pretrained:
    recipe = load_recipe("finetune", "demo")
    recipe = replace(recipe, encoder=PretrainedConfig(name=name, **({"model_args": OTHERS.get(name, "{}")} | config)))
    torch.manual_seed(0)
    encoder = recipe.encoder.build(recipe)
    assert isinstance(encoder, Pretrained)
    return encoder.eval()


def slowly(pool: AttentionPool, map_BNC: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v by head and place, then x + MLP(norm(x))."""
    a = pool.attention
    x = nn.functional.layer_norm(map_BNC, map_BNC.shape[-1:], pool.norm.weight, pool.norm.bias)
    query = a.latent[0, 0] @ a.q.weight.T + a.q.bias
    rows = []
    for places in x:
        keys, values = (places @ a.kv.weight.T + a.kv.bias).chunk(2, dim=1)
        heads = []
        for h in range(a.num_heads):
            own = slice(h * a.head_dim, (h + 1) * a.head_dim)
            scores = torch.stack([query[own] @ key[own] for key in keys]) / a.head_dim**0.5
            share = scores.exp() / scores.exp().sum()
            heads.append(sum(s * value[own] for s, value in zip(share, values, strict=True)))
        rows.append(torch.cat(heads) @ a.proj.weight.T + a.proj.bias)
    y = torch.stack(rows)
    return y + a.mlp(a.norm(y))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_pooling_is_the_formula(channels_last: bool, flat: bool) -> None:
    torch.manual_seed(1)
    pool = AttentionPool(64, channels_last=channels_last, flat=flat, replaced="avg").double()
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 4, 64, dtype=torch.float64)
    found = pool(x if channels_last else x.permute(0, 3, 1, 2))
    shape = (2, 64) if flat else (2, 1, 1, 64) if channels_last else (2, 64, 1, 1)
    assert found.shape == shape
    torch.testing.assert_close(found.flatten(1), slowly(pool, x.flatten(1, 2)))


def mean(pool: AttentionPool, given: tuple[torch.Tensor], answer: torch.Tensor) -> torch.Tensor:
    return given[0].mean((1, 2) if pool.channels_last else (2, 3)).view_as(answer)


@pytest.mark.parametrize("name", OTHERS)
def test_it_stands_in_the_place_of_the_average(name: str) -> None:
    """If the query's answer were the average, the network would say what it said with it."""
    attentive, plain = built(name, pool="map"), built(name)
    attentive.model.load_state_dict(plain.model.state_dict(), strict=False)
    pool = attention_pool(attentive.model)
    assert pool is not None
    assert pool in attentive.new_parts()
    assert attention_pool(plain.model) is None
    images = torch.randn(2, 3, 32, 32)
    expected = plain(images).summary
    assert not torch.allclose(attentive(images).summary, expected)
    pool.register_forward_hook(mean)
    torch.testing.assert_close(attentive(images).summary, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_a_classifier_is_put_behind_the_same_pooling(name: str) -> None:
    encoder = built(name, pool="map")
    images = torch.randn(2, 3, 32, 32)
    before = encoder(images).summary
    encoder.tell_apart(("a", "b", "c"))
    encoder.eval()
    assert torch.equal(encoder(images).summary, before)
    assert encoder.model(images).shape == (2, 3)
    assert attention_pool(encoder.model) in encoder.new_parts()


def test_timms_own_is_taken_where_there_is_one() -> None:
    encoder = built("test_vit", pool="map")
    assert encoder.model_args["global_pool"] == "map"
    assert attention_pool(encoder.model) is None
    assert encoder.model.attn_pool in encoder.new_parts()


@pytest.mark.parametrize("before", ["token", "avg"])
def test_a_swin_with_global_tokens_has_all(before: str) -> None:
    arguments = json.dumps(json.loads(SWIN) | {"global_pool": before})
    images = torch.randn(1, 3, 32, 32)
    said = {}
    for pool in ("token", "avg", "max", "map"):
        encoder = built("global_swin_tiny_patch4_window7_224", model_args=arguments, pool=pool)
        tokens = encoder.model.forward_tokens(images)
        said[pool] = encoder(images).summary
        if pool == "token":
            torch.testing.assert_close(said[pool], tokens[1].mean(1))
        if pool == "avg":
            torch.testing.assert_close(said[pool], tokens[0].mean((1, 2)))
        encoder.tell_apart(("a", "b"))
        torch.testing.assert_close(encoder.eval()(images).summary, said[pool])
    assert not torch.allclose(said["map"], said["avg"])


@pytest.mark.parametrize(
    ("name", "pool", "others"),
    [
        ("test_resnet", "token", "avg, max, avgmax, map"),
        ("test_vit", "middle", "token, avg, max, avgmax, map"),
        ("pvt_v2_b0", "map", "avg"),
        ("vgg11", "map", "avg, max, avgmax"),
        ("global_swin_tiny_patch4_window7_224", "tokens", "token, avg, max, avgmax, map"),
    ],
)
def test_what_a_model_cannot_have_is_answered_with_what_it_can(name: str, pool: str, others: str) -> None:
    with pytest.raises(UserError) as caught:
        built(name, pool=pool)
    assert str(caught.value) == f"encoder.pool = {pool}: {name} has {others}"


def test_a_model_without_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match="VisionTransformer has no average of a map"):
        pool_by_attention(timm.create_model("test_vit"))
