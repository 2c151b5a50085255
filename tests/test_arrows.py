"""Who may import whom. The arrows keep the house's floors apart; here they are read off the code."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ssl_global").rglob("*.py"))
NEUTRAL = {"errors", "recipe", "schedules"}  # know nothing of data, models or runs

# room: the rooms of ssl_global that it may import, besides itself
ALLOWED = {
    "errors": set(),
    "schedules": set(),
    "recipe": {"errors", "encoders", "methods"},  # the two only for signatures
    "attention": set(),
    "finetuning": NEUTRAL | {"attention", "data", "encoders", "methods", "evaluation", "inference"},
    "inference": set(),
    "data": NEUTRAL,
    "encoders": NEUTRAL | {"attention"},
    "methods": NEUTRAL | {"encoders"},
    "evaluation": NEUTRAL | {"data", "encoders", "methods"},
    "predict": NEUTRAL | {"data", "export", "finetuning", "inference"},
    "export": NEUTRAL | {"attention", "encoders", "finetuning"},
    "converting": NEUTRAL | {"encoders", "export"},
    "portable": NEUTRAL | {"attention", "encoders", "export"},
    "explain": NEUTRAL | {"attention", "data", "encoders", "evaluation", "export", "methods"},
    "command_line": NEUTRAL,
    "planning": NEUTRAL | {"encoders", "methods", "training", "command_line"},
    "training": NEUTRAL | {"data", "encoders", "methods", "evaluation", "explain", "command_line"},
}


def room(file: Path) -> str:
    return file.relative_to(ROOT / "ssl_global").parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full here, `from ssl_global...`"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("ssl_global.")} - {room(file)}


def test_arrows_run_down():
    checked = [file for file in FILES if room(file) in ALLOWED]
    print(f"{len(checked)} of {len(FILES)} files; the others are the ways in: pretrain, finetune, cli")
    assert {room(file) for file in FILES} - ALLOWED.keys() <= {"pretrain", "finetune", "cli", "__init__"}
    wrong = {str(f.relative_to(ROOT)): rooms_imported(f) - ALLOWED[room(f)] for f in checked}
    assert {file: rooms for file, rooms in wrong.items() if rooms} == {}


def test_only_training_and_the_job_import_accelerate():
    users = {room(file) for file in FILES if any(name.split(".")[0] == "accelerate" for name in imports(file))}
    assert users == {"training", "finetune"}


def test_methods_know_neither_each_other_nor_the_loop_and_the_loop_names_none():
    methods = {"mae", "dino", "dinov2", "consistency", "distill"}
    modules = {f"ssl_global.methods.{name}" for name in methods}
    for name in methods:
        found = imports(ROOT / "ssl_global" / "methods" / f"{name}.py")
        assert not {n for n in found if n.rpartition(".")[0] in modules}
    for file in (ROOT / "ssl_global" / "training").glob("*.py"):
        assert not {n for n in imports(file) if n.rpartition(".")[0] in modules}


def test_nothing_imports_recipes_or_tests():
    recipes = list((ROOT / "recipes").glob("*.py"))
    tests = list((ROOT / "tests").rglob("*.py"))
    print(f"{len(FILES)} files of the package, {len(recipes)} recipes, {len(tests)} of tests")
    assert len(FILES) >= 39
    assert len(recipes) >= 2
    assert len(tests) >= 25
    for file in [*FILES, *recipes, *tests, ROOT / "pretrain.py", ROOT / "finetune.py"]:
        assert not {name for name in imports(file) if name.split(".")[0] in ("recipes", "tests")}, file
    helpers = {file.stem for file in tests}  # of tests, by their bare name: pytest has their folder on the path
    for file in FILES:
        assert not {name for name in imports(file) if name.split(".")[0] in helpers}, file
    for file in recipes:
        assert {name.split(".")[0] for name in imports(file)} <= {"dataclasses", "ssl_global"}
