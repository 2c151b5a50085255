"""Bad input, one by one: one line that names the field, the value and what would be right; exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
import warm

from ssl_global.command_line import Command, main, parse
from ssl_global.errors import UserError

ROOT = Path(__file__).parents[1]

WRONG = [
    ("", "--recipe is missing: one of "),
    ("--recipe dno", "--recipe dno: no recipe of that name, did you mean dino?"),
    ("--recipe nowhere.py", "there is no file nowhere.py"),
    ("--recipe dino:small", "has no function small(); recipe() and demo() are usual"),
    (
        "--recipe dino --optim.lr 1e-3",
        "did you mean --optim.lr-per-256-images?",
    ),
    ("--recipe dino --method.mask-ratio 0.5", "--method.mask-ratio 0.5: there is no such field"),
    ("--recipe dino --train.epochs many", "--train.epochs 'many': not a {None}|FLOAT; this recipe has"),
    ("--recipe dino --train.global-batch 2.5", "--train.global-batch '2.5': not a whole number; this recipe has 64"),
    ("--recipe dino --train.precision fp8", "Expected one of ('fp32', 'bf16', 'fp16')"),
    ("--recipe dino stray", "Unrecognized options: stray"),
    ("--recipe dino --optim.lr-per-256-images nan", "optim.lr_per_256_images = nan: a finite number"),
    ("--recipe dino --train.epochs inf", "train.epochs = inf: a finite number"),
    ("--recipe mae --data.std 0.2 nan 0.2", "data.std = (0.2, nan, 0.2): a finite number"),
    ("--recipe dino --train.steps 0", "train.steps = 0: at least 1"),
    ("--recipe dino --device tpu", "invalid choice 'tpu' for argument '--device'"),
    ("--recipe dino --views.globals.area 0.5", "Missing value for argument '--views.globals.area'. Expected 2 values"),
    ("--recipe dino --seed", "Missing value for argument '--seed'"),
    (
        "--recipe dino --views.globals.pixels 30",
        "views.globals.pixels = 30: not a multiple of the patch, 8; 24 or 32",
    ),
    (
        "--recipe dino --views.locals.pixels 9",
        "views.locals.pixels = 9: not a multiple of the patch, 8; 8 or 16",
    ),
    ("--recipe dino --train.global-batch 0", "train.global_batch = 0: at least 1 image"),
    ("--recipe mae --method.mask-ratio 1.2", "method.mask_ratio = 1.2: a share of the patches, above 0 and below 1"),
    ("--recipe dino --optim.warmup-epochs 999", "optim.warmup_epochs = 999.0: longer than the run, which has"),
    (
        "--recipe dino --method.freeze-prototypes-epochs 99",
        "method.freeze_prototypes_epochs = 99.0: longer than",
    ),
    ("--recipe dino --encoder.heads 7", "encoder.heads = 7: does not divide the width, 192; 6 would"),
    ("--recipe mae --method.decoder-heads 7", "method.decoder_heads = 7: must divide method.decoder_width = "),
    ("--recipe dino --encoder.name resnet50", "encoder.name = resnet50: not a vit_* of timm"),
    ("--recipe dino --train.steps 5 --train.epochs 5", "give train.epochs or train.steps"),
    (
        "--recipe dino --views.globals.blur 1 1 1",
        "views.globals.blur = (1.0, 1.0, 1.0): 1 probability, or 2",
    ),
    ("--recipe dino --views.globals.area 0.9 0.2", "views.globals.area = (0.9, 0.2): two shares of the image"),
    ("--recipe dino --data.channels 0", "data.channels = 0: 3 (colour), 1 (grey), or the number of the files' bands"),
    ("--recipe dino --data.mean auto --data.reader stream", "data.epoch_images = None: a stream is not counted"),
    ("--recipe dino --data.shuffle-block 0", "data.shuffle_block = 0: at least 1"),
    ("--recipe dino --data.images-per-class 0", "data.images_per_class = 0: at least 1, or None for all"),
    (
        "--recipe dino --data.images-per-class 5 --data.reader stream --data.epoch-images 9",
        "data.images_per_class = 5: None for data.reader stream",
    ),
    ("--recipe dino --data.channels 1", "data.mean = (0.485, 0.456, 0.406): one number for each of data.channels = 1"),
    ("--recipe dino --checkpoint.keep 1", "checkpoint.keep = 1: at least 2"),
    ("--recipe dino --method.teacher-temp 0 0.04", "method.teacher_temp = (0.0, 0.04): both above 0"),
    ("--recipe dino --data.max-bad-fraction 7", "data.max_bad_fraction = 7.0: between 0 and 1"),
    ("--recipe mae --views.locals.count 2", "views = 1 global and 2 local: MAE looks at 1 global view"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words for words, _ in WRONG])
def test_wrong_input_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(Command, lambda command, overridden: pytest.fail("it should not have come to a run"), words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def small(): pass", "has no function demo(); recipe() and demo() are usual"),
        ("def demo(): return 3", "demo() returns a int; a Recipe would be right"),
        ("def demo(: pass", "invalid syntax"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        (
            "from ssl_global.recipe import Train\ndef demo(): return Train(epoch=3)",
            "unexpected keyword",
        ),
    ],
)
def test_a_wrong_recipe_file_is_named(text, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as refusal:
        parse(["--recipe", str(file)], Command)
    assert str(file) in str(refusal.value)
    assert message in str(refusal.value)


def in_a_fresh_python(*words, cwd):
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("python", "words", "message"),
    [
        (
            in_a_fresh_python, ["--recipe=dino", "--train.precision=fp16", "--device=cpu"],
            "train.precision = fp16: needs a GPU",
        ),
        (warm.completed, ["--recipe=mae", "--data=nowhere", "--device=cpu"], "nowhere: there is no such file or"),
        (warm.completed, ["--recipe=mae", "--log-with", "nobody", "--device=cpu"], "nobody"),
    ],
)  # fmt: skip
def test_as_a_process_with_code_2_and_nothing_left_behind(python, words, message, tmp_path):
    done = python(ROOT / "pretrain.py", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []
    assert not list(tmp_path.rglob("checkpoints"))


def test_help_lists_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--recipe", "dino", "--help"], Command)
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for words in ("--optim.lr-per-256-images", "--views.locals.area", "divides the student's logits"):
        assert words in said


def test_what_was_changed_is_reported_and_lengths_exclude_each_other():
    command, overridden = parse(
        ["--recipe", "dino", *["--train.steps=7", "--method.student_temp", "0.2", "--data", "some/", "--seed=3"]],
        Command,
    )
    assert overridden.keys() == {"train.steps", "train.epochs", "method.student_temp", "seed"}
    assert command.recipe == "dino:recipe"
    assert (command.settings.train.steps, command.settings.train.epochs) == (7, None)
    assert parse(["--recipe", "dino:recipe", "--train.epochs", "20"], Command)[0].settings.train.steps is None
    assert parse(["--recipe", "mae"], Command)[0].recipe == "mae:demo"
    assert parse(["--recipe", "mae", "--train.compile", "--eval.no-linear"], Command)[0].settings.train.compile
    assert str(parse(["--recipe", "mae"], Command)[0].out) == "runs/mae"


def test_dashes_and_underscores_are_one_spelling():
    dashes, underscores = (
        parse(["--recipe", "dino", f"--train.global{mark}batch=32", f"--optim.warmup{mark}epochs", "2"], Command)
        for mark in "-_"
    )
    assert dashes == underscores
    assert dashes[1].keys() == {"train.global_batch", "optim.warmup_epochs"}
