"""A plan's arithmetic, its choices, its file, and what cannot be planned."""

import json
import math
from dataclasses import replace

import pytest
from recipes_under_test import TUNING, load_recipe

from ssl_global import cli
from ssl_global.command_line import Command, find, parse, recipe_files
from ssl_global.planning import planner
from ssl_global.planning.dry_run import Parts, Step
from ssl_global.planning.planner import Machine, plan
from ssl_global.planning.small_data import adapted
from ssl_global.recipe import flatten

PARTS = Parts(learning=50_000_000, fixed=40_000_000, heads=10_000_000, buffers=0, blocks=60_000_000,
              largest_block=2_000_000)  # fmt: skip
STEP = Step(flops_each=1e11, fixed_bytes=3e8, bytes_each=1e8, cast_bytes=10**8)


@pytest.fixture
def known(monkeypatch):
    """A step whose figures are round."""
    monkeypatch.setattr(planner, "dry_run", lambda recipe: (PARTS, STEP))


def values(name, images, gpus=1):
    recipe, choices = adapted(load_recipe(name, "recipe"), images, gpus)
    assert {choice.field: choice.value for choice in choices}.items() <= flatten(recipe).items()
    return flatten(recipe)


@pytest.mark.parametrize("name", [name for name in recipe_files() if name not in TUNING])
def test_all_of_imagenet_changes_nothing(name):
    recipe = load_recipe(name, "recipe")
    assert adapted(recipe, 1_281_167, 8) == (recipe, [])


@pytest.mark.parametrize(
    ("images", "prototypes", "temp", "momentum", "epochs", "batch"),
    [
        (5_000, 1024, 0.02, 0.99, 200, 256),
        (20_000, 1024, 0.02, 0.99, 200, 256),
        (20_001, 2048, 0.02, 0.99, 400, 256),
        (60_000, 4096, 0.02, 0.99, 400, 256),
        (150_000, 16_384, 0.02, 0.991, 400, 256),
        (400_000, 32_768, 0.03, 0.992, 100, 512),
        (600_000, 65_536, 0.03, 0.993, 100, 512),
    ],
)
def test_few_images_have_dino_changed(images, prototypes, temp, momentum, epochs, batch):
    """As lightly-train has its `auto`: 0.02 to 0.07 and 0.99 to 0.996 in a straight line from 20 000 to 1 281 167."""
    found = values("dino", images)
    assert found["method.prototypes"] == prototypes
    assert found["method.teacher_temp"] == (min(temp, 0.04), min(0.04, round(0.02 + 0.05 * (images - 2e4) / 1261167, 2)
                                                                 if images > 2e4 else 0.02))  # fmt: skip
    assert found["method.teacher_momentum"] == (momentum, 1.0)
    assert (found["train.epochs"], found["train.global_batch"]) == (epochs, batch)
    steps = epochs * images / batch
    assert found["eval.every"] == min(12_500, math.ceil(steps / 10))


def test_what_is_smaller_already_stays():
    recipe = load_recipe("dino", "demo")  # 1024 prototypes, 64 images a step
    found = flatten(adapted(recipe, 400_000, 1)[0])
    assert found["method.prototypes"] == 1024
    assert found["train.global_batch"] == 64
    mae = values("mae", 10_000)
    assert (mae["train.epochs"], mae["train.global_batch"], mae["optim.warmup_epochs"]) == (800, 256, 40)
    assert values("dino_swin", 10_000)["method.teacher_temp_warmup_epochs"] == 30
    assert values("dino", 10_000, gpus=6)["train.global_batch"] == 252  # six can share it


def test_warm_ups_are_parts_of_the_run():
    recipe = load_recipe("dino_swin", "recipe")
    recipe = replace(recipe, train=replace(recipe.train, epochs=50))
    found = flatten(adapted(recipe, 600_000, 1)[0])
    assert (found["optim.warmup_epochs"], found["method.teacher_temp_warmup_epochs"]) == (5, 15)


def test_memory_of_one_gpu(known):
    found = plan("dino", Machine(vram_gb=10), images=1_281_167)
    (memory,) = found.memories
    assert (memory.engine, memory.weights, memory.gradients, memory.averages, memory.gathered) == (
        "one process", 360_000_000, 200_000_000, 400_000_000, 0,
    )  # fmt: skip
    # 0.96 + 0.3 GB are there, 9 GB may be: 77 images of 0.1 GB would fit, 64 divide the batch of 512.
    assert memory.micro_batch == 64
    assert memory.total(64) == 960_000_000 + 300_000_000 + 6_400_000_000
    assert (found.run.micro_batch, found.run.accumulate) == (64, 8)
    assert plan("dino", Machine(vram_gb=8), images=1_281_167).memories[0].micro_batch == 32


def test_memory_of_four_gpus(known):
    replicated, sharded = plan("dino", Machine(gpus=4, vram_gb=10), images=1_281_167).memories
    assert replicated.engine == "DDP"
    assert (sharded.engine, sharded.weights, sharded.gradients, sharded.averages) == (
        "FSDP2", 90_000_000, 50_000_000, 100_000_000,
    )  # fmt: skip
    # 30 million parameters in no block and two blocks of 2, 2 bytes each; the 30 million's gradients, 2 and 4.
    assert sharded.gathered == 2 * 34_000_000 + 6 * 30_000_000
    assert sharded.step.bytes(10) == 1_200_000_000  # no casts of its own


def test_time(known):
    machine = Machine(gpus=8, vram_gb=80, gpu="a100", utilisation=0.5)
    found = plan("dino", machine, images=1_281_167)
    seen = round(100 * 1_281_167 / 512) * 512
    assert found.hours == pytest.approx(seen * 1e11 / (8 * 312e12 * 0.5) / 3600)
    assert "100.0 GFLOPs an image at 0.5 of 312 TFLOPS (a100, its data sheet)" in found.time_by
    found = plan("dino", replace(machine, tflops=100), images=1_281_167)
    assert found.hours == pytest.approx(seen * 1e11 / (8 * 100e12 * 0.5) / 3600)
    found = plan("dino", replace(machine, images_per_second=1000), images=1_281_167)
    assert found.hours == pytest.approx(seen / 1000 / 3600)
    assert found.time_by.startswith("measured")


@pytest.mark.parametrize("name", [name for name in recipe_files() if name != "distill"])
def test_every_recipe_can_be_planned_and_written(name, known, tmp_path):
    """The demos' steps are run without content elsewhere (test_dry_run), the papers' by hand."""
    file = tmp_path / "my_recipe.py"
    found = plan(name, Machine(), images=30_000)
    cli.main(["plan", "--recipe", name, "--images", "30000", "--write", str(file)])
    _, _, build = find(str(file))
    assert build() == found.recipe
    _, _, demo = find(f"{file}:demo")
    assert demo() == load_recipe(name, "demo")
    assert f"{'finetune' if name in TUNING else 'pretrain'}.py --recipe {file} --data" in file.read_text()
    before = file.read_text()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", "--recipe", name, "--images", "9", "--write", str(file)])
    assert file.read_text() == before
    cli.main(["plan", "--recipe", name, "--images", "3000000", "--write", str(file), "--overwrite"])
    assert file.read_text() != before


def test_a_written_recipe_of_a_recipe_of_ones_own(known, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from ssl_global.command_line import find\n\n\ndef recipe():\n    return find('mae:recipe')[2]()\n"
    )
    monkeypatch.chdir(tmp_path)
    cli.main(["plan", "--recipe", "own.py", "--images", "30000", "--write", "planned.py"])
    assert "def demo" not in (tmp_path / "planned.py").read_text()
    monkeypatch.chdir(tmp_path.parent)
    command, overridden = parse([f"--recipe={tmp_path / 'planned.py'}:recipe"], Command)
    assert command.settings.train.global_batch == 256
    assert overridden == {}


def test_the_command_says_it_all(tmp_path, capsys):
    """With a real dry run."""
    out = tmp_path / "plan.json"
    cli.main(
        ["plan", "--recipe", "mae:demo", "--images", "3000", "--gpus", "2", "--gpu", "rtx4090", "--json", str(out)]
    )
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    for words in (
        "mae:demo for 3000 images on 2 GPUs", "DDP", "FSDP2", "AdamW's two averages", "gathered, at most",
        "200 at least, as Imagenette was learnt", "2 processes x 1 x 32 images = 64 a step",
        "at 0.3 of 82.6 TFLOPS (rtx4090, its data sheet)",
    ):  # fmt: skip
        assert words in said, words
    assert (found["steps"], found["epochs"]) == (9375, 200)
    ddp, fsdp = found["memory"]
    assert ddp["total"] == ddp["weights"] + ddp["gradients"] + ddp["averages"] + ddp["step"]
    assert fsdp["averages"] == ddp["averages"] / 2


def test_as_it_is_auto_is_what_fits(known, monkeypatch):
    """As the run would find it; the recipe keeps its word."""
    file, function, build = find("dino")
    auto = replace(build(), train=replace(build().train, micro_batch="auto"))
    monkeypatch.setattr(planner, "find", lambda spec: (file, function, lambda: auto))
    as_it_is = plan("dino", Machine(vram_gb=8), images=40_000, as_it_is=True)
    assert as_it_is.run.micro_batch == as_it_is.memories[0].micro_batch < as_it_is.run.global_batch
    assert (as_it_is.recipe, as_it_is.choices) == (auto, [])


def test_as_it_is(known, capsys):
    cli.main(["plan", "--recipe", "dino", "--images", "3000", "--as-it-is"])
    said = capsys.readouterr().out
    assert "lightly-train" not in said
    assert "1 process x 8 x 64 images = 512 a step" in said


def test_what_is_too_large_is_said(known, capsys):
    cli.main(["plan", "--recipe", "dino", "--images", "100", "--vram", "1"])
    said = capsys.readouterr().out
    assert "warning: one process: 1 GB are too few for 1 at once, the least that there is; 1.5 would do" in said
    assert "warning: a step takes 256 images, more than there are" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "dinoo", "--images", "9"], "no recipe of that name, did you mean dino"),
        (["--recipe", "dino", "--images", "0"], "--images 0: at least 1"),
        (["--recipe", "dino", "--images", "9", "--gpus", "0"], "--gpus 0: above 0"),
        (["--recipe", "dino", "--images", "9", "--vram", "-1"], "--vram -1.0: above 0"),
        (["--recipe", "dino", "--images", "9", "--utilisation", "1.5"], "--utilisation 1.5: a share of the peak"),
        (["--recipe", "dino", "--images", "9", "--tflops", "inf"], "--tflops inf: above 0"),
        (["--recipe", "dino", "--images", "9", "--images-per-second", "0"], "--images-per-second 0.0: above 0"),
        (["--recipe", "dino", "--images", "9", "--gpu", "v100"], "--gpu v100: has no bf16"),
        (
            ["--recipe", "dino", "--images", "9", "--classes", "9"],
            "--classes 9: this recipe's method tells no classes apart",
        ),
        (["--recipe", "finetune", "--images", "9", "--classes", "1"], "--classes 1: at least 2"),
        (["--recipe", "dino", "--images", "9999999", "--gpus", "7"], "train.global_batch = 512: cannot be shared by 7"),
        (["--recipe", "dino", "--images", "9", "--write", "mine"], "--write mine: the name of a .py file"),
        (["--recipe", "dino", "--images", "9", "--write", "no/mine.py"], "--write no/mine.py: No such file"),
    ],
)
def test_what_cannot_be_planned(words, message, known, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"ssl-global: {message}" in error or message in error
    assert len(error.strip().splitlines()) == 1
