"""A training step, from uint8 views on the host to moved weights, beside the published step and the machine's floor.

    python -m benchmarks step --recipe mae --out mae.json
    python -m benchmarks step --recipe dino --out dino.json
    python -m benchmarks step --recipe mae --precision bf16        # bfloat16 beside float32

Both sides have the recipe's network and the same weights, views and hidden patches, and drop path is off, so loss and
gradient must be the same: to 1e-5 in float32, or nothing is measured. `reference/` has the published steps.

The floor is the time that the step's matrix products alone would take, all of them at the rate of the best: each shape
that occurs is timed by itself, in the same round. No step reaches it: it has no softmax, no norm, no optimizer.
On a CPU with one thread (--threads 1) the process's own time is counted, which others on the machine do not lengthen.
Memory is a step's peak beside weights and the optimizer's averages: of a CPU the resident set, in a process of its
own; of a GPU what torch allocates.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import torch
import tyro
from accelerate import Accelerator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Comparison, alone, report, resident
from benchmarks.reference import dino as published_dino
from benchmarks.reference import mae as published_mae
from benchmarks.reference.vit import Vit
from ssl_global.command_line import find
from ssl_global.data.loader import to_device
from ssl_global.data.views import NO_JITTER, NUM_NUMBERS, ORDER
from ssl_global.encoders.positions import sincos_positions
from ssl_global.encoders.vit import VitConfig
from ssl_global.methods.dino import Dino, DinoConfig
from ssl_global.methods.mae import Mae, MaeConfig
from ssl_global.methods.masking import noise
from ssl_global.methods.method import Batch, Method
from ssl_global.recipe import Recipe
from ssl_global.schedules import Progress, cosine, warmup_cosine
from ssl_global.training import engine
from ssl_global.training.guard import agree
from ssl_global.training.optim import build_optimizer, peak_lr, set_rates

PROGRESS = Progress(step=50_000, num_steps=100_000, steps_per_epoch=1000.0)  # past every warm-up
IMAGES = {"mae": 16, "dino": 8}  # of a step on a CPU; ours
IMAGES_ON_CUDA = 64  # the recipes'
OF_FLOOR, OF_FLOAT32, OF_MEMORY = 0.75, 2.5, 1 / 0.6  # promised, at least; times faster or smaller
SPLIT = "ours, split views"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    recipe: Literal["mae", "dino"] = "mae"
    images: int = 0  # in a step; 0: 16 or 8 on a CPU, 64 on a GPU
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # our blocks, by torch.compile
    split_views: bool = False  # ours with train.split_views only; DINO is measured with and without
    rounds: int = 5
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0  # 0: torch's own
    small: bool = False  # a tiny network: whether it runs
    profile: Path | None = None  # file for the profile of one of our steps, as text
    out: Path | None = None


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m benchmarks step")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    refuse_difference(settings)
    ours = Ours(settings)
    published = Published(settings)
    steps: dict[str, Callable[[], object]] = {"published": published.step, "ours": ours.step}
    if settings.recipe == "dino" and not settings.split_views:
        steps[SPLIT] = Ours(replace(settings, split_views=True)).step
    if settings.precision != "fp32":
        steps["ours, float32"] = Ours(replace(settings, precision="fp32")).step
    for step in steps.values():
        step()  # compiled, its averages made
    shapes, flops = products(ours)
    comparison, rates, own = take_turns(settings, steps, shapes, flops)
    console = Console(width=120)
    console.print(phases(ours, settings))
    rate = median(rates)
    print(
        f"products: {flops / 1e9:.0f} GFLOP a step, at best {rate / 1e9:.0f} GFLOP/s; each at its own rate {own:.2f} s"
    )
    peaks = {name: alone(peak_bytes, name, settings) for name in steps if name != "ours, float32"}
    print("memory of a step: " + ", ".join(f"{name} {peak / 1e6:.0f} MB" for name, peak in peaks.items()))
    bars = {
        f"{settings.recipe}: times as fast as published": (comparison.ratio("ours"), 1.0),
        f"{settings.recipe}: share of the floor": (of_floor(comparison), OF_FLOOR),
        f"{settings.recipe}: times less memory": (peaks["published"] / peaks["ours"], 1.0),
    }
    if SPLIT in steps:
        bars["dino, split views: times as fast as published"] = (comparison.ratio(SPLIT), 1.0)
        bars["dino, split views: times less memory"] = (peaks["published"] / peaks[SPLIT], OF_MEMORY)
    if settings.precision != "fp32":
        bars[f"{settings.recipe}: bfloat16, times as fast as float32"] = (of_float32(comparison), OF_FLOAT32)
        print(f"bfloat16's products are {rate / best_rate(shapes, replace(settings, precision='fp32')):.2f} x as fast")
    report([comparison], bars, settings.out)
    if settings.profile:
        settings.profile.write_text(profiled(ours))


def of_floor(comparison: Comparison) -> float:
    pairs = zip(comparison.seconds["floor"], comparison.seconds["ours"], strict=True)
    return median(floor / ours for floor, ours in pairs)


def of_float32(comparison: Comparison) -> float:
    pairs = zip(comparison.seconds["ours, float32"], comparison.seconds["ours"], strict=True)
    return median(float32 / ours for float32, ours in pairs)


# ------------------------------------------------------------------------------------------------- what both are given


def recipe_of(settings: Settings) -> Recipe:
    recipe = find(settings.recipe)[2]()
    assert isinstance(recipe.encoder, VitConfig)
    encoder = replace(recipe.encoder, drop_path=0.0)
    train = replace(
        recipe.train, precision=settings.precision, compile=settings.compile, split_views=settings.split_views
    )
    if not settings.small:
        return replace(recipe, encoder=encoder, train=train)
    small: dict[str, Any] = {"mae": {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4},
             "dino": {"prototypes": 256, "head_hidden": 64, "head_bottleneck": 32}}[settings.recipe]  # fmt: skip
    views = replace(recipe.views, globals=replace(recipe.views.globals, pixels=64))
    if views.locals.count:
        views = replace(views, locals=replace(views.locals, pixels=32))
    method = replace(recipe.method, **small)
    encoder = replace(encoder, width=48, depth=2, heads=3)
    return replace(recipe, encoder=encoder, train=train, views=views, method=method)


def images_of(settings: Settings) -> int:
    return settings.images or (IMAGES[settings.recipe] if settings.device == "cpu" else IMAGES_ON_CUDA)


def loaded(recipe: Recipe, images: int) -> dict[str, Any]:
    """A batch as the loader gives it: uint8 views on the host; no colour is changed, which is the data's work."""
    generator = torch.Generator().manual_seed(0)
    crops, colours = [], []
    for kind in recipe.views.groups().values():
        size = (images, kind.count, recipe.data.channels, kind.pixels, kind.pixels)
        crops.append(torch.randint(0, 256, size, dtype=torch.uint8, generator=generator))
        colours.append(torch.zeros(images, kind.count, NUM_NUMBERS))
        colours[-1][..., ORDER] = NO_JITTER
    return {
        "crops": crops, "colours": colours, "seed": torch.arange(images), "key": [""] * images,
        "label": torch.full((images,), -1),
    }  # fmt: skip


def method_of(recipe: Recipe) -> Method:
    torch.manual_seed(0)
    return recipe.method.build(recipe)


# ---------------------------------------------------------------------------------------------------------------- ours


class Ours:
    """One step of training/loop.py, with its own functions, in its order."""

    def __init__(self, settings: Settings) -> None:
        self.recipe = recipe_of(settings)
        precision = {"fp32": "no"}.get(settings.precision, settings.precision)
        self.accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision=precision)
        self.method = method_of(self.recipe)
        optimizer = build_optimizer(self.method, self.recipe.optim)
        self.model, self.optimizer = engine.prepare(self.accelerator, self.method, optimizer, self.recipe)
        self.loaded = loaded(self.recipe, images_of(settings))

    def step(self, watch: "Watch | None" = None) -> Tensor:
        recipe, accelerator = self.recipe, self.accelerator
        at = watch.at if watch else (lambda phase: None)
        at("views")
        set_rates(self.optimizer, recipe.optim, recipe.train.global_batch, PROGRESS)
        self.method.begin_step(PROGRESS)
        losses = []
        for batch in self.pieces():
            at("forward")
            with engine.precision(accelerator, recipe):
                loss = self.model(batch, PROGRESS)["loss"]
            at("backward")
            accelerator.backward(loss)
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        at("norm, clipping, agreeing")
        self.method.gradients_done(PROGRESS)
        norm = engine.clip(accelerator, self.optimizer, recipe.optim.clip_norm)
        agree(loss, norm, stop=False, bad_samples=False)
        at("optimizer")
        self.optimizer.step()
        at("moving averages")
        self.method.after_step(PROGRESS)
        self.optimizer.zero_grad()
        at("")
        return loss

    def pieces(self) -> list[Batch]:
        return self.method.pieces(cast(Batch, to_device(self.loaded, self.recipe, self.accelerator.device)))

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        self.method.begin_step(PROGRESS)
        losses = []
        for batch in self.pieces():
            losses.append(self.model(batch, PROGRESS)["loss"])
            losses[-1].backward()
        loss = torch.stack(losses).sum()
        found = {name: p.grad for name, p in self.method.named_parameters() if p.grad is not None}
        return loss.detach(), found


class Watch:
    """Seconds of each phase of a step."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.phase, self.began = settings, "", 0.0
        self.seconds: dict[str, float] = {}

    def at(self, phase: str) -> None:
        synchronise(self.settings.device)
        now = clock(self.settings)
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.began
        self.phase, self.began = phase, now


def clock(settings: Settings) -> float:
    alone = settings.device == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------- the published


class Published:
    """Its step, in the authors' order, with the weights that ours begins with."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.recipe = settings, recipe_of(settings)
        self.device = torch.device(settings.device)
        self.loaded = loaded(self.recipe, images_of(settings))
        method = method_of(self.recipe)
        if isinstance(method, Mae):
            self.model: nn.Module = self.mae_of(method).to(self.device)
        else:
            assert isinstance(method, Dino)
            self.model = self.dino_of(method).to(self.device)
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
            config = method.config
            self.loss = published_dino.Loss(
                config.prototypes, num_views=self.num_views, student_temp=config.student_temp,
                teacher_temp=config.teacher_temp[1],
            ).to(self.device)  # fmt: skip
        learning = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in learning if (p.ndim > 1) == decays]} for decays in (1, 0)
        ]
        self.optimizer = AdamW(groups, lr=0.0, betas=self.recipe.optim.betas, foreach=False, fused=False)

    @property
    def num_views(self) -> int:
        return self.recipe.views.globals.count + self.recipe.views.locals.count

    def vit(self, encoder: Any) -> Vit:
        timm: Any = encoder.model
        return Vit(
            pixels=encoder.pixels, patch=encoder.patch, channels=encoder.channels, width=encoder.width,
            depth=len(timm.blocks), heads=timm.blocks[0].attn.num_heads,
        )  # fmt: skip

    def mae_of(self, method: Mae) -> published_mae.Mae:
        config, encoder = method.config, method.encoder
        decoder = published_mae.Decoder(
            encoder.width, width=config.decoder_width, depth=config.decoder_depth, heads=config.decoder_heads,
            outputs=encoder.patch**2 * encoder.channels,
        )  # fmt: skip
        side = encoder.pixels // encoder.patch
        positions = sincos_positions((side, side), config.decoder_width)
        positions = torch.cat([torch.zeros(1, config.decoder_width), positions])[None]
        model = published_mae.Mae(self.vit(encoder), decoder, positions)
        own = {name.replace("encoder.model.", "encoder."): value for name, value in method.state_dict().items()}
        model.load_state_dict(own | {"decoder_positions": positions})
        return model

    def dino_of(self, method: Dino) -> published_dino.MultiCrop:
        config, student = method.config, method.student
        head = published_dino.Head(
            student.encoder.width, hidden=config.head_hidden, bottleneck=config.head_bottleneck,
            prototypes=config.prototypes,
        )  # fmt: skip
        model = published_dino.MultiCrop(self.vit(student.encoder), head)
        own = {published_name(name): value for name, value in student.state_dict().items()}
        missing, unexpected = model.load_state_dict(own, strict=False)
        assert (missing, unexpected) == (["head.prototypes.parametrizations.weight.original0"], [])
        return model

    def views(self) -> list[Tensor]:
        """Each image to float32 and normalised on the host, one by one; then stacked, and brought to the device."""
        mean, std = (torch.tensor(value)[:, None, None] for value in self.recipe.data.normalisation)
        views = []
        for crops in self.loaded["crops"]:
            for view in crops.unbind(1):
                images = [image.float().div(255).sub(mean).div(std) for image in view]
                views.append(torch.stack(images).to(self.device, non_blocking=True))
        return views

    def forward(self) -> Tensor:
        views = self.views()
        if isinstance(self.model, published_mae.Mae):
            assert isinstance(self.recipe.method, MaeConfig)
            noise_BN = noise(self.loaded["seed"].to(self.device), (views[0].shape[2] // self.model.encoder.patch) ** 2)
            loss: Tensor = self.model(views[0], noise_BN, self.recipe.method.mask_ratio)
            return loss
        teacher = self.teacher(views[: self.recipe.views.globals.count])
        loss = self.loss(self.model(views), teacher)
        return loss

    def step(self) -> Tensor:
        self.set_rates()
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            loss = self.forward()
        if not torch.isfinite(torch.tensor(loss.item())):
            raise RuntimeError("the published step's loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        learning = [p for p in self.model.parameters() if p.requires_grad]
        if isinstance(self.model, published_mae.Mae):
            published_mae.gradient_norm(learning)
        else:
            assert self.recipe.optim.clip_norm is not None
            published_dino.clip_each(self.model, self.recipe.optim.clip_norm)
        self.optimizer.step()
        if not isinstance(self.model, published_mae.Mae):
            assert isinstance(self.recipe.method, DinoConfig)
            momentum = cosine(*self.recipe.method.teacher_momentum, PROGRESS.share)
            published_dino.move_teacher(self.teacher, self.model, momentum)
        synchronise(self.settings.device)
        return loss.detach()

    def set_rates(self) -> None:
        optim = self.recipe.optim
        peak = peak_lr(optim, self.recipe.train.global_batch)
        lr = warmup_cosine(peak, optim.lr_end, warmup_epochs=optim.warmup_epochs, progress=PROGRESS)
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = lr
            group["weight_decay"] = cosine(*optim.weight_decay, PROGRESS.share) if number == 0 else 0.0

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.forward()
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def published_name(name: str) -> str:
    """Of a student's tensor."""
    if name == "head.prototypes.weight":
        return "head.prototypes.parametrizations.weight.original1"
    return name.replace("encoder.model.", "encoder.")


def refuse_difference(settings: Settings) -> None:
    """Loss and gradient in float32, at the size that is measured; of DINO with split views too."""
    settings = replace(settings, precision="fp32", compile=False)
    if settings.recipe == "dino" and not settings.split_views:
        refuse_difference(replace(settings, split_views=True))
    (loss, ours), (wanted, published) = Ours(settings).gradients(), Published(settings).gradients()
    distance, length = 0.0, 0.0
    renamed = {published_name(name.removeprefix("student.")): gradient for name, gradient in ours.items()}
    assert renamed.keys() == published.keys()
    for name, gradient in published.items():
        distance += (renamed[name] - gradient).double().square().sum().item()
        length += gradient.double().square().sum().item()
    apart = (distance / length) ** 0.5
    print(f"loss {loss.item():.7f}, published {wanted.item():.7f}; gradients {apart:.1e} of their length apart")
    if not torch.isclose(loss, wanted, rtol=1e-5) or apart > 1e-5:
        raise RuntimeError("ours is not the published step")


# ----------------------------------------------------------------------------------------------------------- the floor


class Shapes(TorchDispatchMode):
    """The shapes of all plain matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.found[(left.shape[0], left.shape[1], right.shape[1])] += 1
        return func(*args, **(kwargs or {}))


def products(ours: Ours) -> tuple[Counter[tuple[int, int, int]], int]:
    """Of a step: the shapes of its products, and the FLOPs of all of them, attention's and convolutions' too."""
    with Shapes() as shapes:
        ours.step()
    with FlopCounterMode(display=False) as counter:
        ours.step()
    return shapes.found, counter.get_total_flops()


def rate_of(shape: tuple[int, int, int], settings: Settings) -> float:
    """FLOP/s, the best of three each way that a linear layer lays it out."""
    m, k, n = shape
    dtype = DTYPES[settings.precision]
    left, right = (torch.randn(size, device=settings.device).to(dtype) for size in ((m, k), (k, n)))
    seconds = []
    for second in (right, right.t().contiguous().t()):
        for _ in range(3):
            synchronise(settings.device)
            begin = clock(settings)
            left @ second
            synchronise(settings.device)
            seconds.append(clock(settings) - begin)
    return 2 * m * k * n / min(seconds)


def best_rate(shapes: Counter[tuple[int, int, int]], settings: Settings) -> float:
    return max(rate_of(shape, settings) for shape in shapes)


def take_turns(
    settings: Settings, steps: dict[str, Callable[[], object]], shapes: Counter[tuple[int, int, int]], flops: int
) -> tuple[Comparison, list[float], float]:
    """Rounds of each step and of the products by themselves: seconds an image; best rates; seconds at own rates."""
    names, images = [*steps, "floor"], images_of(settings)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates, own = [], []
    for turn in range(settings.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == "floor":
                each = {shape: rate_of(shape, settings) for shape in shapes}
                rates.append(max(each.values()))
                seconds[name].append(flops / rates[-1] / images)
                of_mm = {shape: 2 * shape[0] * shape[1] * shape[2] * times for shape, times in shapes.items()}
                others = flops - sum(of_mm.values())
                own.append(sum(of_mm[shape] / each[shape] for shape in of_mm) + others / rates[-1])
                continue
            synchronise(settings.device)
            begin = clock(settings)
            steps[name]()
            synchronise(settings.device)
            seconds[name].append((clock(settings) - begin) / images)
    title = f"{settings.recipe}, a step of {images} images in {settings.precision}, an image"
    return Comparison(title, "published", seconds), rates, median(own)


def phases(ours: Ours, settings: Settings) -> Table:
    watch = Watch(settings)
    for _ in range(settings.rounds):
        ours.step(watch)
    table = Table("phase of a step", "seconds", "share", title="ours", box=SIMPLE_HEAD)
    total = sum(watch.seconds.values())
    for phase, seconds in watch.seconds.items():
        table.add_row(phase, f"{seconds / settings.rounds:.3f}", f"{seconds / total:.1%}")
    return table


def profiled(ours: Ours) -> str:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        ours.step()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=60)


# -------------------------------------------------------------------------------------------------------------- memory


def peak_bytes(name: str, settings: Settings) -> int:
    """Beside weights, teacher and the optimizer's averages."""
    kind = Published if name == "published" else Ours
    settings = replace(settings, split_views=settings.split_views or name == SPLIT)
    make = partial(kind, settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    kind(replace(settings, small=True, images=2)).step()  # what torch brings with its first step
    before = resident("VmRSS")
    side = make()
    if settings.device == "cuda":
        side.step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step()
        return torch.cuda.max_memory_allocated() - before
    side.step()
    modules = [side.method] if isinstance(side, Ours) else [side.model, getattr(side, "teacher", nn.Module())]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    averages = [t for state in side.optimizer.state.values() for t in state.values()]
    return resident("VmHWM") - before - sum(t.numel() * t.element_size() for t in [*tensors, *averages])


if __name__ == "__main__":
    main()
