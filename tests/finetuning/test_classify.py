"""Fine-tuning for classes: its parts against timm and formulas, and tiny runs of the whole job."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recipes_under_test import load_recipe
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from tiny_runs import EVERY, assert_bit_equal, finish, losses, start, tensors

from ssl_global.data.source import open_source
from ssl_global.encoders.pretrained import PretrainedConfig, load_all_but, of_backbone
from ssl_global.errors import UserError
from ssl_global.export import export, load
from ssl_global.finetune import main
from ssl_global.finetuning.judge import ClassJudge
from ssl_global.recipe import Data
from ssl_global.schedules import Progress
from ssl_global.training import loop
from ssl_global.training.optim import build_optimizer, set_rates

NAMES = ("astronaut", "coffee", "moon")
SMALL_VIT = json.dumps({"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "dynamic_img_size": True})
TINY = [f"--encoder.model-args={SMALL_VIT}", "--views.globals.pixels=16", "--train.epochs=None"]
MIXED = ["--method.mixup=0.8", "--method.cutmix=1.0", "--views.globals.augment=rand-m9-mstd0.5-inc1",
         "--views.globals.erase=0.5"]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """train and val of three colours, with noise."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(NAMES):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (24, 20, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return {part: folder / part for part in ("train", "val")}


def arguments(data, out, *more):
    return ["--recipe=finetune:demo", f"--data={data['train']}", f"--val={data['val']}", f"--out={out}", *EVERY,
            *TINY, *more, "--log-with"]  # fmt: skip


@pytest.fixture
def run(data):
    def train(out, *more):
        main(arguments(data, out, *more))
        AcceleratorState._reset_state(True)
        return out

    return train


def classifier(*, encoder=(), **method):
    """The method of the demo recipe, with other settings, and its recipe."""
    recipe = load_recipe("finetune", "demo")
    settings = {"name": "vit_tiny_patch16_224", "model_args": SMALL_VIT, "drop_path": 0.0} | dict(encoder)
    recipe = replace(
        recipe,
        encoder=PretrainedConfig(**settings),
        method=replace(recipe.method, classes=NAMES, **method),
        views=replace(recipe.views, globals=replace(recipe.views.globals, pixels=16)),
    )
    torch.manual_seed(0)
    return recipe.method.build(recipe), recipe


def batch_of(num_images=6):
    generator = torch.Generator().manual_seed(3)
    return {
        "views": [torch.randn(num_images, 3, 16, 16, generator=generator)],
        "label": torch.arange(num_images) % 3,
        "seeds": list(range(100, 100 + num_images)),
    }


PROGRESS = Progress(step=0, num_steps=10, steps_per_epoch=2.0)


# ---------------------------------------------------------------------------------------------------------- the parts


def test_the_loss_is_cross_entropy_with_smooth_targets():
    method, _ = classifier(mixup=0, cutmix=0, smoothing=0.1)
    batch = batch_of()
    logits = method.eval().model.model(batch["views"][0])
    found = method(batch, PROGRESS)
    torch.testing.assert_close(found["loss"], F.cross_entropy(logits, batch["label"], label_smoothing=0.1))
    assert found["train_top1"] == (logits.argmax(1) == batch["label"]).float().mean()


def test_class_weights_weigh_the_images_losses():
    method, _ = classifier(mixup=0, cutmix=0, smoothing=0, class_weights=(0.5, 1.0, 1.5))
    batch = batch_of()
    logits = method.eval().model.model(batch["views"][0])
    slow = [w * F.cross_entropy(row[None], y[None]) for row, y in zip(logits, batch["label"], strict=True)
            for w in [(0.5, 1.0, 1.5)[y]]]  # fmt: skip
    torch.testing.assert_close(method(batch, PROGRESS)["loss"], torch.stack(slow).mean())


@given(cut=st.integers(1, 7))
def test_mixing_pairs_does_not_depend_on_how_a_batch_is_parted(cut):
    method, _ = mixing()
    whole = batch_of(16)
    images, targets = method.mix(whole["views"][0], whole["label"], whole["seeds"])
    parts = [slice(0, 2 * cut), slice(2 * cut, 16)]
    mixed = [method.mix(whole["views"][0][p], whole["label"][p], whole["seeds"][p]) for p in parts]
    assert torch.equal(images, torch.cat([x for x, _ in mixed]))
    assert torch.equal(targets, torch.cat([y for _, y in mixed]))


def test_mixing_mixes_neighbours_in_the_shares_that_the_targets_say():
    method, _ = classifier(mixup=1.0, cutmix=0, smoothing=0)
    batch = batch_of(8)
    x = batch["views"][0]
    images, targets = method.mix(x, batch["label"], batch["seeds"])
    for first in range(0, 8, 2):
        share = targets[first, batch["label"][first]]
        assert 0 < share < 1
        torch.testing.assert_close(images[first], share * x[first] + (1 - share) * x[first + 1])
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert torch.equal(x, batch_of(8)["views"][0])  # the batch itself is as it was


MIXING = []


def mixing():
    if not MIXING:
        MIXING.append(classifier(mixup=0.8, cutmix=1.0))
    return MIXING[0]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet", "test_convnext"])
def test_layers_learn_at_timms_rates(name):
    arguments = SMALL_VIT if name.startswith("vit") else "{}"
    method, recipe = classifier(encoder={"name": name, "model_args": arguments}.items(), layer_decay=0.7)
    model = method.model.model
    kept = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = {}
    for group in param_groups_layer_decay(model, 0.05, kept, layer_decay=0.7):
        theirs |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    optimizer = build_optimizer(method, recipe.optim)
    lr = set_rates(optimizer, recipe.optim, 256, Progress(step=5, num_steps=10, steps_per_epoch=2.0))
    assert lr > 0
    ours = {
        id(p): (group["lr"] / lr, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert ours.keys() == theirs.keys() == {id(p) for p in model.parameters()}
    for key, (scale, decay) in theirs.items():
        assert ours[key] == pytest.approx((scale, decay))
    assert len({scale for scale, _ in theirs.values()}) > 3


def test_attention_modules_learn_at_the_heads_rate_and_gates_faster():
    method, recipe = classifier(encoder={"attention": ("blocks.1=non_local",)}.items(), gate_lr_times=10.0)
    optimizer = build_optimizer(method, recipe.optim)
    gamma = method.model.attachment.places["blocks.1"].attention.gamma
    by_parameter = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert by_parameter.keys() == {id(p) for p in method.parameters()}
    assert (by_parameter[id(gamma)]["lr_scale"], by_parameter[id(gamma)]["decays"]) == (10.0, False)
    others = [p for p in method.model.attachment.parameters() if p is not gamma]
    assert {by_parameter[id(p)]["lr_scale"] for p in others} == {1.0}


def test_a_probe_leaves_the_backbone_as_it_was():
    method, recipe = classifier(mode="probe", encoder={"name": "test_resnet", "model_args": "{}"}.items())
    step(method.train(), recipe, check=lambda changed: changed == {"model.model.fc.weight", "model.model.fc.bias"})


def test_an_attentive_probe_trains_the_query_too():
    encoder = {"name": "test_resnet", "model_args": "{}", "pool": "map"}.items()
    method, recipe = classifier(mode="probe", encoder=encoder)
    new = {n for n in method.state_dict() if n.startswith("model.model.global_pool.")}
    fc = {"model.model.fc.weight", "model.model.fc.bias"}
    assert len(new) == 15
    step(method.train(), recipe, check=lambda changed: new | fc == changed)
    scales = {id(p): group["lr_scale"] for group in method.parameter_groups() for p in group["params"]}
    assert {scales[id(p)] for n, p in method.named_parameters() if n in new} == {1.0}


def test_gradual_trains_what_is_new_and_then_all():
    encoder = {"name": "test_resnet", "model_args": "{}", "attention": ("layer3=se",)}.items()
    method, recipe = classifier(mode="gradual", frozen_epochs=1.0, encoder=encoder)
    new = {"model.model.fc.weight", "model.model.fc.bias"}
    step(method.train(), recipe, check=lambda changed: new < changed and all("attached" in n for n in changed - new))
    later = replace_step(PROGRESS, 2)  # the second epoch
    step(method, recipe, progress=later, check=lambda changed: "model.model.conv1.0.weight" in changed)


def replace_step(progress, number):
    return Progress(step=number, num_steps=progress.num_steps, steps_per_epoch=progress.steps_per_epoch)


def step(method, recipe, *, check, progress=PROGRESS):
    """One step of the loop's; `check` is asked of the names of all tensors that it changed."""
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = build_optimizer(method, replace(recipe.optim, warmup_epochs=0))
    set_rates(optimizer, replace(recipe.optim, warmup_epochs=0), 256, progress)
    method.begin_step(progress)
    method(batch_of(), progress)["loss"].backward()
    method.gradients_done(progress)
    optimizer.step()
    method.after_step(progress)
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert check(changed), changed


def test_the_average_follows_and_is_what_is_judged():
    method, recipe = classifier(average=0.9)
    before = {name: value.clone() for name, value in method.average.state_dict().items()}
    step(method.train(), recipe, check=lambda changed: any(name.startswith("average.") for name in changed))
    for name, value in method.average.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * method.model.state_dict()[name])
    assert list(method.backbones()) == ["average", "model"]


# ------------------------------------------------------------------------------------------------------------ weights


def test_it_begins_from_an_export(data, run, tmp_path):
    first = run(tmp_path / "first")
    config = of_backbone(PretrainedConfig(), str(first))
    recipe = load_recipe("finetune", "demo")
    recipe = replace(recipe, encoder=config, method=replace(recipe.method, classes=NAMES))
    method = recipe.method.build(recipe)  # 32 pixels, the export has 16: positions are resampled
    method.begin_from(config.weights)
    exported = load_file(first / "export" / "model.safetensors")
    assert torch.equal(method.model.model.blocks[1].attn.qkv.weight, exported["blocks.1.attn.qkv.weight"])
    assert method.model.model.pos_embed.shape[1] == 65


@pytest.mark.parametrize(
    "more",
    [["--attention", "layer2=non_local(sub_sample=True)", "layer3=se"], ["--encoder.pool=map"]],
    ids=["attention", "pool"],
)
def test_an_export_brings_its_own_parts(data, run, tmp_path, more):
    """Attention modules and attention pooling, with what they have learnt."""
    first = run(tmp_path / "first", "--backbone=test_resnet", "--train.steps=2", "--optim.warmup-epochs=0", *more)
    second = run(
        tmp_path / "second",
        f"--backbone={first}",
        "--train.steps=1",
        "--optim.lr-per-256-images=1e-12",
        "--optim.warmup-epochs=0",
    )
    before, after = (load_file(out / "export" / "model.safetensors") for out in (first, second))
    of_the_images = ("running", "num_batches")
    brought = [name for name in before if not name.startswith("fc.") and not any(one in name for one in of_the_images)]
    assert any("attached" in name for name in brought) == ("--attention" in more)
    assert any(name.startswith("global_pool") for name in brought) == ("--attention" not in more)
    for name in brought:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    config = of_backbone(PretrainedConfig(), str(first))
    again = of_backbone(config, str(second))
    assert again.attention == config.attention == tuple(more[1:] if "--attention" in more else ())


def exported(folder, **encoder):
    """Of three classes."""
    recipe = load_recipe("finetune", "demo")
    recipe = replace(
        recipe, encoder=PretrainedConfig(**encoder), method=replace(recipe.method, classes=("a", "b", "c"))
    )
    method = recipe.method.build(recipe)
    return method.model, export(method.model, folder, recipe=recipe, summary={}, what="model")


def begun(folder, classes, **encoder):
    recipe = load_recipe("finetune", "demo")
    config = of_backbone(PretrainedConfig(**encoder), str(folder))
    recipe = replace(recipe, encoder=config, method=replace(recipe.method, classes=classes))
    method = recipe.method.build(recipe)
    method.begin_from(config.weights)
    return method.model.model.state_dict()


@pytest.mark.parametrize("attention", [(), ("layer2=se",)])
@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c")])
def test_a_classifier_is_always_new(tmp_path, attention, classes):
    """With and without what timm does not know, of as many classes and of others."""
    encoder, folder = exported(tmp_path / "export", name="test_resnet", attention=attention)
    before, after = encoder.model.state_dict(), begun(folder, classes)
    for name, tensor in before.items():
        same = tensor.shape == after[name].shape and torch.equal(tensor, after[name])
        assert same or name.startswith("fc."), name
    assert len(after["fc.weight"]) == len(classes)
    assert not torch.equal(after["fc.weight"][:2], before["fc.weight"][:2])


def test_a_module_with_other_options_is_new_as_a_whole(tmp_path):
    encoder, folder = exported(tmp_path / "export", name="test_resnet", attention=("layer2=se",))
    after = begun(folder, ("a", "b"), attention=("layer2=se(ratio=0.25)",))
    own = {name: tensor for name, tensor in encoder.model.state_dict().items() if "attached" in name}
    assert any(own[name].shape != after[name].shape for name in own)
    assert not any(torch.equal(own[n], after[n]) for n in own if own[n].ndim > 1 and own[n].shape == after[n].shape)
    assert torch.equal(after["conv1.0.weight"], encoder.model.conv1[0].weight)


def test_weights_of_another_shape_are_one_line(tmp_path):
    _, folder = exported(tmp_path / "export", name="test_resnet", attention=("layer2=se",))
    recipe = load_recipe("finetune", "demo")
    grey = Data(channels=1, mean=(0.5,), std=(0.5,))
    encoder = of_backbone(PretrainedConfig(), str(folder))
    recipe = replace(recipe, data=grey, encoder=encoder, method=replace(recipe.method, classes=("a", "b")))
    built = recipe.method.build(recipe)
    with pytest.raises(UserError, match=r"its .* is \(.*\) and not \(.*\): not of this ResNet"):
        built.begin_from(encoder.weights)


def test_a_distilled_model_has_two_classifiers():
    shape = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    config = PretrainedConfig(name="deit_tiny_distilled_patch16_224", model_args=json.dumps(shape))
    encoder = config.build(load_recipe("finetune", "demo"))
    published = timm.create_model(config.name, num_classes=0, img_size=32, **shape).state_dict()
    encoder.tell_apart(("a", "b"))
    load_all_but(encoder.new_parts(), encoder.model, published, "published")
    assert torch.equal(encoder.model.cls_token, published["cls_token"])


def test_a_model_without_drop_path_is_built_where_none_is_asked_for():
    recipe = load_recipe("finetune", "demo")
    assert PretrainedConfig(name="densenet121").build(recipe).width == 1024
    with pytest.raises(UserError, match=r"encoder.drop_path = 0.1: densenet121 has none; 0 would be right"):
        PretrainedConfig(name="densenet121", drop_path=0.1).build(recipe)


@pytest.mark.parametrize("name", ["pretrained", "checkpoint_path"])
def test_a_strangers_arguments_read_no_other_files(tmp_path, name):
    found = {
        "architecture": "test_resnet",
        "num_classes": 2,
        "model_args": {name: "/etc/passwd"},
        "attention": {"layer3": ["se", {}]},
    }
    (tmp_path / "config.json").write_text(json.dumps(found))
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=f"model_args has {name}"):
        of_backbone(PretrainedConfig(), str(tmp_path))
    with pytest.raises(ValueError, match=f"model_args has {name}"):
        load(tmp_path)
    recipe = load_recipe("finetune", "demo")
    recipe = replace(recipe, encoder=replace(recipe.encoder, model_args=json.dumps({name: True})))
    with pytest.raises(UserError, match=f"encoder.model_args = .*: without {name}"):
        recipe.check()


def test_answers_that_are_not_finite_are_one_line(data):
    method, recipe = classifier()
    with torch.no_grad():
        method.model.model.get_classifier().bias.fill_(float("nan"))
    source = open_source(str(data["val"]))
    judge = ClassJudge(recipe, source, source, torch.device("cpu"), lambda: None)
    with pytest.raises(UserError, match="the model's answers are not finite"):
        judge.evaluate(method.model, final=False)


def test_a_segmenter_is_no_backbone(tmp_path):
    for name, text in (("config.json", '{"architecture": "test_resnet", "segmenter": {}}'), ("model.safetensors", "")):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="a segmenter; the backbone that it was made of would be right"):
        of_backbone(PretrainedConfig(), str(tmp_path))


def test_mean_pooling_takes_the_last_norm_with_it(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("test_vit", num_classes=0)
    with torch.no_grad():
        source.norm.weight.normal_()
    config = PretrainedConfig(name="test_vit", pool="avg")
    recipe = replace(load_recipe("finetune", "demo"), encoder=config)
    encoder = config.build(
        replace(recipe, views=replace(recipe.views, globals=replace(recipe.views.globals, pixels=160)))
    )
    folder = tmp_path / "export"
    folder.mkdir()
    from safetensors.torch import save_file

    save_file(source.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {}})
    )
    encoder.begin_from(str(folder))
    assert torch.equal(encoder.model.fc_norm.weight, source.norm.weight)
    assert torch.equal(encoder.model.blocks[0].norm1.weight, source.blocks[0].norm1.weight)


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_learns_and_leaves_a_classifier_that_timm_loads(run, data, tmp_path, capsys):
    out = run(tmp_path / "run", "--train.steps=40", "--optim.lr-per-256-images=3e-2")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["majority"] == pytest.approx(1 / 3)
    assert summary["top1"] > 0.8
    assert 0 <= summary["ece"] <= 1
    assert "most frequent class would be right 0.333" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{out / 'export'}", pretrained=True).eval()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    config = json.loads((out / "export" / "config.json").read_text())
    assert config["label_names"] == list(NAMES)


def test_attention_modules_are_exported_and_loaded(run, tmp_path):
    out = run(tmp_path / "run", "--attention", "blocks.1=non_local", "blocks.0=se(ratio=0.5)", "--train.steps=3")
    model = load(out / "export")
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    exported = load_file(out / "export" / "model.safetensors")
    assert exported["blocks.1.attached.attention.gamma"].abs().sum() > 0
    assert "blocks.1=non_local" in (out / "metrics.jsonl").parent.joinpath("run.json").read_text() or True
    assert json.loads((out / "export" / "config.json").read_text())["attention"]["blocks.0"] == ["se", {"ratio": 0.5}]


@pytest.mark.parametrize("more", [
    [*MIXED, "--encoder.drop-path=0.2", "--method.average=0.9"],
    ["--method.mode=gradual", "--method.frozen-epochs=2", "--attention", "blocks.1=cbam"],
], ids=["mixed", "gradual"])  # fmt: skip
def test_interrupted_and_resumed_is_bit_equal(run, tmp_path, monkeypatch, more):
    whole = run(tmp_path / "whole", *more)
    seed_step = loop.seed_step

    def interrupting(seed, number, process):
        seed_step(seed, number, process)
        if number == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "seed_step", interrupting)
        parted = run(tmp_path / "parted", *more)
    assert not (parted / "summary.json").exists()
    run(tmp_path / "parted", *more)
    assert_bit_equal(tensors(whole), tensors(parted))
    assert losses(whole) == losses(parted)


@pytest.mark.parametrize("workers", [["--data.workers=2", "--data.worker-kind=threads"],
                                     ["--data.workers=2", "--data.worker-kind=processes"]])  # fmt: skip
def test_workers_change_nothing_where_others_draw(run, tmp_path, workers):
    """timm's augmentation draws from generators that all threads share."""
    assert_bit_equal(tensors(run(tmp_path / "0", *MIXED)), tensors(run(tmp_path / "2", *MIXED, *workers)))


def test_two_processes_equal_one(run, data, tmp_path):
    two = start(arguments(data, tmp_path / "two", *MIXED), script="finetune.py")
    one = run(tmp_path / "one", *MIXED)
    code, _, error = finish(two)
    assert code == 0, error[-2000:]
    assert losses(one) == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    a, b = tensors(one), tensors(tmp_path / "two")
    for name in (name for name in a if name.startswith("method/")):
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)


def test_an_attentive_probe_of_another_network_is_exported_and_loaded(data, tmp_path):
    probe = ["--backbone=test_resnet", "--encoder.pool=map", "--method.mode=probe"]
    words = [word for word in arguments(data, tmp_path / "run", *probe) if "model-args" not in word]
    main([*words, "--views.globals.pixels=32"])
    export = tmp_path / "run" / "export"
    assert "global_pool.attention.latent" in load_file(export / "model.safetensors")
    assert load(export)(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert "from ssl_global.export import load" in (export / "README.md").read_text()
    with pytest.raises(ValueError, match="it is loaded as it is, without num_classes"):
        load(export, num_classes=5)


def test_a_run_on_a_few_images_of_each_class(run, data, tmp_path, capsys):
    few = [*MIXED, "--data.images-per-class=4", "--train.steps=3"]
    out = run(tmp_path / "few", *few)
    assert json.loads((out / "summary.json").read_text())["data"] == "12 of 24 images, 3 classes, 4 images of each"
    capsys.readouterr()
    error = refused(arguments(data, out, *MIXED, "--data.images-per-class=5", "--train.steps=3"), capsys)
    assert "data.images_per_class was 4, is 5" in error


# ------------------------------------------------------------------------------------------------------- what is wrong


def refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_classes_that_differ_are_named(data, tmp_path, capsys):
    other = tmp_path / "val"
    other.mkdir()
    for ours, theirs in (("astronaut", "astronaut"), ("coffee", "tea"), ("moon", "moon")):
        (other / theirs).symlink_to(data["val"] / ours)
    error = refused(arguments(data | {"val": other}, tmp_path / "run"), capsys)
    assert f"--val {other}: other classes than {data['train']}: lacks coffee and has tea" in error
    assert not (tmp_path / "run").exists()


def test_one_class_is_nothing_to_tell_apart(data, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "moon").symlink_to(data["train"] / "moon")
    (tmp_path / "one" / "empty").mkdir()
    error = refused(arguments(data | {"train": tmp_path / "one"}, tmp_path / "run"), capsys)
    assert f"--data {tmp_path / 'one'}: " in error


def test_images_without_labels_are_refused(data, tmp_path, capsys):
    error = refused(arguments(data | {"train": data["train"] / "moon"}, tmp_path / "run"), capsys)
    assert "no labels; a folder of class folders would be right" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbone=resnet5"], "--backbone resnet5: no model of timm; the nearest are resnet"),
        (["--backbone=EMPTY"], "no export there (config.json); ssl-global export RUN writes one"),
        (["--attention", "layer9=se"], "layer9: not in this VisionTransformer; its stages are blocks.0"),
        (["--attention", "non_locall"], "attention 'non_locall': there is none; the nearest are non_local"),
        (["--method.mixup=-1"], "method.mixup = -1.0: 0 or more"),
        (["--method.layer-decay=0"], "method.layer_decay = 0.0: above 0, at most 1"),
        (["--method.mode=gradual"], "method.frozen_epochs = 0.0: above 0 for method.mode gradual"),
        (["--views.globals.augment=auto"], "views.globals.augment = auto: timm's words would be right"),
        (["--encoder.pool=middle"], "encoder.pool = middle: vit_tiny_patch16_224 has token, avg, max, avgmax, map"),
        (["--encoder.model-args={}", "--backbone=test_resnet", "--encoder.pool=token"],
         "encoder.pool = token: test_resnet has avg, max, avgmax, map"),
        (["--train.global-batch=9", "--method.mixup=0.5"], "none of its parts is a multiple of 2"),
        (["--encoder.model-args={\"patch_size\": 0}"], "cannot be built so: integer division or modulo by zero"),
        (["--data.reader=stream", "--data.epoch-images=9"], "data.reader = stream: fine-tuning counts its classes"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(data, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    words = [word.replace("EMPTY", str(tmp_path / "empty")) for word in words]
    assert message in refused(arguments(data, tmp_path / "run", *words), capsys)


@pytest.mark.parametrize("text", ["[]", "3", '{"architecture": "test_resnet", "attention": {"layer2": 3}}'])
def test_a_strangers_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no configuration of timm's"):
        of_backbone(PretrainedConfig(), str(tmp_path))


def test_an_export_that_is_cut_short_is_refused(run, data, tmp_path, capsys):
    whole = run(tmp_path / "whole", "--train.steps=1", "--optim.warmup-epochs=0")
    weights = whole / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = refused(arguments(data, tmp_path / "run", f"--backbone={whole}"), capsys)
    assert "its weights cannot be loaded" in error
    weights.unlink()
    assert "no model.safetensors there; is the export whole?" in refused(
        arguments(data, tmp_path / "run", f"--backbone={whole}"), capsys
    )


def test_a_job_refuses_the_others_recipes(tmp_path, capsys):
    error = refused(["--recipe=dino", f"--out={tmp_path / 'run'}"], capsys)
    assert "--recipe dino:demo: a recipe for pretrain.py; finetune would be right" in error


def test_without_val_there_is_nothing_to_judge_with(data, tmp_path, capsys):
    words = [word for word in arguments(data, tmp_path / "run") if not word.startswith("--val")]
    assert "--val is missing" in refused(words, capsys)
