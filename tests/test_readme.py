"""README.md's commands run, its Python runs, and its tree is what is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_global import cli
from ssl_global.command_line import parse
from ssl_global.data.sample import photograph

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
FENCES = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for kind, body in FENCES if kind == "bash" for line in body.splitlines() if line]
PIECES = [piece.strip() for line in COMMANDS for piece in line.split("&&")]
JOBS = [piece for piece in PIECES if "--recipe" in piece]
TOOLS = [piece for piece in PIECES if piece.startswith("ssl-global")]
SHORT = [
    "--train.steps=2", "--optim.warmup-epochs=0", "--data.workers=0", "--device=cpu", "--eval.no-linear",
    "--train.global-batch=8", "--log-with",
]  # fmt: skip
BIN = Path(sys.executable).parent


def short(job: str) -> list[str]:
    """The command's own words, and what makes it end in a moment."""
    words = shlex.split(job)
    if "--train.epochs" in words:
        place = words.index("--train.epochs")
        words = words[:place] + words[place + 2 :]
    freeze = [] if "mae" in job else ["--method.freeze-prototypes-epochs=0"]
    return [*words, *freeze, *SHORT]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as README's reader has it: the checkout's files, images, labelled images, a recipe of one's own."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("pretrain.py", "recipes", "ssl_global"):
        (folder / name).symlink_to(ROOT / name)
    image = photograph("coffee.png")
    for number in range(16):
        for place in (f"photos/{number:02d}.jpg", f"labelled/{number % 2}/{number:02d}.jpg"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            image.crop((20 * number, 10 * number, 20 * number + 90, 10 * number + 90)).save(folder / place)
    (own,) = [body for kind, body in FENCES if kind == "python" and body.startswith("# my_recipe.py")]
    (folder / "my_recipe.py").write_text(own)
    return folder


def run(words: list[str], desk: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=desk, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done


def test_the_walk_finds_the_commands():
    print(f"{len(PIECES)} commands: {len(JOBS)} runs, {len(TOOLS)} of ssl-global")
    assert len(JOBS) >= 8
    assert len(TOOLS) >= 4
    others = set(PIECES) - set(JOBS) - set(TOOLS)
    assert others == {"pip install -e .", "pip install -e '.[test]'", "pytest"}


@pytest.mark.parametrize("job", JOBS)
def test_every_run_is_well_formed(job, desk, monkeypatch):
    """All words are options that exist, and the recipe holds together with them."""
    monkeypatch.chdir(desk)
    words = shlex.split(job)
    if "--help" not in words:
        parse(words[next(i for i, word in enumerate(words) if word == "--recipe") :])


def test_the_first_command_runs_through_accelerate_and_leaves_what_readme_says(desk):
    done = run(short(JOBS[0]), desk)
    assert JOBS[0] == "accelerate launch pretrain.py --recipe dino"
    assert "done: 2 steps" in done.stdout
    (drawing,) = [body for kind, body in FENCES if kind == "text" and body.startswith("runs/dino/")]
    promised = {line.split()[0].rstrip("/") for line in drawing.splitlines()[1:]} - {"bad_samples.jsonl"}
    assert promised <= {path.name for path in (desk / "runs" / "dino").iterdir()}


def test_every_ssl_global_command_runs(desk, monkeypatch, capsys):
    """In README's order, on what the first run left."""
    if not (desk / "runs" / "dino" / "export").exists():
        run(short(JOBS[0]), desk)
    monkeypatch.chdir(desk)
    for command in TOOLS:
        cli.main(shlex.split(command)[1:])
    said = capsys.readouterr().out
    assert (desk / "shards" / "photos-000000.tar").exists()
    assert (desk / "runs" / "dino" / "export-student" / "model.safetensors").exists()
    assert (desk / "probe.json").exists()
    assert "knn" in said


def test_own_data_own_recipe_and_shards_run(desk):
    jobs = {"own": next(j for j in JOBS if "photos/" in j), "recipe": next(j for j in JOBS if "my_recipe" in j)}
    small = ["--encoder.depth=1", "--encoder.patch=32", "--method.prototypes=32", "--eval.batch=8", "--data.workers=0"]
    run([*short(jobs["own"])[:-1], *small, "--train.precision=fp32", "--out=runs/own", "--log-with"], desk)
    run(short(jobs["recipe"]), desk)
    assert (desk / "runs" / "mine" / "summary.json").exists()


def test_python_blocks_run(desk, monkeypatch):
    if not (desk / "runs" / "dino" / "export").exists():
        run(short(JOBS[0]), desk)
    monkeypatch.chdir(desk)
    blocks = [body for kind, body in FENCES if kind == "python"]
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
    from transformers import AutoModel

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
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    there = set()
    for file in tracked:
        head, _, rest = file.partition("/")
        if head in ("pretrain.py",):
            there.add(head)
        elif head in ("recipes", "ssl_global", "tests"):
            there.add(f"{head}/")
            if head != "tests" and rest != "__init__.py":
                there.add(f"{head}/{rest.split('/')[0]}" + ("/" if "/" in rest else ""))
    assert shown == there
