"""Any timm model as an encoder: summary and patches are timm's own, at any size, whatever the layout."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from recipes_under_test import load_recipe

from ssl_global.encoders.timm_model import TimmConfig
from ssl_global.errors import UserError
from ssl_global.export import export

SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4, "window_size": 4}
MODELS = {
    "test_resnet": "{}",
    "test_convnext": "{}",
    "test_vit": "{}",
    "test_mambaout": "{}",
    "swin_tiny_patch4_window7_224": json.dumps(SWIN),
}


def recipe_of(config, pixels=64, local_pixels=32):
    recipe = load_recipe("consistency", "demo")
    views = replace(recipe.views, globals=replace(recipe.views.globals, pixels=pixels))
    return replace(recipe, encoder=config, views=replace(views, locals=replace(views.locals, pixels=local_pixels)))


def map_of(model, features):
    """(B, C, H, W), by timm's own word for the layout."""
    if features.ndim == 3:
        return features[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (4, 6))
    last = "swin" in type(model).__name__.lower() or "mamba" in type(model).__name__.lower()
    return features.permute(0, 3, 1, 2) if last else features


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_timms(name, tmp_path):
    recipe = recipe_of(TimmConfig(name=name, model_args=MODELS[name]))
    recipe.check()
    encoder = recipe.encoder.build(recipe).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = encoder(images)
        features = encoder.model.forward_features(images)
        assert torch.equal(tokens.summary, encoder.model(images))
        expected = map_of(encoder.model, features)
        assert tokens.grid == tuple(expected.shape[2:])
        assert torch.equal(tokens.patches, expected.flatten(2).transpose(1, 2))
        assert (tokens.summary.shape[1], tokens.patches.shape[2]) == (encoder.width, encoder.patch_width)
        assert encoder(images[:, :, :32, :32]).grid[0] <= tokens.grid[0]
    folder = export(encoder, tmp_path / "export", recipe=recipe, summary={}, what="student")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images[:, :, :, :64]), encoder(images[:, :, :, :64]).summary)


@pytest.mark.parametrize(
    ("config", "pixels", "words"),
    [
        (TimmConfig(name="resnet1"), 64, r"encoder\.name = resnet1"),
        (TimmConfig(name="test_resnet", model_args="{"), 64, r"encoder\.model_args = {: no JSON"),
        (TimmConfig(name="test_vit"), 40, r"views\.locals\.pixels = 40: test_vit does not take them: .*patch size"),
        (TimmConfig(name="hiera_tiny_224"), 32, r"hiera_tiny_224"),
    ],
)
def test_what_cannot_be_is_refused(config, pixels, words):
    with pytest.raises(UserError, match=words):
        recipe_of(config, local_pixels=pixels).check()
