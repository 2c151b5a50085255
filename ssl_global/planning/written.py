"""A plan as a recipe file: the recipe that it began from, with the chosen fields replaced, each with its reason."""

import shlex
from pathlib import Path

from ssl_global.command_line import find, recipe_files
from ssl_global.encoders.pretrained import PretrainedConfig
from ssl_global.errors import UserError
from ssl_global.planning.planner import Planned
from ssl_global.planning.small_data import Choice
from ssl_global.recipe import Recipe

HEAD = '''"""{name} for {images} images on {gpus} x {vram:g} GB, as `ssl-global plan` has it.

    accelerate launch {script} --recipe {file} --data DATA --val LABELLED

Expect   unmeasured. By the plan {steps} steps.
Numbers  those of {name}, but for the fields below.
"""

from dataclasses import replace

from ssl_global.command_line import find


def recipe():
    _, _, base = find("{spec}")
    recipe = base()
'''
DEMO = '''

def demo():
    """On the built-in sample, as the base recipe has it: nothing of the above."""
    _, _, base = find("{spec}")
    return base()
'''


def write(plan: Planned, file: Path, *, overwrite: bool) -> None:
    """Raises UserError where a file is already, or none can be written."""
    if file.suffix != ".py":
        raise UserError(f"--write {file}: the name of a .py file would be right")
    try:
        with file.open("w" if overwrite else "x") as written:
            written.write(text(plan, file))
    except FileExistsError:
        raise UserError(f"--write {file}: is there already; --overwrite replaces it") from None
    except OSError as error:
        raise UserError(f"--write {file}: {error.strerror or error}") from error


def text(plan: Planned, file: Path) -> str:
    base, _, function = plan.name.partition(":")
    # One of ours by its name, which is there wherever ssl_global is; another by its place.
    named = base if plan.file == recipe_files().get(base) else str(plan.file.resolve())
    tuned = isinstance(plan.base.encoder, PretrainedConfig)
    path = str(file) if file.is_absolute() or len(file.parts) > 1 else f"./{file}"
    head = HEAD.format(
        name=plan.name, images=plan.images, gpus=plan.machine.gpus, vram=plan.machine.vram_gb, file=shlex.quote(path),
        script="finetune.py" if tuned else "pretrain.py", steps=plan.run.num_steps, spec=f"{named}:{function}",
    )  # fmt: skip
    demo = DEMO.format(spec=f"{named}:demo") if has_demo(named) else ""
    return head + replaced(plan.choices) + demo


def replaced(choices: list[Choice]) -> str:
    """The fields, part by part."""
    if not choices:
        return "    return recipe\n"
    lines = ["    return replace(", "        recipe,"]
    for part in dict.fromkeys(choice.field.partition(".")[0] for choice in choices):
        lines += [f"        {part}=replace(", f"            recipe.{part},"]
        for choice in choices:
            of, _, name = choice.field.partition(".")
            if of == part:
                lines.append(f"            # {choice.recipe} there; {choice.why}")
                lines.append(f"            {name}={choice.value!r},")
        lines.append("        ),")
    return "\n".join([*lines, "    )", ""])


def has_demo(named: str) -> bool:
    try:
        _, _, build = find(f"{named}:demo")
    except UserError:
        return False
    return isinstance(build(), Recipe)
