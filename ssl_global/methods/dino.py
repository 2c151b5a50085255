"""DINO: from one view of an image the student foretells what the teacher says of another.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers",
https://arxiv.org/abs/2104.14294 (Algorithm 1; multi-crop in section 3).

Letters, in this file only:

    B  images on this process     G  global views, 2      V  all views, global ones first
    D  the encoder's width        K  prototypes, the head's outputs

Who holds what: the student learns by gradient; the teacher is the student's moving average; the centre is the moving
average of the teacher's mean logit, the same on every process. All three are in state_dict().

With `region_loss` patches are compared too, each with the most similar one of the teacher's view (EsViT, Li et al.
2021, https://arxiv.org/abs/2106.09785); both losses count half, and regions have a head and a centre of their own.

With `consistency_weight` the student's global and local views must find each other among all images' as well
(methods/consistency_loss.py), through a projector that exists only then. That term's negatives are the images that all
processes look at at once: under accumulation it is not what the whole batch would have.

Not as in the paper's code: the prototypes' norms are always fixed at 1 (its option norm_last_layer, which larger runs
there turn off); the gradient is clipped by its global norm, not tensor by tensor; the teacher's temperature
rises with each step, not with each epoch; the centre is reduced in the step that made it, so that a run stopped between
two steps has nothing in flight, and over all parts of an accumulated batch.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import wrong
from ssl_global.methods.consistency_loss import consistency_loss, refuse_auto
from ssl_global.methods.dino_loss import dino_loss
from ssl_global.methods.heads import Projector, PrototypeHead
from ssl_global.methods.method import Batch, Method
from ssl_global.methods.multi_crop import tokens_of
from ssl_global.methods.teacher import Centre, follow, log_probabilities, move_teacher
from ssl_global.recipe import MethodConfig, Recipe, in_range, not_longer_than_run
from ssl_global.schedules import Progress, cosine, linear, share_of


@dataclass(frozen=True, kw_only=True)
class DinoConfig(MethodConfig):
    prototypes: int = 65_536  # K, the head's outputs
    head_hidden: int = 2048  # width of the head's two hidden layers
    head_bottleneck: int = 256  # width that the prototypes live in
    student_temp: float = 0.1  # divides the student's logits
    teacher_temp: tuple[float, float] = (0.04, 0.04)  # divides the teacher's logits: at first, and after its warm-up
    teacher_temp_warmup_epochs: float = 0.0  # a straight line from the first to the second
    teacher_momentum: tuple[float, float] = (0.996, 1.0)  # at the first and at the last step, half a cosine between
    centre_momentum: float = 0.9  # of the teacher's mean logit
    freeze_prototypes_epochs: float = 1.0  # the last layer gets no gradient until then
    region_loss: bool = False  # match the patches of views too, with a head of their own (Li et al. 2021, EsViT)
    consistency_weight: float = 0.0  # of InfoNCE between global and local views, added to the loss; 0: none
    consistency_temp: float = 0.1  # divides the cosines there

    def check(self, recipe: Recipe) -> None:
        if self.prototypes < 2:
            raise wrong("method.prototypes", self.prototypes, "at least 2")
        for name in ("head_hidden", "head_bottleneck"):
            if getattr(self, name) < 1:
                raise wrong(f"method.{name}", getattr(self, name), "at least 1")
        if self.student_temp <= 0:
            raise wrong("method.student_temp", self.student_temp, "above 0; the paper's is 0.1")
        if min(self.teacher_temp) <= 0:
            raise wrong("method.teacher_temp", self.teacher_temp, "both above 0; the paper's are 0.04 to 0.07")
        for momentum in self.teacher_momentum:
            in_range("method.teacher_momentum", momentum, 0, 1)
        in_range("method.centre_momentum", self.centre_momentum, 0, 1)
        for name in ("teacher_temp_warmup_epochs", "freeze_prototypes_epochs"):
            if getattr(self, name) < 0:
                raise wrong(f"method.{name}", getattr(self, name), "0 or more")
        if recipe.views.globals.count + recipe.views.locals.count < 2:
            raise wrong(
                "views.globals.count", recipe.views.globals.count, "DINO compares views: at least 2 of each image"
            )
        self.check_consistency(recipe)

    def check_consistency(self, recipe: Recipe) -> None:
        if self.consistency_weight < 0:
            raise wrong("method.consistency_weight", self.consistency_weight, "0 (none) or more")
        if self.consistency_temp <= 0:
            raise wrong("method.consistency_temp", self.consistency_temp, "above 0; the sources' is 0.1")
        if self.consistency_weight and recipe.views.locals.count < 1:
            raise wrong("method.consistency_weight", self.consistency_weight, "0, or views.locals.count 1 or more")
        if self.consistency_weight:
            refuse_auto(recipe)

    def splits_views(self) -> bool:
        return not self.consistency_weight

    def check_durations(self, epochs: float) -> None:
        not_longer_than_run("method.teacher_temp_warmup_epochs", self.teacher_temp_warmup_epochs, epochs)
        not_longer_than_run("method.freeze_prototypes_epochs", self.freeze_prototypes_epochs, epochs)

    def images_together(self) -> int:
        return 2 if self.consistency_weight else 1  # an image alone has no negatives

    def build(self, recipe: Recipe) -> "Dino":
        student = recipe.encoder.build(recipe)
        teacher = replace(recipe.encoder, drop_path=0.0).build(recipe)  # the teacher sees with all its blocks
        num_global = recipe.views.globals.count
        return Dino(self, student, teacher, num_global_views=num_global, split_views=recipe.train.split_views)


class Dino(Method):
    def __init__(
        self,
        config: DinoConfig,
        student: Encoder,
        teacher: Encoder,
        *,
        num_global_views: int,
        split_views: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_global_views = num_global_views
        self.split_views = split_views
        self.targets: Targets | None = None  # what the teacher says, while pieces of a batch are looked at
        self.student = Distiller(student, config)
        self.teacher = Distiller(teacher, config)
        follow(self.teacher, self.student)
        self.centre = Centre(config.prototypes)
        self.region_centre = Centre(config.prototypes) if config.region_loss else None
        self.projector: Projector | None = None
        if config.consistency_weight:
            self.projector = Projector(student.width, hidden=config.head_hidden, out=config.head_bottleneck)

    def centres(self) -> list[Centre]:
        return [self.centre] if self.region_centre is None else [self.centre, self.region_centre]

    def speaks_in_forward(self) -> bool:
        return self.projector is not None

    def begin_step(self, progress: Progress) -> None:
        self.targets = None
        for centre in self.centres():
            centre.begin_step()

    def pieces(self, batch: Batch) -> list[Batch]:
        """With split_views, each global view by itself, then the local ones: together they have fewer pixels."""
        num_views, num_global = len(batch["views"]), self.num_global_views
        if not self.split_views:
            return [batch]
        ranges = [*(range(g, g + 1) for g in range(num_global)), range(num_global, num_views)]
        return [{**batch, "student_views": views} for views in ranges if views]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        views, config = batch["views"], self.config
        seen = batch.get("student_views", range(len(views)))
        if self.targets is None:
            self.targets = self.ask_teacher(views[: self.num_global_views], progress)
            entropy = self.targets.entropy
        else:
            entropy = torch.zeros_like(self.targets.entropy)  # the first piece has told of it
        targets = self.targets
        student = self.student([views[v] for v in seen])
        if seen.stop == len(views):
            self.targets = None

        student_VBK = student.logits.unflatten(0, (len(seen), -1))
        temp, first, num_views = config.student_temp, seen.start, len(views)
        loss = dino_loss(student_VBK, targets.probabilities, student_temp=temp, first=first, num_views=num_views)
        figures = {
            "teacher_entropy_share": entropy / math.log(config.prototypes),
            # Of the student from the teacher: what the student could still learn.
            "teacher_kl": loss.detach() - entropy,
        }
        if targets.regions is not None:
            by_region = region_loss(student, targets.regions, student_temp=temp, first=first, num_views=num_views)
            figures |= {"view_loss": loss.detach(), "region_loss": by_region.detach()}
            loss = (loss + by_region) / 2
        if self.projector is not None:
            projected_VBD = self.projector(student.summaries).unflatten(0, (len(views), -1))
            of_globals, of_locals = projected_VBD.tensor_split([self.num_global_views])
            between = consistency_loss(of_globals, of_locals, temp=config.consistency_temp)
            figures["consistency_loss"] = between.detach()
            loss = loss + config.consistency_weight * between
        return {"loss": loss, **figures}

    @torch.no_grad()
    def ask_teacher(self, views: list[Tensor], progress: Progress) -> "Targets":
        config = self.config
        temp = linear(*config.teacher_temp, share_of(progress.epoch, config.teacher_temp_warmup_epochs))
        said = self.teacher(views)
        log_p = log_probabilities(said.logits, self.centre, temp)
        p = log_p.exp()
        entropy = -torch.dot(p.flatten(), log_p.flatten()) / len(p)
        regions = None
        if self.region_centre is not None:
            of_regions = [log_probabilities(x, self.region_centre, temp).exp() for x in said.region_logits]
            regions = replace(said, region_logits=of_regions)
        return Targets(p.unflatten(0, (len(views), -1)), entropy, regions)

    def gradients_done(self, progress: Progress) -> None:
        if progress.epoch < self.config.freeze_prototypes_epochs:
            for head in self.student.heads():
                head.prototypes.weight.grad = None

    def after_step(self, progress: Progress) -> None:
        move_teacher(self.teacher, self.student, cosine(*self.config.teacher_momentum, progress.share))
        for centre in self.centres():
            centre.move(self.config.centre_momentum)

    def backbones(self) -> dict[str, Encoder]:
        return {"teacher": self.teacher.encoder, "student": self.student.encoder}


@dataclass(frozen=True)
class Said:
    """What student or teacher say of views."""

    summaries: Tensor  # (V * B, D), view by view
    logits: Tensor  # (V * B, K)
    patches: list[Tensor]  # of each view (B, N, D); none without a region loss
    region_logits: list[Tensor]  # of each view (B, N, K); none without a region loss


@dataclass(frozen=True)
class Targets:
    """What the student is to foretell of a batch; no gradient."""

    probabilities: Tensor  # (G, B, K)
    entropy: Tensor  # 0-d, their mean's, in nats
    regions: Said | None  # of each region, probabilities in the logits' place; None without a region loss


class Distiller(nn.Module):
    """An encoder and a head, and one for regions if they are learnt from: student or teacher."""

    def __init__(self, encoder: Encoder, config: DinoConfig) -> None:
        super().__init__()
        self.encoder = encoder
        sizes = {"hidden": config.head_hidden, "bottleneck": config.head_bottleneck, "prototypes": config.prototypes}
        self.head = PrototypeHead(encoder.width, **sizes)
        self.region_head = PrototypeHead(encoder.width, **sizes) if config.region_loss else None

    def heads(self) -> list[PrototypeHead]:
        return [self.head] if self.region_head is None else [self.head, self.region_head]

    def forward(self, views: list[Tensor]) -> Said:
        summaries, patches = [], []
        for tokens in tokens_of(self.encoder, views):
            summaries.append(tokens.summary)
            if self.region_head is not None:
                patches += tokens.patches.split(len(views[0]))
        regions = [self.region_head(view) for view in patches] if self.region_head is not None else []
        summaries_all = torch.cat(summaries)
        return Said(summaries_all, self.head(summaries_all), patches, regions)


def region_loss(
    student: Said, teacher: Said, *, student_temp: float, first: int = 0, num_views: int | None = None
) -> Tensor:
    """Mean cross-entropy, in nats, of each region of a student's view under the teacher's region that is most like it.

    Li et al. 2021, "EsViT", https://arxiv.org/abs/2106.09785, equations 3 and 4. Regions are the encoder's patches;
    alike are those with the largest cosine, of the student's view and of the teacher's.

    student   region_logits raw, of V views; the first G are those that the teacher saw
    teacher   region_logits are probabilities here, of G views; no gradient
    first     which view the student's first one is, where it saw some of `num_views`: as in `dino_loss`

    Returns a float32 scalar. Raises ValueError for a single view. Slowly:

        total, pairs = 0, 0
        for g in range(G):
            for v in range(V):
                if v != g:
                    for each image b and each patch i of view v:
                        j = the patch of view g with the largest cosine to it
                        total += -sum over K of teacher[g][b, j] * log_softmax(student[v][b, i] / student_temp)
                                  / (patches of v * images)
                    pairs += 1
        return total / pairs
    """
    num_global, num_views = len(teacher.region_logits), num_views or len(student.region_logits)
    if num_views < 2:
        raise ValueError(f"DINO compares different views of an image; got {num_views}")
    losses = []
    with torch.autocast(student.logits.device.type, enabled=False):
        for row, logits in enumerate(student.region_logits):
            logits_BNK = logits.float() / student_temp
            log_sum_BN = logits_BNK.logsumexp(-1)
            for g in set(range(num_global)) - {first + row}:
                with torch.no_grad():
                    alike_BNM = F.normalize(student.patches[row].float(), dim=-1) @ F.normalize(
                        teacher.patches[g].float(), dim=-1
                    ).transpose(1, 2)
                    nearest_BN = alike_BNM.argmax(-1)
                # A row of probabilities sums to 1: the products with all regions are smaller than the rows themselves.
                products_BNM = logits_BNK @ teacher.region_logits[g].transpose(1, 2)
                losses.append((log_sum_BN - products_BNM.gather(2, nearest_BN[..., None])[..., 0]).mean())
    return torch.stack(losses).sum() / (num_global * (num_views - 1))
