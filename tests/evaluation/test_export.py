import json
import warnings

import pytest
import timm
import torch

from ssl_global.encoders.encoder import Encoder
from ssl_global.encoders.global_swin import GlobalSwinConfig
from ssl_global.encoders.vit import Vit, VitConfig
from ssl_global.errors import UserError
from ssl_global.export import compare, export
from ssl_global.methods.mae import MaeConfig
from ssl_global.recipe import Checkpoint, Crops, Data, EncoderConfig, Eval, Optim, Recipe, Train, Views

TINY = {"width": 48, "depth": 3, "heads": 3}
SWIN = {"depths": (1, 1, 3), "heads": (1, 2, 4)}


def recipe(encoder: EncoderConfig, *, channels: int = 3) -> Recipe:
    return Recipe(
        data=Data(channels=channels, mean=(0.4,) * channels, std=(0.3,) * channels),
        views=Views(globals=Crops(count=1, pixels=32)),
        encoder=encoder,
        method=MaeConfig(),
        optim=Optim(lr_per_256_images=1e-3, warmup_epochs=0, weight_decay=(0.05, 0.05)),
        train=Train(steps=10, global_batch=8),
        eval=Eval(every=10),
        checkpoint=Checkpoint(every=10),
    )


def trained_a_little(config: EncoderConfig, *, channels: int = 3) -> Encoder:
    """Every tensor moved from where initialisation puts it, so that a tensor left out of an export shows."""
    encoder = config.build(recipe(config, channels=channels)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder


CASES = {
    "colour": (VitConfig(patch=8, **TINY), 3),
    "grey_with_registers_pooled": (VitConfig(patch=4, registers=2, pool="avg", **TINY), 1),
    "fixed_positions": (VitConfig(patch=16, positions="sincos", **TINY), 3),
    "swin": (GlobalSwinConfig(width=16, **SWIN), 3),
    "swin_pooled": (GlobalSwinConfig(width=12, pool="avg", window=4, patch=2, mix_after="pair", **SWIN), 5),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def exported(request, tmp_path):
    config, channels = CASES[request.param]
    encoder = trained_a_little(config, channels=channels)
    folder = export(
        encoder,
        tmp_path / "my-run" / "export",
        recipe=recipe(config, channels=channels),
        summary={"knn": 0.625, "steps": 10, "recipe": {"not": "repeated"}},
        what="encoder",
    )
    images = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return encoder, folder, images, encoder.encode(images).summary


def test_timm_loads_it(exported):
    encoder, folder, images, expected = exported
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    config = timm.data.resolve_model_data_config(model)
    channels = encoder.channels
    assert tuple(config["input_size"]) == (channels, 32, 32)
    assert tuple(config["mean"]) == (0.4,) * channels
    assert tuple(config["std"]) == (0.3,) * channels
    assert config["interpolation"] == "bicubic"
    assert config["crop_pct"] == 0.875


def test_transformers_loads_it(exported):
    transformers = pytest.importorskip("transformers")
    encoder, folder, images, expected = exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        kinds = (transformers.TimmWrapperModel, transformers.AutoModel)
        models = [kind.from_pretrained(folder).eval() for kind in kinds]
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    for model in models:
        with torch.no_grad():
            assert torch.equal(model(images).pooler_output, expected)
    assert tuple(processor.data_config["input_size"]) == (encoder.channels, 32, 32)
    assert tuple(processor.data_config["mean"]) == (0.4,) * encoder.channels


def test_features_only_gives_maps_with_the_trained_weights(exported):
    encoder, folder, images, _ = exported
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        maps = model(images)
        form = str(model.output_fmt.value)
        expected = encoder.model.forward_intermediates(images, indices=3, intermediates_only=True, output_fmt=form)
    assert len(maps) == 3
    for found, own in zip(maps, expected, strict=True):
        assert torch.equal(found, own)


def test_it_can_be_fine_tuned_with_a_new_head_and_at_another_size(exported):
    encoder, folder, _, _ = exported
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert model(torch.zeros(1, encoder.channels, 48, 64)).shape == (1, 7)
    name = next(name for name in encoder.model.state_dict() if name.endswith("attn.qkv.weight"))
    assert torch.equal(model.state_dict()[name], encoder.model.state_dict()[name])


def test_the_card_says_what_it_is(exported):
    encoder, folder, _, _ = exported
    card = (folder / "README.md").read_text()
    num_tensors = len(encoder.model.state_dict())
    said = f"{num_tensors} of {num_tensors} tensors"
    for words in ("my-run", said, "| knn | 0.625 |", "| optim.warmup_epochs | 0 |"):
        assert words in card
    assert "repeated" not in card
    assert ("import ssl_global" in card) == encoder.architecture.startswith("global_")


def test_nothing_but_the_export_is_left(exported):
    _, folder, _, _ = exported
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [entry.name for entry in folder.parent.iterdir()] == ["export"]


def test_the_encoder_stays_as_it_is(tmp_path):
    encoder = Vit(VitConfig(**TINY), pixels=32, channels=3).train()
    export(encoder, tmp_path / "export", recipe=recipe(VitConfig(**TINY)), summary={}, what="student")
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_an_old_export_is_replaced_only_by_a_proven_one(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    setting = {"recipe": recipe(VitConfig(**TINY)), "summary": {}, "what": "encoder"}
    first, second = (trained_a_little(VitConfig(patch=patch, **TINY)) for patch in (8, 16))
    export(first, folder, **setting)

    second.model_args = second.model_args | {"depth": 2}
    with pytest.raises(RuntimeError, match=r"blocks\.2\."):
        export(second, folder, **setting)
    assert json.loads((folder / "config.json").read_text())["model_args"]["patch_size"] == 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]

    second.model_args = second.model_args | {"depth": 3}
    export(second, folder, **setting)
    assert json.loads((folder / "config.json").read_text())["model_args"]["patch_size"] == 16
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]


def test_a_model_that_computes_something_else_is_no_export(tmp_path):
    encoder = trained_a_little(VitConfig(pool="avg", **TINY))
    encoder.model_args = encoder.model_args | {"global_pool": "max"}
    with pytest.raises(RuntimeError, match="says something else"):
        export(encoder, tmp_path / "export", recipe=recipe(VitConfig(**TINY)), summary={}, what="encoder")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_not_touched(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="no export"):
        export(
            trained_a_little(VitConfig(**TINY)), tmp_path, recipe=recipe(VitConfig(**TINY)), summary={}, what="encoder"
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["diary.txt"]


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ({"a": torch.zeros(2)}, "lacks b"),
        ({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}, "has besides c"),
        ({"a": torch.zeros(1), "b": torch.zeros(3)}, "has another shape of a"),
        ({"a": torch.zeros(2), "b": torch.ones(3)}, "has other values in b"),
    ],
)
def test_each_difference_is_named(found, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        compare({"a": torch.zeros(2), "b": torch.zeros(3)}, found, where="it")
