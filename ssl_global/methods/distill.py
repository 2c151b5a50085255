"""Distilling: small students learn to say what a frozen, big teacher says. No labels, and no head of the teacher's.

Three terms for each student, each with its weight:

    summary   its projected summary of a global view, against the teacher's summary of that very view
    patches   its projected patches, resampled to the teacher's grid, against the teacher's patches
    dino      multi-crop with DINO's loss: from each view it foretells to which prototypes the teacher's summary of
              another, global view belongs (Caron et al. 2021, https://arxiv.org/abs/2104.14294)

The first two compare features on the same crop, as Beyer et al. 2021 advise ("patient and consistent",
https://arxiv.org/abs/2106.05237), each of the teacher's features less its mean over the data, over its deviation there
(`Standard`; Ranzinger et al. 2024, https://arxiv.org/abs/2410.01680, compare ways). Most of a teacher's feature vector
is the same for all images: with each vector normalised by itself instead, the demo's student was right to 97 % of the
variance and had learnt little. The third term teaches local views.

Whose prototypes? DINOv2 and DINOv3 keep the teacher's own head for this (https://arxiv.org/abs/2304.07193, section 5);
backbones that are published, and our exports, have none. So the prototypes are learnt here: the student has a head over
its summary, projected to the teacher's width, and a copy of that head, which only follows it as DINO's teacher does, is
asked about the teacher's summaries. Its answers are centred and sharpened. What the prototypes tell apart is thus the
teacher's features, which never move, and the head alone has to be kept from saying the same of all. A queue of the
teacher's features in the prototypes' place (SEED, Fang et al. 2021, https://arxiv.org/abs/2101.04731; lightly-train's
first version) would be state that depends on the number of processes; feature matching alone (its second one) teaches
nothing of local views.

Several students learn in one run and share the teacher's pass; they share nothing else but the length of the gradient
that is clipped.

The teacher is in no checkpoint: it is read anew at every start (`fetch`), and refused if its tensors are not those that
the run was begun with, by their hash in the recipe. Not as in DINOv2: what is exported is the student itself, not its
moving average.

Letters, in this file only:

    B  images on this process     G  global views     V  all views     M  G * B     K  prototypes
    N  patches of the teacher     D  a width
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder, Tokens
from ssl_global.encoders.pretrained import PretrainedConfig, of_backbone, said_by
from ssl_global.encoders.timm_model import TimmConfig, TimmModel
from ssl_global.errors import UserError, wrong
from ssl_global.methods.dino_loss import dino_loss
from ssl_global.methods.heads import PrototypeHead
from ssl_global.methods.method import Batch, Method
from ssl_global.methods.multi_crop import tokens_of
from ssl_global.methods.teacher import Centre, follow, log_probabilities, move_teacher
from ssl_global.recipe import MethodConfig, Recipe, in_range
from ssl_global.schedules import Progress, cosine

EPSILON = 1e-6  # of a variance (ours): a feature that is always the same stays 0
TEACHER = "teacher."  # what the names of the teacher's tensors begin with


@dataclass(frozen=True, kw_only=True)
class DistillConfig(MethodConfig):
    teacher: str = ""  # an export's or a run's folder, or a timm name with its .tag
    students: tuple[str, ...] = ()  # more students beside the encoder: timm names, untrained (resnet18, convnext_atto)
    summary_weight: float = 1.0  # of matching the teacher's summary of a global view
    patch_weight: float = 1.0  # of matching its patches
    dino_weight: float = 1.0  # of foretelling its prototypes from other views
    prototypes: int = 65_536  # K, outputs of a student's head
    head_hidden: int = 2048  # width of the head's two hidden layers
    head_bottleneck: int = 256  # width that the prototypes live in
    student_temp: float = 0.1  # divides the student's logits
    teacher_temp: float = 0.04  # divides the logits of the teacher's summaries
    head_momentum: tuple[float, float] = (0.996, 1.0)  # of the head that follows; at the first and the last step
    centre_momentum: float = 0.9  # of the mean logit of the teacher's summaries
    teacher_widths: tuple[int, int] = (0, 0)  # of its summary and its patches: from the teacher
    teacher_hash: str = ""  # SHA-256 of its tensors: from the teacher

    def check(self, recipe: Recipe) -> None:
        if not self.teacher:
            raise wrong("method.teacher", "''", "an export's or a run's folder, or a timm name with its .tag")
        for name in ("summary_weight", "patch_weight", "dino_weight"):
            if getattr(self, name) < 0:
                raise wrong(f"method.{name}", getattr(self, name), "0 (none) or more")
        if not (self.summary_weight or self.dino_weight):
            raise wrong("method.summary_weight", self.summary_weight, "above 0, or method.dino_weight: one is exported")
        for name, least in (("prototypes", 2), ("head_hidden", 1), ("head_bottleneck", 1)):
            if getattr(self, name) < least:
                raise wrong(f"method.{name}", getattr(self, name), f"at least {least}")
        for name in ("student_temp", "teacher_temp"):
            if getattr(self, name) <= 0:
                raise wrong(f"method.{name}", getattr(self, name), "above 0; DINO's are 0.1 and 0.04")
        for momentum in (*self.head_momentum, self.centre_momentum):
            in_range("method.head_momentum, method.centre_momentum", momentum, 0, 1)
        if self.dino_weight and recipe.views.globals.count + recipe.views.locals.count < 2:
            raise wrong("views.globals.count", recipe.views.globals.count, "at least 2 views for method.dino_weight")
        self.check_students(recipe)

    def check_students(self, recipe: Recipe) -> None:
        for name in self.students:
            if "." in name or not timm.is_model(name) or self.students.count(name) > 1:
                raise wrong("method.students", self.students, f"{name}: names of timm without a .tag, each once")
            try:
                TimmConfig(name=name).check(recipe)
            except UserError as error:
                raise UserError(f"method.students = {name}: {error}") from error

    def settled(self, recipe: Recipe) -> "DistillConfig":
        teacher = read_teacher(self, recipe)
        refuse_size(teacher, recipe)
        widths = (teacher.encoder.width, teacher.encoder.patch_width)
        return replace(self, teacher_widths=widths, teacher_hash=hash_of(teacher.encoder))

    def build(self, recipe: Recipe) -> "Distill":
        students = {"student": recipe.encoder.build(recipe)}
        students |= {name: TimmConfig(name=name).build(recipe) for name in self.students}
        return Distill(self, students, num_global_views=recipe.views.globals.count)


class Distill(Method):
    def __init__(self, config: DistillConfig, students: dict[str, Encoder], *, num_global_views: int) -> None:
        super().__init__()
        self.config = config
        self.num_global_views = num_global_views
        self.students = nn.ModuleDict({name: Student(encoder, config) for name, encoder in students.items()})
        self.summary_standard, self.patch_standard = (Standard(width) for width in config.teacher_widths)
        self.teacher: Teacher | None = None  # until `fetch`
        self.register_state_dict_post_hook(without_teacher)

    def parts(self) -> Iterator[tuple[str, "Student"]]:
        for name, student in self.students.items():
            assert isinstance(student, Student)
            yield name, student

    def fetch(self, recipe: Recipe) -> None:
        """Reads the teacher. Raises UserError if it cannot be had, or is another than the run was begun with."""
        teacher = read_teacher(self.config, recipe)
        if (found := hash_of(teacher.encoder)) != self.config.teacher_hash:
            raise UserError(
                f"method.teacher = {self.config.teacher}: not the weights that this run was begun with "
                f"(hash {found[:12]}, then {self.config.teacher_hash[:12]})"
            )
        self.teacher = teacher

    def train(self, mode: bool = True) -> "Distill":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def begin_step(self, progress: Progress) -> None:
        for standard in (self.summary_standard, self.patch_standard):
            standard.begin_step()
        for _, student in self.parts():
            student.begin_step()

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        assert self.teacher is not None, "fetch() comes first"
        views = batch["views"]
        with torch.no_grad():
            tokens = self.teacher(torch.cat(views[: self.num_global_views]))
            taught = Taught(self.summary_standard(tokens.summary), self.patch_standard(tokens.patches), tokens.grid)
        losses: list[Tensor] = []
        figures: dict[str, Tensor] = {}
        for name, student in self.parts():
            loss, said = student(views, taught, self.num_global_views)
            losses.append(loss)
            figures |= {f"{name}_{figure}": value for figure, value in said.items()}
        return {"loss": torch.stack(losses).mean(), **figures}

    def after_step(self, progress: Progress) -> None:
        for standard in (self.summary_standard, self.patch_standard):
            standard.move()
        for _, student in self.parts():
            student.after_step(cosine(*self.config.head_momentum, progress.share))

    def new_backbone(self, recipe: Recipe, what: str | None = None) -> Encoder:
        return TimmConfig(name=what).build(recipe) if what in self.config.students else recipe.encoder.build(recipe)

    def backbones(self) -> dict[str, Encoder]:
        return {name: student.encoder for name, student in self.parts()}

    def recipe_encoders(self) -> list[Encoder]:
        """Without the students beside it, which are of other architectures and begin untrained."""
        return [next(iter(self.backbones().values()))]


@dataclass(frozen=True)
class Taught:
    """What the teacher says of global views, standardised."""

    summary: Tensor  # (M, D)
    patches: Tensor  # (M, N, D)
    grid: tuple[int, int]  # rows and columns of the N


class Student(nn.Module):
    """An encoder, and what of it is compared with the teacher: only what has a weight exists."""

    def __init__(self, encoder: Encoder, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        width, patch_width = config.teacher_widths
        self.summary_projector = nn.Linear(encoder.width, width)
        self.patch_projector = nn.Linear(encoder.patch_width, patch_width) if config.patch_weight else None
        self.head: PrototypeHead | None = None
        if config.dino_weight:
            sizes = {"hidden": config.head_hidden, "bottleneck": config.head_bottleneck}
            self.head = PrototypeHead(width, **sizes, prototypes=config.prototypes)
            self.following_head = PrototypeHead(width, **sizes, prototypes=config.prototypes)
            follow(self.following_head, self.head)
            self.centre = Centre(config.prototypes)

    def begin_step(self) -> None:
        if self.head is not None:
            self.centre.begin_step()

    def forward(self, views: list[Tensor], taught: Taught, num_global: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and each of its terms by name."""
        config = self.config
        # Local views teach DINO's term only.
        tokens = list(tokens_of(self.encoder, views if self.head is not None else views[:num_global]))
        summary = self.summary_projector(torch.cat([some.summary for some in tokens]))
        terms: dict[str, tuple[float, Tensor]] = {}
        if config.summary_weight:
            terms["summary"] = config.summary_weight, feature_loss(summary[: len(taught.summary)], taught.summary)
        if self.patch_projector is not None:
            patches = self.patch_projector(resampled(tokens[0], len(taught.patches), taught.grid))
            terms["patches"] = config.patch_weight, feature_loss(patches, taught.patches)
        if self.head is not None:
            terms["dino"] = config.dino_weight, self.dino(self.head(summary), taught, num_global)
        loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return loss, {name: term.detach() for name, (_, term) in terms.items()}

    def dino(self, logits: Tensor, taught: Taught, num_global: int) -> Tensor:
        with torch.no_grad():
            log_p = log_probabilities(self.following_head(taught.summary), self.centre, self.config.teacher_temp)
            teacher_GBK = log_p.exp().unflatten(0, (num_global, -1))
        student_VBK = logits.unflatten(0, (-1, teacher_GBK.shape[1]))
        return dino_loss(student_VBK, teacher_GBK, student_temp=self.config.student_temp)

    def after_step(self, momentum: float) -> None:
        if self.head is not None:
            move_teacher(self.following_head, self.head, momentum)
            self.centre.move(self.config.centre_momentum)


class Teacher(nn.Module):
    """A frozen encoder, which sees the run's images as they were normalised for it."""

    def __init__(self, encoder: TimmModel, scale: list[float], shift: list[float]) -> None:
        super().__init__()
        self.encoder = encoder
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1))
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tokens:
        """Of images (B, C, H, W) that are normalised as the run's."""
        tokens: Tokens = self.encoder(images * self.scale + self.shift)
        return tokens


class Standard(nn.Module):
    """Each feature less its mean, over its deviation, both averaged over all steps so far, their parts and processes.

    The teacher is frozen, so they settle. In a step all its parts are measured by what was known before it; before the
    first one that is mean 0 and deviation 1, and the warm-up's rate is 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.var: Tensor
        self.steps: Tensor
        self.sums: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("steps", torch.zeros(()))
        # Of the step under way, of features less their mean as it was: sum, sum of squares, and their number.
        self.register_buffer("sums", torch.zeros(2 * width + 1), persistent=False)

    def begin_step(self) -> None:
        self.sums.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """(..., width), any precision -> the same, float32."""
        moved = features.float() - self.mean
        rows = moved.flatten(0, -2)
        self.sums += torch.cat([rows.sum(0), rows.square().sum(0), rows.new_full((1,), len(rows))])
        return moved / (self.var + EPSILON).sqrt()

    def move(self) -> None:
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        moved, squares = (self.sums[:-1] / self.sums[-1]).chunk(2)
        self.steps += 1
        self.var.lerp_(squares - moved.square(), 1 / self.steps)
        self.mean.lerp_(self.mean + moved, 1 / self.steps)


def feature_loss(said: Tensor, taught: Tensor) -> Tensor:
    """Mean squared difference from the teacher's features, which `Standard` has brought to mean 0 and deviation 1.

    said    (M, N, D) patches or (M, D) summaries, projected to the teacher's width, any precision
    taught  of the same shape, float32; no gradient

    Returns a float32 scalar, 0 or more; 1 is what saying the same of all images gets. Slowly:

        total = 0
        for each view m, each of its N patches n (a summary is one) and each of the D features d:
            total += (said[m, n, d] - taught[m, n, d])^2
        return total / (M * N * D)
    """
    with torch.autocast(said.device.type, enabled=False):
        return F.mse_loss(said.float(), taught)


def resampled(tokens: Tokens, num_views: int, grid: tuple[int, int]) -> Tensor:
    """The patches of the first `num_views` of the tokens' views, on another grid: (num_views, rows * cols, D).

    Bilinear, and where there are to be fewer, each is a mean weighted by the distance, as when images are made smaller.
    """
    patches = tokens.patches[:num_views]
    if tokens.grid == grid:
        return patches
    maps = patches.float().transpose(1, 2).unflatten(2, tokens.grid)
    return F.interpolate(maps, size=grid, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------- the teacher


def without_teacher(method: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Of a state_dict: the teacher is read from where it lies, and kept in no checkpoint."""
    for name in [name for name in state if name.startswith(prefix + TEACHER)]:
        del state[name]


def read_teacher(config: DistillConfig, recipe: Recipe) -> Teacher:
    """For the recipe's global views, on the CPU. Raises UserError, in one line, if it cannot be had."""
    asked = f"method.teacher = {config.teacher}"
    try:
        found = of_backbone(PretrainedConfig(), config.teacher)
    except UserError as error:
        said = str(error).removeprefix("--backbone ").removeprefix(f"{config.teacher}: ")
        raise UserError(f"{asked}: {no_folder(config.teacher) or said}") from error
    if found.weights is None:
        raise UserError(f"{asked}: untrained; a timm name with the .tag of its weights would be right, or an export")
    mean, std = normalisation_of(found.weights, asked)
    if len(mean) != recipe.data.channels:
        raise UserError(f"{asked}: sees {len(mean)} channels, and data.channels is {recipe.data.channels}")
    try:
        with torch.random.fork_rng(devices=[]):
            encoder = TimmModel(found, pixels=recipe.views.globals.pixels, channels=recipe.data.channels)
        encoder.begin_from(found.weights)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from error
    own_mean, own_std = recipe.data.normalisation
    scale = [own / its for own, its in zip(own_std, std, strict=True)]
    shift = [(own - its) / deviation for own, its, deviation in zip(own_mean, mean, std, strict=True)]
    return Teacher(encoder, scale, shift)


def refuse_size(teacher: Teacher, recipe: Recipe) -> None:
    """Raises UserError if it does not take the recipe's global views."""
    pixels = recipe.views.globals.pixels
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, recipe.data.channels, pixels, pixels))
    except (AssertionError, RuntimeError, ValueError) as error:  # as the model's authors wrote it
        name = teacher.encoder.architecture
        raise wrong(
            "views.globals.pixels", pixels, f"the teacher, {name}, does not take them: {said_by(error)}"
        ) from error


def no_folder(teacher: str) -> str | None:
    """What to say of a path that is not there."""
    if "/" not in teacher or Path(teacher).exists():
        return None
    return "no such folder; an export's or a run's would be right (pretrain.py --recipe dino makes runs/dino/export)"


def normalisation_of(weights: str, asked: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel that a teacher's images had, in 0..1."""
    config_file = Path(weights) / "config.json"
    if config_file.is_file():
        try:
            found = json.loads(config_file.read_text())["pretrained_cfg"]
            return tuple(map(float, found["mean"])), tuple(map(float, found["std"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{asked}: {config_file} does not say how images are normalised: {error}") from error
    try:
        published = timm.get_pretrained_cfg(weights, allow_unregistered=False)
    except RuntimeError as error:
        raise UserError(f"{asked}: timm has no weights of that name: {error}") from error
    assert published is not None
    return tuple(published.mean), tuple(published.std)


def hash_of(encoder: Encoder) -> str:
    """SHA-256 of all tensors, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
