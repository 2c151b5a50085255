"""What a recipe needs for so many images on so many GPUs: memory, batch, steps, time.

    plan("dino", Machine(gpus=1, vram_gb=24), images=40_000)

Memory of a GPU, in what is replicated (DDP) and what is sharded (FSDP2):

    weights, gradients, AdamW's two averages    4 bytes each; a process's part of them under FSDP2
    gathered (FSDP2)                            all that is in no block, two blocks, and the former's gradients, at most
    the step                                    views, activations and what comes and goes, by a dry run (dry_run.py)

Time is arithmetic: FLOPs of the dry run over what the GPUs do of their peak. It does not know of data that comes late
(`ssl-global doctor` does), nor of evaluations.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ssl_global.command_line import find
from ssl_global.errors import UserError
from ssl_global.planning.dry_run import Parts, Step, dry_run, width_of
from ssl_global.planning.small_data import Choice, adapted, changed
from ssl_global.recipe import Recipe
from ssl_global.training.plan import Plan, images_together, parts_of, plan_run

GB = 1e9
USABLE = 0.9  # of a GPU's memory (ours): the rest is CUDA's context, libraries' workspaces, and what lies in pieces
WEIGHT = 4  # bytes

Gpu = Literal["v100", "t4", "a100", "rtx3090", "l4", "rtx4090", "h100"]
# Peak TFLOPS of dense matrix products in (bf16 or fp16 with sums in float32, fp32), by NVIDIA's data sheets and, of the
# RTX, its whitepapers on GA102 and Ada. What does twice that with sparse weights does not here.
PEAKS: dict[Gpu, tuple[float, float]] = {
    "v100": (125, 15.7), "t4": (65, 8.1), "a100": (312, 19.5), "rtx3090": (71, 35.6), "l4": (121, 30.3),
    "rtx4090": (165, 82.6), "h100": (989, 67),
}  # fmt: skip
WITHOUT_BF16 = ("v100", "t4")
# Of the peak (ours). Published times come to 0.10 of a V100's (DINO ViT-S/16, 1.75 days on 8; MAE ViT-L/16, 42 hours on
# 64) and to 0.45 of an A100's (DINOv2 ViT-L/16, a day on 32, its losses over patches not counted).
UTILISATION = 0.3
CLASSES = {"ClassifyConfig": 1000, "SegmentConfig": 150}  # where the data will say: ImageNet-1k's, ADE20K's


@dataclass(frozen=True, kw_only=True)
class Machine:
    gpus: int = 1
    vram_gb: float = 24.0  # of each, in 10^9 bytes
    gpu: Gpu = "a100"
    tflops: float | None = None  # its peak; None: as the data sheet of `gpu` says
    utilisation: float = UTILISATION
    images_per_second: float | None = None  # of all GPUs together, measured; then nothing is reckoned

    def check(self) -> None:
        for name in ("gpus", "vram_gb", "tflops", "utilisation", "images_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{said(name)} {value}: above 0")
        if self.utilisation > 1:
            raise UserError(f"--utilisation {self.utilisation}: a share of the peak, at most 1")


def said(field: str) -> str:
    return "--" + {"vram_gb": "vram"}.get(field, field).replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU."""

    engine: str  # "DDP", "FSDP2", "one process"
    weights: int  # the teacher's and buffers too
    gradients: int
    averages: int
    gathered: int
    step: Step  # at work
    micro_batch: int | None = None  # the largest that fits; None: none does

    def kept(self) -> int:
        return self.weights + self.gradients + self.averages + self.gathered

    def total(self, micro_batch: int) -> int:
        return self.kept() + self.step.bytes(micro_batch)


@dataclass(frozen=True, kw_only=True)
class Planned:
    name: str  # of the recipe: "dino:recipe"
    file: Path
    base: Recipe
    recipe: Recipe  # with the choices
    choices: list[Choice]
    machine: Machine
    images: int
    parts: Parts
    step: Step
    memories: list[Memory]
    run: Plan
    hours: float
    time_by: str  # how the hours came about, in words
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For a file: numbers in bytes, hours, images."""
        run, chosen = self.run, self.run.micro_batch
        return {
            "recipe": self.name,
            "images": self.images,
            "gpus": self.machine.gpus,
            "parameters": {"learning": self.parts.learning, "heads": self.parts.heads, "fixed": self.parts.fixed},
            "memory": [
                {
                    "engine": memory.engine, "weights": memory.weights, "gradients": memory.gradients,
                    "averages": memory.averages, "gathered": memory.gathered, "step": memory.step.bytes(chosen),
                    "total": memory.total(chosen), "largest_micro_batch": memory.micro_batch,
                }
                for memory in self.memories
            ],
            "micro_batch": chosen,
            "accumulate": run.accumulate,
            "global_batch": run.global_batch,
            "steps": run.num_steps,
            "epochs": run.num_steps / run.steps_per_epoch,
            "flops_each_image": self.step.flops_each,
            "hours": self.hours,
            "time_by": self.time_by,
            "choices": [vars(choice) for choice in self.choices],
            "warnings": self.warnings,
        }  # fmt: skip


def plan(spec: str, machine: Machine, *, images: int, classes: int | None = None, as_it_is: bool = False) -> Planned:
    """Of the recipe of that name or file. Raises UserError.

    classes   that a fine-tuned model is to tell apart
    as_it_is  without what is chosen for few images
    """
    if images < 1:
        raise UserError(f"--images {images}: at least 1")
    machine.check()
    file, function, build = find(spec)
    base = build()
    if not isinstance(base, Recipe):
        raise UserError(f"--recipe {spec}: {function}() returns a {type(base).__name__}; a Recipe would be right")
    base.check()
    recipe, choices = (base, []) if as_it_is else adapted(base, images, machine.gpus)
    recipe.check()
    run = plan_run(recipe, num_images=images, num_processes=machine.gpus)
    peak = peak_of(machine, recipe.train.precision)
    parts, step = dry_run(with_classes(recipe, classes))
    share, together = run.global_batch // machine.gpus, images_together(recipe)
    memories = [replicated(parts, step, machine.gpus)]
    if machine.gpus > 1:
        memories.append(sharded(parts, step, machine.gpus, recipe.train.precision))
    memories = [replace(one, micro_batch=fitting(one, share, together, machine.vram_gb * GB)) for one in memories]
    found = next((memory.micro_batch for memory in memories if memory.micro_batch), None)
    least = list(parts_of(share, at_most=share, multiple_of=together))[-1]
    chosen = changed(recipe, {"train.micro_batch": found or least})
    if not as_it_is or recipe.train.micro_batch == "auto":
        run = plan_run(chosen, num_images=images, num_processes=machine.gpus)
    if not as_it_is and chosen != recipe:
        why = f"the largest that fits {machine.vram_gb:g} GB, by a dry run" if found else "the least that there is"
        choices = [*choices, Choice("train.micro_batch", recipe.train.micro_batch, found or least, why)]
        recipe = chosen
    hours, time_by = time_of(run, step, machine, peak)
    return Planned(
        name=f"{file.stem}:{function}", file=file, base=base, recipe=recipe, choices=choices, machine=machine,
        images=images, parts=parts, step=step, memories=memories, run=run, hours=hours, time_by=time_by,
        warnings=warnings(recipe, memories, least, run, machine),
    )  # fmt: skip


def with_classes(recipe: Recipe, classes: int | None) -> Recipe:
    """With as many classes as the data will have, or as the paper's has."""
    method = recipe.method
    usual = CLASSES.get(type(method).__name__)
    if usual is None:
        if classes is not None:
            raise UserError(f"--classes {classes}: this recipe's method tells no classes apart")
        return recipe
    if classes is not None and classes < 2:
        raise UserError(f"--classes {classes}: at least 2")
    named: Any = {"classes": tuple(map(str, range(classes or usual)))}
    return replace(recipe, method=replace(method, **named)) if classes or not vars(method)["classes"] else recipe


# -------------------------------------------------------------------------------------------------------------- memory


def replicated(parts: Parts, step: Step, gpus: int) -> Memory:
    return Memory(
        engine="DDP" if gpus > 1 else "one process",
        weights=WEIGHT * (parts.learning + parts.fixed + parts.buffers),
        gradients=WEIGHT * parts.learning,  # DDP's buckets are the gradients themselves
        averages=2 * WEIGHT * parts.learning,
        gathered=0,
        step=step,
    )


def sharded(parts: Parts, step: Step, gpus: int, precision: str) -> Memory:
    in_no_block = parts.learning + parts.fixed - parts.blocks
    travelling, part = width_of(precision), WEIGHT / gpus
    return Memory(
        engine="FSDP2",
        weights=round(part * (parts.learning + parts.fixed)) + WEIGHT * parts.buffers,
        gradients=round(part * parts.learning),
        averages=round(2 * part * parts.learning),
        gathered=travelling * (in_no_block + 2 * parts.largest_block) + (travelling + WEIGHT) * in_no_block,
        step=replace(step, fixed_bytes=step.fixed_bytes - step.cast_bytes),  # what is gathered is cast already
    )


def fitting(memory: Memory, share: int, together: int, vram: float) -> int | None:
    candidates = parts_of(share, at_most=share, multiple_of=together)
    return next((number for number in candidates if memory.total(number) <= USABLE * vram), None)


def warnings(recipe: Recipe, memories: list[Memory], least: int, run: Plan, machine: Machine) -> list[str]:
    said_so = []
    lacking = [memory.engine for memory in memories if memory.micro_batch is None]
    if lacking:
        needs = min(memory.total(least) for memory in memories) / GB / USABLE
        help_ = "" if recipe.train.recompute_activations else "; train.recompute_activations takes less"
        said_so.append(
            f"{' and '.join(lacking)}: {machine.vram_gb:g} GB are too few for {least} at once, the least that there is"
            + (f"; {needs:.1f} would do{help_}" if len(lacking) == len(memories) else "")
        )
    if run.steps_per_epoch < 1:
        said_so.append(f"a step takes {run.global_batch} images, more than there are: it sees some of them twice")
    return said_so


# ---------------------------------------------------------------------------------------------------------------- time


def peak_of(machine: Machine, precision: str) -> float:
    """TFLOPS of one GPU."""
    if machine.tflops is not None:
        return machine.tflops
    if precision == "bf16" and machine.gpu in WITHOUT_BF16:
        raise UserError(
            f"--gpu {machine.gpu}: has no bf16, which this recipe's train.precision is; fp16 would be right"
        )
    half, single = PEAKS[machine.gpu]
    return single if precision == "fp32" else half


def time_of(run: Plan, step: Step, machine: Machine, peak: float) -> tuple[float, str]:
    seen = run.num_steps * run.global_batch
    if machine.images_per_second is not None:
        return seen / machine.images_per_second / 3600, f"measured: {machine.images_per_second:g} images a second"
    rate = machine.gpus * peak * 1e12 * machine.utilisation
    by = f"reckoned: {step.flops_each / 1e9:.1f} GFLOPs an image at {machine.utilisation:g} of {peak:g} TFLOPS"
    source = "" if machine.tflops else f" ({machine.gpu}, its data sheet)"
    return seen * step.flops_each / rate / 3600, f"{by}{source}, {rate / step.flops_each:.0f} images a second"
