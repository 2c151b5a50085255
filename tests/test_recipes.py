"""Every recipe is walked: it holds together, survives JSON, and no setting is read by nobody."""

import ast
import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from recipes_under_test import FUNCTIONS, TUNING, load_recipe

from ssl_global.command_line import Command, parse, recipe_files
from ssl_global.finetune import Finetune
from ssl_global.recipe import as_json, from_json

ROOT = Path(__file__).parents[1]
PARTS = {
    "Data",
    "Views",
    "Crops",
    "EncoderConfig",
    "MethodConfig",
    "Optim",
    "Train",
    "Eval",
    "Log",
    "Explain",
    "Checkpoint",
}


def test_the_walk_finds_the_recipes():
    print(f"{len(recipe_files())} recipes")
    assert {"dino", "mae"} <= recipe_files().keys()
    assert TUNING == ["finetune", "global_cnn", "global_swin_tune", "small_resnet"]


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_a_recipe_holds_together_and_survives_json(name, function):
    recipe = load_recipe(name, function)
    recipe.check()
    assert from_json(json.loads(json.dumps(as_json(recipe)))) == recipe
    command, overridden = parse(["--recipe", f"{name}:{function}"], Command)
    assert command.settings == recipe
    assert overridden == {}


@pytest.mark.parametrize("name", list(recipe_files()))
def test_a_recipe_says_what_how_and_where_its_numbers_are_from(name):
    head = ast.get_docstring(ast.parse(recipe_files()[name].read_text()))
    script = "finetune.py" if name in TUNING else "pretrain.py"
    job = script if name == Finetune.usual_recipe else f"{script} --recipe {name}"
    for words in (f"accelerate launch {job}", "Expect", "Numbers", "https://arxiv.org/abs/"):
        assert words in head, words


@pytest.mark.parametrize("name", list(recipe_files()))
def test_options_that_a_recipe_offers_go_with_it(name):
    """The lines of its head that are nothing but options."""
    head = ast.get_docstring(ast.parse(recipe_files()[name].read_text()))
    offers = [line.split() for line in head.splitlines() if line.startswith("    --")]
    known = {"mae_swin": 2, "dino_swin": 1, "dinov2": 4, "dinov2_swin": 1, "distill": 1, "small_resnet": 5}
    assert len(offers) == known.get(name, 0)
    for words in offers:
        command, _ = parse(["--recipe", f"{name}:recipe", *words], Finetune if name in TUNING else Command)
        command.settings.check()


def test_the_papers_numbers():
    """A few of each, as the authors publish them."""
    mae, dino = load_recipe("mae", "recipe"), load_recipe("dino", "recipe")
    mae_swin, dino_swin = load_recipe("mae_swin", "recipe"), load_recipe("dino_swin", "recipe")
    assert (mae_swin.train.global_batch, mae_swin.train.epochs, mae_swin.optim.warmup_epochs) == (4096, 200, 10)
    assert (mae_swin.method.masking, mae_swin.method.secondary_ratio) == ("uniform", 0.25)
    assert (mae_swin.encoder.window, mae_swin.views.globals.pixels, mae_swin.method.decoder_depth) == (16, 256, 2)
    assert (dino_swin.train.global_batch, dino_swin.train.epochs) == (512, 300)
    assert (dino_swin.method.teacher_temp, dino_swin.method.teacher_temp_warmup_epochs) == ((0.04, 0.07), 30)
    assert (mae.train.global_batch, mae.train.epochs, mae.optim.lr_per_256_images) == (4096, 800, 1.5e-4)
    assert (mae.method.mask_ratio, mae.optim.betas, mae.optim.weight_decay) == (0.75, (0.9, 0.95), (0.05, 0.05))
    assert (dino.train.global_batch, dino.train.epochs, dino.optim.lr_per_256_images) == (512, 100, 5e-4)
    assert (dino.method.prototypes, dino.method.teacher_momentum) == (65_536, (0.996, 1.0))
    assert (dino.views.globals.count, dino.views.locals.count) == (2, 8)
    assert (dino.views.globals.blur, dino.views.globals.solarize) == ((1.0, 0.1), (0.0, 0.2))
    dinov2, ibot = load_recipe("dinov2", "recipe"), load_recipe("dinov2_swin", "recipe")
    assert dinov2.optim.lr_per_256_images * 2048 / 256 == pytest.approx(0.004 * (2048 / 1024) ** 0.5, rel=1e-3)
    assert (dinov2.method.hidden_share, dinov2.method.hidden_ratio, dinov2.method.koleo_weight) == (
        0.5,
        (0.1, 0.5),
        0.1,
    )
    assert (dinov2.method.layer_decay, dinov2.method.patch_embed_lr, dinov2.encoder.drop_path) == (0.9, 0.2, 0.3)
    assert (ibot.train.global_batch, ibot.train.epochs, ibot.method.prototypes) == (1040, 300, 8192)
    consistency, distill = load_recipe("consistency", "recipe"), load_recipe("distill", "recipe")
    assert (consistency.method.temp, consistency.method.projector_width, consistency.train.global_batch) == (
        0.1,
        128,
        4096,
    )
    assert (consistency.optim.lr_per_256_images, consistency.optim.warmup_epochs) == (1.5e-4, 40)
    assert (distill.method.student_temp, distill.method.teacher_temp, distill.method.prototypes) == (0.1, 0.04, 65_536)
    small, swin = load_recipe("small_resnet", "recipe"), load_recipe("global_swin_tune", "recipe")
    assert (small.train.global_batch, small.data.mean, small.data.std) == (64, (0.5,) * 3, (0.5,) * 3)
    assert (swin.train.epochs, swin.optim.warmup_epochs, swin.optim.clip_norm) == (30, 5, 5.0)
    assert (swin.train.global_batch, swin.encoder.drop_path, swin.method.mixup) == (1024, 0.1, 0.8)


def config_fields(config):
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from config_fields(value)
        else:
            yield type(config).__name__, field.name


def names_read(file: Path) -> set[str]:
    """Attributes that are read, and literal names handed to getattr, outside of check functions."""
    tree = ast.parse(file.read_text())
    checks = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name.startswith("check")
        for node in ast.walk(function)
    }
    read: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in checks:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            read.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            read |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
    return read


def test_every_field_is_read_by_something():
    files = list((ROOT / "ssl_global").rglob("*.py"))
    read = set().union(*(names_read(file) for file in files))
    known = {pair for name, function in FUNCTIONS for pair in config_fields(load_recipe(name, function))}
    print(f"{len(known)} fields, {len(files)} files")
    assert len(known) > 50
    assert [f"{owner}.{name}" for owner, name in sorted(known) if name not in read] == []


def test_every_field_has_a_help_text():
    owners = {pair[0] for name, function in FUNCTIONS for pair in config_fields(load_recipe(name, function))}
    seen = 0
    for file in (ROOT / "ssl_global").rglob("*.py"):
        lines = file.read_text().splitlines()
        for body in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(body, ast.ClassDef) or body.name not in owners:
                continue
            for line in (lines[n.lineno - 1] for n in body.body if isinstance(n, ast.AnnAssign)):
                is_part = ": " in line and line.split(": ")[1].split()[0] in PARTS
                assert "  # " in line or is_part, f"{file.name}: {line.strip()}"
                seen += 1
    print(f"{seen} fields of {len(owners)} classes")
    assert seen > 50
