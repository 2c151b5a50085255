"""The command line over a recipe: find it by name, let every field be set, refuse what is not a field in one line."""

import contextlib
import difflib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypeVar

import torch.distributed as dist
import tyro

from ssl_global.errors import UserError, wrong
from ssl_global.recipe import Recipe, flatten

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Command:
    """Pretrain a vision backbone on images without labels.

    Without --data it runs the recipe's demo() on a built-in sample of photographs; with it, the paper's recipe().
    A recipe given as a .py file is a program: it is run.
    """

    recipe: str  # NAME, NAME:FUNCTION, or the path of a .py file, with or without :FUNCTION
    data: str | None = None  # a folder of images, or .tar shards ('train-{000..099}.tar'); None: the built-in sample
    val: str | None = None  # the same, with labels if there are any, to judge with; None: the sample's, or no judging
    out: Path | None = None  # where the run is kept; None: runs/NAME
    fresh: bool = False  # begin anew; a run that is in --out already is moved aside
    print: bool = False  # show the resolved recipe and end
    device: Literal["auto", "cpu"] = "auto"  # auto: the fastest there is
    timeout: float = 600.0  # seconds without a move after which several processes end and say which one is behind
    grace: float | None = None  # seconds after a stop signal to save in, or the run ends as it is; None: no limit
    log_with: tuple[str, ...] = ("tensorboard",)  # trackers, as Accelerate names them: tensorboard, wandb, mlflow, ...
    settings: Annotated[Recipe, tyro.conf.arg(name="")]

    program: ClassVar[str] = "pretrain.py"
    usual_recipe: ClassVar[str | None] = None  # without --recipe

    @classmethod
    def function(cls, argv: list[str]) -> str:
        """Of the recipe's file, unless --recipe names one."""
        return "demo" if option(argv, "--data") is None else "recipe"

    def filled_in(self) -> Self:
        """With what options of the job's own mean for the settings."""
        return self


AnyCommand = TypeVar("AnyCommand", bound=Command)


def parse(argv: Sequence[str], kind: type[AnyCommand]) -> tuple[AnyCommand, dict[str, object]]:
    """The command and the recipe's own values of the fields that it changes. Raises UserError; exits 0 after --help."""
    argv = list(argv)
    spec = option(argv, "--recipe") or kind.usual_recipe
    if spec is None and {"-h", "--help"} & set(argv):
        spec = next(iter(recipe_files()))
    if spec is None:
        raise UserError(f"--recipe is missing: one of {', '.join(recipe_files())}, or a path to a .py file")
    path, function, build = find(spec, default=kind.function(argv))
    recipe = build()
    if not isinstance(recipe, Recipe):
        raise UserError(f"{path}: {function}() returns a {type(recipe).__name__}; a Recipe would be right")
    default = kind(recipe=f"{path.stem}:{function}", out=Path("runs") / path.stem, settings=one_length(recipe, argv))
    refuse_unknown(argv, default)
    command = replace(tyro_parse(argv, default), recipe=default.recipe).filled_in()
    command.settings.check()
    for name in ("timeout", "grace"):
        seconds = getattr(command, name)
        if seconds is not None and not 0 < seconds < math.inf:
            raise wrong(f"--{name}", seconds, "seconds, above 0")
    before, after = flatten(recipe), flatten(command.settings)
    return command, {name: before[name] for name in after if after[name] != before[name]}


def recipe_files() -> dict[str, Path]:
    """{"dino": path, ...}: beside the package in a checkout, inside it when installed."""
    folder = next(f for f in (HERE / "recipes", HERE.parent / "recipes") if f.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def find(spec: str, *, default: str = "recipe") -> tuple[Path, str, Callable[[], Recipe]]:
    """(file, function name, function) of "dino", "dino:demo", "my/recipe.py" or "my/recipe.py:small"."""
    name, _, function = spec.partition(":")
    function = function or default
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"--recipe {spec}: there is no file {name}")
    else:
        files = recipe_files()
        if name not in files:
            raise UserError(
                f"--recipe {spec}: no recipe of that name{nearest(name, files)}; there are {', '.join(files)}"
            )
        path = files[name]
    module_spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        build = getattr(module, function, None)
        if not callable(build):
            raise UserError(f"--recipe {spec}: {path} has no function {function}(); recipe() and demo() are usual")
        build()  # a wrong field name shows here, with the file's name
    except (TypeError, SyntaxError, NameError, ImportError) as error:
        raise UserError(f"{path}: {error}") from error
    return path, function, build


def one_length(recipe: Recipe, argv: list[str]) -> Recipe:
    """A run has a length in epochs or in steps: setting one on the command line unsets the recipe's other."""
    epochs, steps = (option(argv, f"--train.{name}") is not None for name in ("epochs", "steps"))
    if epochs == steps:
        return recipe
    train = replace(recipe.train, steps=None) if epochs else replace(recipe.train, epochs=None)
    return replace(recipe, train=train)


def option(argv: list[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`; the last one counts."""
    value = None
    for place, word in enumerate(argv):
        if word.startswith(f"{name}="):
            value = word.partition("=")[2]
        elif word == name and place + 1 < len(argv):
            value = argv[place + 1]
    return value


def refuse_unknown(argv: list[str], default: Command) -> None:
    own = [field.name for field in fields(default) if field.name != "settings"]
    known = {f"--{name}".replace("_", "-") for name in (*own, *flatten(default.settings))}
    switches = [name for name, value in flatten(default.settings).items() if isinstance(value, bool)]
    known |= {"--help"} | {off(name) for name in ("fresh", "print", *switches)}
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag.replace("_", "-") not in known:
            shown = f"{flag} {value if equals else (option(argv, flag) or '')}".rstrip()
            raise UserError(
                f"{shown}: there is no such field{nearest(flag.replace('_', '-'), known)}; --help lists all"
            )


def off(name: str) -> str:
    """The option that turns a switch off: train.compile -> --train.no-compile."""
    part, dot, field = name.rpartition(".")
    return f"--{part}{dot}no-{field}".replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    longer = sorted(k for k in known if k.startswith(f"{name}-"))
    close = longer[::-1] or difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def tyro_parse(argv: list[str], default: AnyCommand) -> AnyCommand:
    """tyro, with the first paragraph of its report as one line."""
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            kind = type(default)
            return tyro.cli(kind, default=default, args=argv, prog=kind.program, description=kind.__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(one_line(report.getvalue(), default)) from None


def one_line(report: str, default: Command) -> str:
    """Of tyro's box: what is wrong, without the frame, and this recipe's value as an example of what would be right."""
    lines = [line.strip("│ ") for line in report.splitlines()[1:]]  # the first line is the box's title
    rule = re.compile(r"[─╰╯-]+")
    paragraph = itertools.takewhile(lambda line: not rule.fullmatch(line), itertools.dropwhile(rule.fullmatch, lines))
    text = " ".join(paragraph).removeprefix("Error parsing ")
    text = re.sub(r": no type matching (\S+) could be instantiated from \[(.*?)\].*", r" \2: not a \1", text)
    text = re.sub(r": could not convert string to float: (.*)", r" \1: not a number", text)
    text = re.sub(r": invalid literal for int\(\) with base 10: (.*)", r" \1: not a whole number", text)
    flag = re.search(r"--[\w.-]+", text)
    values = {f"--{name}".replace("_", "-"): value for name, value in flatten(default.settings).items()}
    if flag and (name := flag.group().rstrip(".")) in values:
        text = f"{text.rstrip('.')}; this recipe has {json.dumps(values[name])}"
    return text


def show_any_name() -> None:
    """A file's or a class's name may be no Unicode: it is escaped then, as on stderr, and ends no program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(
    kind: type[AnyCommand], job: Callable[[AnyCommand, dict[str, object]], None], argv: Sequence[str] | None = None
) -> None:
    """Parse, run, and turn a UserError into one line, from one process of each machine, and exit code 2."""
    show_any_name()
    try:
        command, overridden = parse(sys.argv[1:] if argv is None else argv, kind)
        job(command, overridden)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        if dist.is_available() and dist.is_initialized():
            # Beside others, the interpreter's own end may abort in gloo's threads, and the code would be another.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        sys.exit(2)
