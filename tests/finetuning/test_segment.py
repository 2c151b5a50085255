"""Fine-tuning for pixels: masks beside images, and tiny runs of the whole job."""

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
from PIL import Image
from recipes_under_test import load_recipe
from tiny_runs import EVERY, assert_bit_equal, finish, losses, start, tensors

from ssl_global.data.masks import Masks, cut_mask, decode_mask, name_of
from ssl_global.data.sample import built_in_shapes
from ssl_global.data.source import open_source
from ssl_global.data.views import Drawn
from ssl_global.encoders.pretrained import PretrainedConfig, of_backbone
from ssl_global.encoders.vit import Vit, VitConfig
from ssl_global.export import export, load
from ssl_global.finetune import main
from ssl_global.finetuning import heads
from ssl_global.finetuning.pictures import Shown, confusion_picture, overlay, palette, predictions_picture
from ssl_global.finetuning.segment import SegmentConfig, spec_of
from ssl_global.finetuning.segmenter import Segmenter
from ssl_global.recipe import Data
from ssl_global.training import loop

SMALL_VIT = json.dumps({"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "dynamic_img_size": True})
TINY = [f"--encoder.model-args={SMALL_VIT}", "--views.globals.pixels=32", "--train.epochs=None", "--method.width=8"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Bright squares on dark noise, of several sizes of image, and their masks; a corner does not count."""
    folder = tmp_path_factory.mktemp("squares")
    random = np.random.default_rng(0)
    for part, count in (("data", 24), ("val", 6)):
        masks = "masks" if part == "data" else "val_masks"
        for name in (part, masks):
            (folder / name / "some").mkdir(parents=True)
        for number in range(count):
            h, w = 40 + number % 5, 50 + number % 3
            pixels, mask = random.integers(0, 100, (h, w, 3), dtype=np.uint8), np.zeros((h, w), np.uint8)
            top, left = random.integers(0, 20, 2)
            pixels[top : top + 18, left : left + 18] += 150
            mask[top : top + 18, left : left + 18] = 1
            mask[-3:, -3:] = 255
            Image.fromarray(pixels).save(folder / part / "some" / f"{number}.png")
            Image.fromarray(mask).save(folder / masks / "some" / f"{number}.png")
    return {name: folder / name for name in ("data", "masks", "val", "val_masks")}


def arguments(data, out, *more):
    paths = [f"--{name.replace('_', '-')}={path}" for name, path in data.items()]
    return ["--task=segment", "--recipe=finetune:segment_demo", *paths, f"--out={out}", *EVERY, *TINY, *more,
            "--log-with"]  # fmt: skip


@pytest.fixture
def run(data):
    def train(out, *more):
        main(arguments(data, out, *more))
        AcceleratorState._reset_state(True)
        return out

    return train


# -------------------------------------------------------------------------------------------------------------- masks


def test_a_masks_crop_is_that_of_its_image(data):
    """Each pixel's class is that of the image's pixel there: an image made of its own mask stays it."""
    mask = np.repeat(np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4), 8, 0), 8, 1)  # (24, 32)
    out = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    drawn = Drawn(boxes=[(0, 0, 16, 16), (8, 16, 16, 16)], flips=[False, True], colours=np.zeros((2, 8), np.float32))
    cut_mask(mask, drawn, out)
    assert np.array_equal(out[0, 0].numpy(), mask[:16, :16])
    assert np.array_equal(out[1, 0].numpy(), mask[8:24, 16:32][:, ::-1])


def test_masks_are_found_by_name_and_looked_at(data):
    masks = Masks(str(data["masks"]), open_source(str(data["data"])))
    assert masks.check(Data(), num_classes=None, visible=False) == 2
    assert [masks.place(index) for index in range(3)] == ["some/0.png", "some/1.png", "some/10.png"]
    assert masks.read(2).shape == (40, 51)
    assert set(np.unique(masks.read(0))) == {0, 1, 255}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a/IMG.2024.1.jpg", "a/IMG.2024.1"),  # a folder's names may have dots
        ("7.png", "7"),
        ("train-000.tar/0007.seg.png", "0007"),  # webdataset's end at the first
        ("b.tar/x/0007", "x/0007"),
        ("a.b/7", "a.b/7"),
    ],
)
def test_names_of_samples(key, name):
    assert name_of(key) == name


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_palettes_are_numbers(tmp_path, mode):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putpalette([200, 10, 10, 3, 4, 5])
        image.putdata([0, 1, 1, 0])
    image.convert(mode).save(tmp_path / "m.png") if mode != "P" else image.save(tmp_path / "m.png")
    found = decode_mask((tmp_path / "m.png").read_bytes())
    assert found.tolist() == ([[0, 1], [1, 0]] if mode != "1" else found.tolist())
    assert found.dtype == np.uint8


def test_the_built_in_shapes_are_the_same_everywhere(tmp_path):
    folders = built_in_shapes()
    assert {name: len(list(Path(folder).iterdir())) for name, folder in folders.items()} == {
        "data": 600, "masks": 600, "val": 120, "val_masks": 120,
    }  # fmt: skip
    masks = Masks(folders["val_masks"], open_source(folders["val"]))
    assert masks.check(Data(), num_classes=4, visible=False) == 4
    again = built_in_shapes(tmp_path / "again")
    for name in ("data", "masks"):
        assert Path(folders[name], sorted(Path(folders[name]).iterdir())[7].name).read_bytes() == (
            sorted(Path(again[name]).iterdir())[7].read_bytes()
        )


# ---------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("function", ["segment", "segment_demo"])
def test_the_recipes_hold_together(function):
    load_recipe("finetune", function).check()


@pytest.mark.parametrize("head", heads.names())
@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("vit_tiny_patch16_224", SMALL_VIT),
        ("test_resnet", "{}"),
        ("swin_tiny_patch4_window7_224", '{"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 6]}'),
    ],
)
def test_all_heads_on_all_kinds_of_backbones(head, name, model_args):
    """Any size of image, a gradient for every parameter that learns, one class for each pixel."""
    config = SegmentConfig(head=head, classes=("a", "b", "c"), width=8)
    torch.manual_seed(0)
    segmenter = Segmenter(spec_of(config, PretrainedConfig(name=name, model_args=model_args), 64, 3))
    main_logits, beside, auxiliary = segmenter.model.all_logits(torch.randn(2, 3, 64, 64))
    assert main_logits.shape == (2, 3, 64, 64)
    sum(x.square().mean() for x in (main_logits, *beside, *auxiliary)).backward()
    assert [n for n, p in segmenter.named_parameters() if p.grad is None] == []
    assert segmenter.eval().model(torch.randn(1, 3, 70, 50)).shape == (1, 3, 70, 50)


@pytest.mark.parametrize(("head", "stride"), [("ppm", 8), ("upernet", 32)])
def test_a_head_of_one_map_gets_a_fine_one(head, stride):
    """As PSPNet, DANet and their kin have it; a ResNet's own has a stride of 32. The tensors are the same."""
    config = SegmentConfig(head=head, classes=("a", "b"), width=8, auxiliary=False)
    segmenter = Segmenter(spec_of(config, PretrainedConfig(name="test_resnet"), 64, 3))
    assert segmenter.model.features.strides[-1] == stride
    plain = timm.create_model("test_resnet", features_only=True).state_dict()
    assert {name: t.shape for name, t in segmenter.backbone.state_dict().items()} == {
        n: t.shape for n, t in plain.items()
    }


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_learns_and_leaves_a_segmenter(run, data, tmp_path):
    more = ["--train.steps=40", "--optim.lr-per-256-images=1e-1", "--attention", "blocks.1=non_local"]
    out = run(tmp_path / "run", *more)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["miou"] > 0.75 > summary["miou_untrained"]
    assert [row["class"] for row in json.loads((out / "classes.json").read_text())] == ["0", "1"]
    with Image.open(out / "predictions.png") as picture:
        assert picture.height > 6 * 160
    with Image.open(out / "confusion.png") as picture:
        assert picture.size > (36, 36)
    model = load(out / "export")
    image = np.array(Image.open(data["val"] / "some" / "0.png"))
    mask = np.array(Image.open(data["val_masks"] / "some" / "0.png"))
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    answers = model(x)[0].argmax(0).numpy()
    assert answers.shape == mask.shape
    assert (answers == mask)[mask != 255].mean() > 0.8


def test_interrupted_and_resumed_is_bit_equal(run, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", "--method.head=ppm")
    seed_step = loop.seed_step

    def interrupting(seed, number, process):
        seed_step(seed, number, process)
        if number == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "seed_step", interrupting)
        parted = run(tmp_path / "parted", "--method.head=ppm")
    assert not (parted / "summary.json").exists()
    run(tmp_path / "parted", "--method.head=ppm", "--data.workers=2")
    assert_bit_equal(tensors(whole), tensors(parted))
    assert losses(whole) == losses(parted)


def test_two_processes_sharded_or_not_equal_one(run, data, tmp_path):
    """The head's batch norm is taken over the images of both."""
    more = ["--method.head=linear", "--method.no-auxiliary", "--attention", "blocks.1=se", "--eval.every=3"]
    one = run(tmp_path / "one", *more)
    for name, first, script in (("ddp", [], "finetune.py"), ("fsdp", ["--finetune"], "tests/fsdp_on_cpu.py")):
        words = [*first, *arguments(data, tmp_path / name, *more)]
        code, said, error = finish(start(words, script=script))
        assert code == 0, error[-3000:]
        assert ("FSDP2" in said) == (name == "fsdp")
        assert losses(tmp_path / name) == pytest.approx(losses(one), rel=1e-6)
        found, expected = (json.loads((out / "summary.json").read_text()) for out in (tmp_path / name, one))
        assert found["miou"] == pytest.approx(expected["miou"], abs=1e-6)
        assert found["pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"], abs=1e-6)


def test_it_begins_from_an_export_of_a_classifier_and_of_pretraining(run, tmp_path):
    """Its backbone's tensors, by the names that a model of maps has."""
    first = run(tmp_path / "first", "--train.steps=1", "--optim.warmup-epochs=0")
    assert (first / "export" / "config.json").exists()
    torch.manual_seed(1)
    recipe = load_recipe("dino", "demo")
    encoder = Vit(VitConfig(name="vit_tiny_patch16_224", patch=8, width=32, depth=3, heads=2), pixels=32, channels=3)
    folder = export(encoder, tmp_path / "export", recipe=recipe, summary={}, what="teacher")
    recipe = load_recipe("finetune", "segment_demo")
    method = replace(recipe.method, classes=("a", "b"), width=8)
    recipe = replace(recipe, encoder=of_backbone(recipe.encoder, str(folder)), method=method)
    built = recipe.method.build(recipe)
    built.begin_from(recipe.encoder.weights)
    assert torch.equal(built.model.backbone.model.blocks[1].attn.qkv.weight, encoder.model.blocks[1].attn.qkv.weight)
    scales = {group["lr_scale"] for group in built.parameter_groups()}
    assert len(scales) >= 4
    assert max(scales) == 1.0


def test_it_begins_from_an_export_with_attention(tmp_path):
    """Which has the names of the whole model: a ViT's maps have others."""
    recipe = load_recipe("finetune", "demo")
    encoder = PretrainedConfig(name="vit_tiny_patch16_224", model_args=SMALL_VIT, attention=("blocks.1=se",))
    recipe = replace(recipe, encoder=encoder, method=replace(recipe.method, classes=("a", "b", "c")))
    first = recipe.method.build(recipe).model
    with torch.no_grad():
        for parameter in first.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = export(first, tmp_path / "export", recipe=recipe, summary={}, what="model")
    recipe = load_recipe("finetune", "segment_demo")
    method = replace(recipe.method, classes=("a", "b"), width=8)
    recipe = replace(recipe, encoder=of_backbone(recipe.encoder, str(folder)), method=method)
    built = recipe.method.build(recipe)
    built.begin_from(recipe.encoder.weights)
    before, after = first.model.state_dict(), built.model.backbone.model.state_dict()
    assert any("attached" in name for name in after)
    for name in after:
        assert name == "pos_embed" or torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("name", ["vgg11", "dla34"])
def test_a_backbone_that_cannot_be_dilated_is_taken_as_it_is(name):
    spec = spec_of(SegmentConfig(head="fcn", classes=("a", "b"), width=8), PretrainedConfig(name=name), 64, 3)
    assert "output_stride" not in spec.model_args
    with torch.device("meta"):
        Segmenter(spec)


# ------------------------------------------------------------------------------------------------------- what is wrong


def refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def changed(data, tmp_path, change):
    """The same data with mask 5 changed."""
    import shutil

    shutil.copytree(data["masks"], tmp_path / "masks")
    change(tmp_path / "masks" / "some" / "5.png")
    return data | {"masks": tmp_path / "masks"}


def test_a_mask_of_another_size_is_named(data, tmp_path, capsys):
    wrong = changed(data, tmp_path, lambda file: Image.new("L", (50, 39)).save(file))
    error = refused(arguments(wrong, tmp_path / "run"), capsys)
    assert "error: some/5.png: 50 x 39 pixels, and its image some/5.png has 52 x 40" in error
    assert not (tmp_path / "run").exists()


def test_a_class_out_of_range_is_named(data, tmp_path, capsys):
    wrong = changed(data, tmp_path, lambda file: Image.new("L", (52, 40), 7).save(file))
    error = refused(arguments(wrong, tmp_path / "run", "--method.classes", "ground", "square"), capsys)
    assert "some/5.png: holds the class 7; there are 2, numbered from 0, and 255" in error


def test_a_run_does_not_go_on_with_other_masks(run, data, tmp_path, capsys):
    out = run(tmp_path / "run", "--train.steps=2", "--optim.warmup-epochs=0")
    (out / "summary.json").unlink()
    other = changed(data, tmp_path, lambda file: Image.fromarray(np.eye(40, 52, dtype=np.uint8)).save(file))
    error = refused(arguments(other, out, "--train.steps=2", "--optim.warmup-epochs=0"), capsys)
    assert "not the samples that the run in" in error
    assert "changed: masks some (" in error or "changed: masks ." in error


def test_a_mask_that_is_a_picture_is_named(data, tmp_path, capsys):
    wrong = changed(data, tmp_path, lambda file: Image.new("RGB", (52, 40)).save(file))
    assert "some/5.png: pixels of the kind RGB: class numbers in one channel" in refused(
        arguments(wrong, tmp_path / "run"), capsys
    )


def test_a_missing_mask_is_named(data, tmp_path, capsys):
    wrong = changed(data, tmp_path, Path.unlink)
    error = refused(arguments(wrong, tmp_path / "run"), capsys)
    assert f"--masks {tmp_path / 'masks'}: no mask some/5 for the image some/5.png" in error


def test_two_masks_of_one_name_are_named(data, tmp_path, capsys):
    wrong = changed(data, tmp_path, lambda file: Image.open(file).save(file.with_suffix(".bmp")))
    error = refused(arguments(wrong, tmp_path / "run"), capsys)
    assert "some/5.bmp and some/5.png: one name" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--head=upper"], "method.head: head 'upper': there is none; the nearest are upernet"),
        (["--views.globals.augment=rand-m9"], "views.globals.augment = rand-m9: none: masks would not follow"),
        (["--attention", "se(rato=1)"], "se: no option 'rato'; there are ratio, start"),
        (["--method.output-stride=4"], "method.output_stride = 4: 8 (PSPNet and its kin), 16, 32, or None"),
        (["--method.dice=-1"], "method.dice = -1.0: 0 or more"),
        (['--encoder.model-args={"nope": 1}'], "cannot be built so: VisionTransformer.__init__() got an unexpected"),
        (["--data.reader=stream", "--data.epoch-images=9"], "data.reader = stream: fine-tuning counts its classes"),
        (["--recipe=finetune:demo"], "--task segment: the recipe finetune:demo is for another task"),
    ],
)
def test_wrong_settings_are_one_line(data, tmp_path, capsys, words, message):
    words = [
        w for w in arguments(data, tmp_path / "run", *words) if not ("finetune:demo" in words[0] and "method" in w)
    ]
    assert message in refused(words, capsys)


def test_what_belongs_together(data, tmp_path, capsys):
    words = [word for word in arguments(data, tmp_path / "run") if not word.startswith("--val-masks")]
    assert "--task segment needs --data, --masks, --val and --val-masks" in refused(words, capsys)
    words = ["--task=segment", f"--val={data['val']}", f"--out={tmp_path / 'run'}"]  # would be passed over
    assert "--task segment needs --data, --masks, --val and --val-masks" in refused(words, capsys)
    words = ["--recipe=finetune:demo", f"--masks={data['masks']}", f"--out={tmp_path / 'run'}"]
    assert "--masks is of --task segment" in refused(words, capsys)


def test_predictions_are_shown_beside_the_truth():
    """An image, its mask over it, the prediction over it: half of the class's colour where it is, bare elsewhere."""
    image = torch.full((3, 160, 160), 100, dtype=torch.uint8)
    mask, said = np.zeros((160, 160), np.uint8), np.zeros((160, 160), np.uint8)
    mask[:80], mask[150:], said[80:] = 1, 255, 2
    shown = [Shown(image, mask, said)]
    sheet = np.array(predictions_picture(shown, ("ground", "a", "b"))).astype(int)
    colours = palette(3).astype(int)
    expected = np.full((160, 3 * 160 + 2 * 6, 3), 255)
    for column in range(3):
        expected[:, column * 166 : column * 166 + 160] = 100
    expected[:80, 166 : 166 + 160] = (100 + colours[1]) // 2
    expected[80:, 332:] = (100 + colours[2]) // 2
    assert np.array_equal(sheet[:160], expected)
    assert sheet.shape == (160 + 6 + 18, 492, 3)
    for colour in colours[1:]:
        assert (sheet[166:] == colour).all(-1).sum() > 50


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_images_of_any_channels_are_shown(channels):
    image, mask = torch.full((channels, 4, 6), 100, dtype=torch.uint8), np.zeros((4, 6), np.uint8)
    assert np.array(overlay(image, mask, palette(2))).tolist() == np.full((4, 6, 3), 100).tolist()


@pytest.mark.parametrize("name", ["two\nlines", "no \udcff Unicode", "\u732b"])
def test_classes_may_be_called_anything(name):
    """A stranger's classes.json may hold such names: a run would end with a traceback after its last step."""
    classes = [name, "b"]
    assert confusion_picture(torch.eye(2), classes).size > (2 * 18, 2 * 18)
    shown = Shown(torch.zeros(3, 4, 4, dtype=torch.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8))
    assert predictions_picture([shown], classes[::-1]).size


def test_the_loss_has_the_heads_auxiliary_outputs_in_it():
    """DANet's three, each with its weight, and the auxiliary head's at 0.4."""
    from ssl_global.finetuning.losses import pixel_loss

    recipe = load_recipe("finetune", "segment_demo")
    from dataclasses import replace

    method = replace(recipe.method, head="danet", classes=("a", "b", "c"), width=8)
    torch.manual_seed(0)
    built = method.build(replace(recipe, method=method)).eval()
    images, target = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    found = built({"views": [images], "mask": target}, None)
    maps = built.model.model.features(images)
    said = built.model.model.head(maps)
    logits = [said.main, *said.auxiliary, built.model.model.auxiliary(maps)]
    weights = [1.0, *[built.model.model.head.auxiliary_weight] * len(said.auxiliary), 0.4]
    large = [F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False) for x in logits]
    expected = sum(w * pixel_loss(x, target) for w, x in zip(weights, large, strict=True))
    assert len(logits) == 4
    torch.testing.assert_close(found["loss"], expected)
