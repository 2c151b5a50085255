"""An installed wheel works without the checkout, recipes included."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("ssl_global", "recipes", "pyproject.toml", "README.md", "LICENSE")


def run(words, *, cwd, **environment):
    done = subprocess.run(words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is written into the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PARTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tree / name)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation"], cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_it_holds_the_recipes_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {f"ssl_global/recipes/{file.name}" for file in (ROOT / "recipes").glob("*.py")}
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "ssl_global").rglob("*.py")}
    assert recipes | modules <= set(names)
    assert not [name for name in names if name.startswith(("tests", "recipes"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_trains_and_exports_from_an_empty_folder(wheel, tmp_path, tmp_path_factory):
    assert "accelerate launch -m ssl_global.pretrain --recipe dino" in (ROOT / "README.md").read_text()
    site, desk, cache = tmp_path / "site", tmp_path / "desk", tmp_path_factory.getbasetemp() / "cache"
    desk.mkdir()
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], cwd=desk)
    where = [sys.executable, "-c", "import ssl_global.command_line as c; print(c.__file__, c.recipe_files()['dino'])"]
    assert run(where, cwd=desk, PYTHONPATH=str(site)).count(str(site)) == 2
    job = [
        sys.executable, "-m", "accelerate.commands.launch", "-m", "ssl_global.pretrain", "--recipe", "dino",
        "--train.steps=2", "--optim.warmup-epochs=0", "--method.freeze-prototypes-epochs=0", "--train.global-batch=8",
        "--data.workers=0", "--device=cpu", "--log-with",
    ]  # fmt: skip
    said = run(job, cwd=desk, PYTHONPATH=str(site), OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(cache))
    assert "done: 2 steps" in said
    assert (desk / "runs" / "dino" / "export" / "model.safetensors").exists()
