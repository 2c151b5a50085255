"""A plan as tables."""

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table

from ssl_global.planning.planner import GB, USABLE, Planned
from ssl_global.planning.small_data import Choice
from ssl_global.training.report import arithmetic


def tables(plan: Planned) -> Iterator[RenderableType]:
    """What is shown, in its order."""
    parts, machine = plan.parts, plan.machine
    yield f"{plan.name} for {plan.images} images on {machine.gpus} GPU{'s' if machine.gpus > 1 else ''}"
    learning = f"{parts.learning / 1e6:.2f} M learn, {parts.heads / 1e6:.2f} M of them in heads or a decoder"
    yield f"parameters {learning}; {parts.fixed / 1e6:.2f} M follow or stay (a teacher, fixed positions)\n"
    yield memory(plan)
    if plan.choices:
        yield choices(plan.choices)
    yield "\n".join(arithmetic(plan.run, plan.recipe))
    yield f"time   {duration(plan.hours)}, {plan.time_by}"
    for warning in plan.warnings:
        yield f"warning: {warning}"


def memory(plan: Planned) -> Table:
    at = plan.run.micro_batch
    table = Table("GB on each GPU", *[one.engine for one in plan.memories], box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        "weights, teacher, buffers": [one.weights for one in plan.memories],
        "gradients": [one.gradients for one in plan.memories],
        "AdamW's two averages": [one.averages for one in plan.memories],
        "gathered, at most": [one.gathered for one in plan.memories],
        f"a step of {at} images, by a dry run": [one.step.bytes(at) for one in plan.memories],
        "together": [one.total(at) for one in plan.memories],
    }
    for name, numbers in rows.items():
        if any(numbers):
            table.add_row(name, *[f"{number / GB:.2f}" for number in numbers])
    most = [str(one.micro_batch or "none fits") for one in plan.memories]
    table.add_row(f"most images at once in {USABLE:.0%} of {plan.machine.vram_gb:g} GB", *most)
    return table


def choices(made: list[Choice]) -> Table:
    table = Table("field", "recipe", "here", "why", box=box.SIMPLE_HEAD)
    for choice in made:
        table.add_row(choice.field, str(choice.recipe), str(choice.value), choice.why)
    return table


def duration(hours: float) -> str:
    if hours < 2:
        return f"{60 * hours:.0f} minutes" if hours >= 1 / 60 else "under a minute"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
