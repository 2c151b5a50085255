"""Which modules, where: by the task and by the memory there is.

    plan = recommend("segment", memory_gb=12, input_size=(3, 512, 512), batch=8, backbone="resnet50")
    print(plan)                # what, why, what it costs, what else there would be
    plan.attach(model)

By memory alone (thresholds of the first of our sources, which gives no reason for them):

    at least 24 GB   full_global_attention                 everything attends to everything, in the two last stages
    at least 12 GB   window_attention_with_global_tokens   a few tokens read the map and are read, in the last three
    less             lightweight_global_modules            one gathered context for all places, in the two last stages

With a backbone the figures of `cost` decide instead: the strongest of the three that fits, with ROOM to spare, and adds
no more than MOST_ADDED of the backbone's arithmetic. On fused attention that is often stronger than the table says.

By task (the same source's table of scenarios):

    small_objects   ppm, large kernels, a P2 level   keeps detail while it widens what is seen
    segment         aspp, non-local, several scales  every pixel is to be understood within the whole image
    classify        a ViT, pretrained with MAE       what the whole image means is what counts
    dense           a Swin with global tokens        between local precision and the whole

A module of the task takes the place of the strategy's. What is no module is said as advice. Early stages get none:
attention over everything blurs detail there (the source's first pitfall), and costs most.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from ssl_global.attention.attach import Attachment, Chosen, attach
from ssl_global.attention.cost import Cost, Precision, Report, cost, named
from ssl_global.attention.places import four_stages

ROOM = 0.1  # of the memory, left to kernels, the allocator and the images: ours
MOST_ADDED = 0.5  # of the backbone's FLOPs: ours


@dataclass(frozen=True)
class Strategy:
    """modules: by stage, counted from the last, -1."""

    name: str
    least_gb: float
    modules: Mapping[int, str]


@dataclass(frozen=True)
class Task:
    modules: Mapping[int, str]
    advice: tuple[str, ...]


STRATEGIES = (
    Strategy("full_global_attention", 24, {-2: "global_attention", -1: "global_attention"}),
    Strategy(
        "window_attention_with_global_tokens", 12, {-3: "global_tokens", -2: "global_tokens", -1: "global_tokens"}
    ),
    Strategy("lightweight_global_modules", 0, {-2: "gca", -1: "gca"}),
)
TASKS = {
    "small_objects": Task(
        {-3: "large_kernel", -1: "ppm"},
        ("give the head the first stage too (P2, stride 4): small objects are gone in later ones",),
    ),
    "segment": Task(
        {-2: "non_local"},
        ("aspp in the head: attention.aspp.pyramid", "train at several scales"),
    ),
    "classify": Task({}, ("a ViT pretrained with MAE is the first choice: pretrain.py --recipe mae",)),
    "dense": Task(
        {-3: "global_tokens", -2: "global_tokens"},
        ("a Swin pretrained with global tokens is the first choice: pretrain.py --recipe dino_swin",),
    ),
}


@dataclass(frozen=True)
class Option:
    strategy: str
    modules: dict[int, str]
    cost: Cost | None = None  # with the backbone; None: none was named
    against: str | None = None  # why it was not taken


@dataclass(frozen=True)
class Recommendation:
    """What was chosen, None where nothing fits, and what it costs. str() of it is what a person would want to read."""

    chosen: Option | None
    report: Report | None  # None: no backbone was named, or nothing fits
    reasons: list[str]
    advice: tuple[str, ...]
    alternatives: list[Option]

    def attach(self, model: nn.Module) -> Attachment:
        if self.chosen is None:
            raise ValueError("; ".join(self.reasons))
        return attach(model, at_stages(model, self.chosen.modules))

    def as_dict(self) -> dict[str, Any]:
        return {
            "chosen": None if self.chosen is None else option_dict(self.chosen),
            "costs": None if self.report is None else self.report.rows(),
            "memory": None if self.report is None else self.report.after.source,
            "reasons": self.reasons,
            "advice": list(self.advice),
            "alternatives": [option_dict(option) for option in self.alternatives],
        }

    def __str__(self) -> str:
        lines = [f"strategy  {self.chosen.strategy if self.chosen else 'none'}"]
        lines += [f"because   {reason}" for reason in self.reasons]
        if self.report:
            lines += ["", str(self.report), ""]
        elif self.chosen:
            lines += [f"modules   {said(self.chosen.modules)}"]
        lines += [f"besides   {advice}" for advice in self.advice]
        for option in self.alternatives:
            needs = f", {option.cost.training_bytes / 1e9:.2f} GB" if option.cost else ""
            why = f"; {option.against}" if option.against else "; fits too" if option.cost else ""
            lines.append(f"instead   {option.strategy}{needs}: {said(option.modules)}{why}")
        return "\n".join(lines)


def recommend(
    task: str,
    memory_gb: float,
    input_size: tuple[int, int, int] | None = None,
    batch: int = 1,
    backbone: nn.Module | str | None = None,
    *,
    precision: Precision = "fp32",
) -> Recommendation:
    """Modules for a task, within the memory of a GPU.

    memory_gb   of 1e9 bytes, for weights, gradients, AdamW's averages and activations
    input_size  (channels, height, width) of the images; by default the backbone's
    backbone    a model, which is left as it is, or the name of one of timm's; without, memory alone decides

    Raises ValueError for a task that is none, and for no memory.
    """
    if task not in TASKS:
        raise ValueError(f"task = {task!r}: one of {', '.join(TASKS)}")
    if not memory_gb > 0:
        raise ValueError(f"memory_gb = {memory_gb}: above 0")
    by_memory = next(s for s in STRATEGIES if memory_gb >= s.least_gb)
    rule = f"with {memory_gb:g} GB the rule by memory alone says {by_memory.name} (at least {by_memory.least_gb:g} GB)"
    options = [Option(s.name, {**s.modules, **TASKS[task].modules}) for s in STRATEGIES]
    if backbone is None:
        chosen = next(option for option in options if option.strategy == by_memory.name)
        reasons = [rule, "name a backbone, the size of the images and the batch, and their cost decides"]
        return Recommendation(chosen, None, reasons, TASKS[task].advice, [o for o in options if o is not chosen])
    if TASKS[task].modules:
        options.append(Option(f"{STRATEGIES[-1].name}, nothing for the task", dict(STRATEGIES[-1].modules)))
    model = named(backbone) if isinstance(backbone, str) else backbone
    weigh = partial(cost, model, input_size, batch, precision=precision)
    bare = weigh()
    options = [weighed(option, model, bare, weigh, memory_gb) for option in options]
    fitting = next((option for option in options if option.against is None), None)
    others = [option for option in options if option is not fitting]
    if fitting is None or fitting.cost is None:
        return Recommendation(None, None, [rule, nothing_fits(bare, memory_gb)], TASKS[task].advice, others)
    with attached_for_now(model, fitting) as attached:
        report = attached.report(input_size, batch, precision=precision)
    figures = (
        f"the figures say {fitting.strategy}: the strongest that fits, {fitting.cost.training_bytes / 1e9:.2f} GB at "
        f"batch {batch}, {fitting.cost.flops / bare.flops - 1:.1%} more arithmetic than the backbone alone"
    )
    return Recommendation(fitting, report, [rule, figures], TASKS[task].advice, others)


@contextmanager
def attached_for_now(model: nn.Module, option: Option) -> Iterator[Attachment]:
    attached = attach(model, at_stages(model, option.modules))
    try:
        yield attached
    finally:
        attached.detach()


def weighed(option: Option, model: nn.Module, bare: Cost, weigh: Callable[[], Cost], memory_gb: float) -> Option:
    """The option with its cost on that backbone, and what is against it."""
    with attached_for_now(model, option):
        after = weigh()
    added = after.flops / bare.flops - 1
    if after.training_bytes > (1 - ROOM) * memory_gb * 1e9:
        return replace(option, cost=after, against=f"too large for {memory_gb:g} GB")
    if added > MOST_ADDED:
        against = f"adds {added:.0%} to the backbone's arithmetic, more than {MOST_ADDED:.0%}"
        return replace(option, cost=after, against=against)
    return replace(option, cost=after)


def nothing_fits(bare: Cost, memory_gb: float) -> str:
    """Weights, gradients and averages stay what they are, activations grow with the batch."""
    needed = f"the backbone alone needs {bare.training_bytes / 1e9:.2f} GB at batch {bare.batch}"
    spare = (1 - ROOM) * memory_gb * 1e9 - (bare.training_bytes - bare.activation_bytes)
    fitting = max(0, int(spare // (bare.activation_bytes / bare.batch)))
    if fitting >= bare.batch:
        return f"{needed}, and there is no room beside it"
    return f"{needed}; batch {fitting} would fit" if fitting else f"{needed}; not even one image would fit"


def at_stages(model: nn.Module, modules: Mapping[int, str]) -> dict[str, Chosen]:
    """By the names of the model's stages; stages that it does not have get nothing.

    Raises ValueError for a model that names no stages.
    """
    stages = four_stages(model)
    if not stages:
        raise ValueError(f"{type(model).__name__}: names no stages (feature_info); attach by the paths of its modules")
    return {stages[stage]: name for stage, name in sorted(modules.items()) if -stage <= len(stages)}


def said(modules: Mapping[int, str]) -> str:
    return ", ".join(f"{name} at stage {stage}" for stage, name in sorted(modules.items()))


def option_dict(option: Option) -> dict[str, Any]:
    costs = {} if option.cost is None else {"cost": option.cost.as_dict()}
    return {"strategy": option.strategy, "modules": option.modules, "against": option.against, **costs}
