"""README.md's commands run, its Python runs, and its tree is what is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.run import get_args_parser

from ssl_global import cli, finetune, pretrain
from ssl_global.command_line import Command, parse
from ssl_global.data.sample import photograph

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
FENCES = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for kind, body in FENCES if kind == "bash" for line in body.splitlines() if line]
PIECES = [piece.strip() for line in COMMANDS for piece in line.split("&&")]
JOBS = [piece for piece in PIECES if "--recipe" in piece and "pretrain" in piece]
TUNING = [piece for piece in PIECES if "finetune.py" in piece]
TOOLS = [piece for piece in PIECES if piece.startswith("ssl-global")]
FIRST, *OTHERS = JOBS
SEVERAL = [job for job in OTHERS if "launch/" in job or "torchrun" in job]  # two processes: training/test_processes
SHORT = [
    "--train.steps=2", "--optim.warmup-epochs=0", "--data.workers=0", "--device=cpu", "--train.precision=fp32",
    "--train.global-batch=8", "--eval.no-linear", "--eval.bank-images=64",
]  # fmt: skip
SHORT_DINO = ["--method.freeze-prototypes-epochs=0", "--method.prototypes=32"]
OF_THE_PAPERS_SIZE = ["--encoder.depth=1", "--encoder.patch=32", "--views.locals.count=1"]  # recipe(): 224 pixels


def short(job: str) -> list[str]:
    """The command's own words, and what makes it end in a moment."""
    words = shlex.split(job)
    if "--train.epochs" in words:
        place = words.index("--train.epochs")
        words = words[:place] + words[place + 2 :]
    more = [*(SHORT_DINO if "mae" not in job else []), *(OF_THE_PAPERS_SIZE if "--data" in words else [])]
    return [*words, *more, *SHORT]


def launcher_and_job(job: str) -> tuple[list[str], list[str]]:
    """The words for accelerate or torchrun, up to the script, and those for the script."""
    words = shlex.split(job)
    script = next(place for place, word in enumerate(words) if word in ("pretrain.py", "ssl_global.pretrain"))
    return words[: script + 1], words[script + 1 :]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as README's reader has it: the checkout's files, images, labelled images, a recipe of one's own."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("pretrain.py", "finetune.py", "launch", "recipes", "ssl_global"):
        (folder / name).symlink_to(ROOT / name)
    image = photograph("coffee.png")
    for number in range(16):
        for place in ("photos", f"labelled/train/{number % 2}", f"labelled/val/{number % 2}"):
            file = folder / place / f"{number:02d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.crop((20 * number, 10 * number, 20 * number + 90, 10 * number + 90)).save(file)
    (own,) = [body for kind, body in FENCES if kind == "python" and body.startswith("# my_recipe.py")]
    (folder / "my_recipe.py").write_text(own)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """The built-in sample is made here, not in the home of who runs the tests."""
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="module")
def said_by_the_first(desk, cache) -> str:
    """What README's first command prints: a real process, through accelerate, with TensorBoard."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache),
    }  # fmt: skip
    done = subprocess.run(short(FIRST), cwd=desk, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done.stdout


@pytest.fixture(autouse=True)
def at_the_desk(desk, cache, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def test_the_walk_finds_the_commands():
    print(f"{len(PIECES)} commands: {len(JOBS)} runs, {len(TOOLS)} of ssl-global")
    assert len(JOBS) >= 10
    assert len(TOOLS) >= 4
    assert FIRST == "accelerate launch pretrain.py --recipe dino"
    assert len(SEVERAL) == 3
    assert len(TUNING) == 3
    others = set(PIECES) - set(JOBS) - set(TOOLS) - set(TUNING)
    assert others == {
        "pip install -e .",
        "pip install -e '.[test]'",
        "pytest",
        "python -m benchmarks attention",
        "python -m benchmarks data",
        "python -m benchmarks step --recipe dino --threads 1",
        "python -m benchmarks step --recipe mae --threads 1",
        "python -m benchmarks swin",
    }


@pytest.mark.parametrize("job", JOBS)
def test_every_run_is_well_formed(job):
    """All words are options that exist, of the launcher and of the job, and the recipe holds together with them."""
    launcher, words = launcher_and_job(job)
    if launcher[0] == "torchrun":
        get_args_parser().parse_args(launcher[1:])
    elif launcher[:2] == ["accelerate", "launch"]:
        launch_command_parser().parse_args(launcher[2:])
    else:
        assert launcher == ["python", "pretrain.py"]
    if "--help" not in words:
        parse(words, Command)


def test_the_first_command_runs_through_accelerate_and_leaves_what_readme_says(desk, said_by_the_first):
    assert "done: 2 steps" in said_by_the_first
    (drawing,) = [body for kind, body in FENCES if kind == "text" and body.startswith("runs/dino/")]
    promised = {line.split()[0].rstrip("/") for line in drawing.splitlines()[1:]}
    left = {path.name for path in (desk / "runs" / "dino").iterdir()}
    assert promised - {"bad_samples.jsonl"} == left  # there was none


@pytest.mark.parametrize("job", [job for job in OTHERS if job not in SEVERAL])
def test_every_other_run_runs(job, desk, capsys):
    """In this process, since the first has shown that accelerate launches it."""
    _, words = launcher_and_job(job)
    if "shards/" in job:
        cli.main(["pack", "photos/", "shards/"])
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            pretrain.main(words)
        assert stop.value.code == 0
        assert "--optim.lr-per-256-images" in capsys.readouterr().out
    elif "--print" in words:
        pretrain.main(words)
        assert "(recipe: " in capsys.readouterr().out
    else:
        out = parse(words, Command)[0].out
        place = desk / "runs" / "installed" if out == Path("runs/dino") else out  # the first command's stays
        _, words = launcher_and_job(shlex.join(short(job)))
        pretrain.main([*words, f"--out={place}", "--log-with"])
        assert (place / "summary.json").exists()
        assert "done: 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("job", TUNING)
def test_every_fine_tuning_runs(job, desk, said_by_the_first, capsys):
    _, _, _, *words = shlex.split(job)
    more = [word for word in SHORT if "eval" not in word]
    out = [] if "--out" in words else ["--out=runs/fine"]
    finetune.main([*words, *more, *out, "--train.epochs=None", "--log-with"])
    assert "done: 2 steps" in capsys.readouterr().out


def test_every_ssl_global_command_runs(desk, said_by_the_first, capsys):
    """In README's order, on what the first run left."""
    for command in TOOLS:
        cli.main(shlex.split(command)[1:])
    said = capsys.readouterr().out
    assert (desk / "shards" / "photos-000000.tar").exists()
    assert (desk / "runs" / "dino" / "export-student" / "model.safetensors").exists()
    assert (desk / "probe.json").exists()
    assert "knn" in said
    (weighed,) = [body for kind, body in FENCES if kind == "text" and "with all of them" in body]
    if not torch.accelerator.is_available():  # where a step is measured, another machine's figures are no promise
        assert weighed in said


def test_python_blocks_run(said_by_the_first):
    blocks = [body for kind, body in FENCES if kind == "python"]
    assert len(blocks) == 6
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
    from transformers import AutoModel

    assert 'AutoModel.from_pretrained("runs/dino/export")' in TEXT
    assert AutoModel.from_pretrained("runs/dino/export") is not None


def test_the_tree_is_what_is_there():
    (drawing,) = [body for kind, body in FENCES if kind == "text" and "pretrain.py             " in body]
    shown, parent = set(), ""
    for line in drawing.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            parent = name if name.endswith("/") else ""
            shown.add(name)
        else:
            shown.add(parent + name)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: nothing says which files are ours")
    there = set()
    for file in listed.stdout.split():
        head, slash, rest = file.partition("/")
        if head.startswith(".") or head in ("README.md", "LICENSE", "pyproject.toml"):
            continue  # every project has them
        there.add(head + slash)
        if head in ("recipes", "ssl_global") and rest != "__init__.py":
            there.add(f"{head}/{rest.split('/')[0]}" + ("/" if "/" in rest else ""))
    assert shown == there
