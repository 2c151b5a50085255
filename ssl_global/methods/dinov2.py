"""DINOv2: DINO on the images' summaries, and on patches that are hidden from the student.

Oquab et al. 2023, https://arxiv.org/abs/2304.07193, section 4: DINO's loss, iBOT's (ibot_loss.py), Sinkhorn-Knopp
(sinkhorn.py) and KoLeo (koleo.py); Gram anchoring from DINOv3 (gram.py).

Letters, in this file only:

    B  images on this process     G  global views, 2      V  all views, global ones first
    D  the encoder's width        K  prototypes           M  hidden patches of the G * B global views

Of some global views blocks of patches are hidden: a learned token stands in their place before the student's first
block, so that it never sees those pixels. The teacher sees all; the student foretells what it says of a hidden patch.

    loss = DINO's + ibot_weight * iBOT's + koleo_weight * KoLeo's for each global view + gram_weight * Gram's

Who holds what: the student learns by gradient, and the token with it; the teacher is the student's moving average; the
centres, under softmax centring, are moving averages of the teacher's mean logits; the Gram teacher is the teacher as it
was at a past step. All are in state_dict().

Exact: a batch in one process, shared by k of them, or in k parts, gives one loss and gradient. DINO's, iBOT's and
Gram's terms are means over images. The centres are of the whole step. KoLeo looks for neighbours among stated images,
which are never parted. Sinkhorn-Knopp is over the whole step: the teacher answers for all parts before the first
backward (`looks_ahead`), and the answers are kept: G * B + M rows of K numbers of each part. The papers' code
accumulates nothing, and seeks KoLeo's neighbours on each GPU.

Not as in the papers' code: whether an image's view is hidden from, and how much of it, is drawn from the image's own
seed, where theirs hides half of each GPU's views and spreads the ratios evenly over them; the prototypes' norms are
fixed at 1; the gradient is clipped by its global norm, not module by module; iBOT's centre is the mean of all hidden
patches, not of each GPU's mean; temperatures rise with each step; the encoder's last norm counts to its last block, and
learns layer_decay slower than the heads; the Gram teacher sees the student's own views, enlarged, where theirs sees
them cut anew at the higher resolution and undistorted.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder, Tokens
from ssl_global.errors import wrong
from ssl_global.methods.dino_loss import dino_loss
from ssl_global.methods.gram import gram_loss, resized
from ssl_global.methods.heads import PrototypeHead
from ssl_global.methods.ibot_loss import ibot_loss
from ssl_global.methods.koleo import koleo_loss
from ssl_global.methods.layers import grouped, layer_scales
from ssl_global.methods.masking import block_hidden
from ssl_global.methods.method import Batch, Method, ParameterGroup
from ssl_global.methods.sinkhorn import sinkhorn_offsets
from ssl_global.methods.teacher import Centre, follow, move_teacher
from ssl_global.recipe import MethodConfig, Recipe, in_range, not_longer_than_run
from ssl_global.schedules import Progress, cosine, linear, share_of


@dataclass(frozen=True, kw_only=True)
class Dinov2Config(MethodConfig):
    prototypes: int = 65_536  # K, the outputs of each head
    head_hidden: int = 2048  # width of a head's two hidden layers
    head_bottleneck: int = 256  # width that the prototypes live in
    separate_heads: bool = False  # patches have a head of their own, instead of the summaries'
    student_temp: float = 0.1  # divides the student's logits
    teacher_temp: tuple[float, float] = (0.04, 0.07)  # divides the teacher's logits: at first, and after its warm-up
    teacher_temp_warmup_epochs: float = 30.0  # a straight line from the first to the second
    teacher_momentum: tuple[float, float] = (0.992, 1.0)  # at the first and at the last step, half a cosine between
    centring: Literal["softmax", "sinkhorn"] = "softmax"  # what keeps the teacher from one answer for all images
    centre_momentum: float = 0.9  # of the teacher's mean logits, under softmax centring
    sinkhorn_rounds: int = 3  # of Sinkhorn-Knopp, over the whole step's batch
    freeze_prototypes_epochs: float = 1.0  # the heads' last layers get no gradient until then
    ibot_weight: float = 1.0  # of the loss on hidden patches, beside DINO's
    hidden_share: float = 0.5  # of the global views that have hidden patches at all
    hidden_ratio: tuple[float, float] = (0.1, 0.5)  # share of such a view's patches, evenly drawn between the two
    koleo_weight: float = 0.1  # of KoLeo's loss, for each global view; 0: none
    koleo_images: int = 64  # that follow each other in a batch, among which an image's nearest neighbour is sought
    layer_decay: float = 0.9  # of the learning rate, from each of the encoder's layers to the one before it
    patch_embed_lr: float = 0.2  # share of that rate that the patch embedding learns with
    gram_weight: float = 0.0  # of the loss that holds patches as alike as an earlier teacher had them (DINOv3); 0: none
    gram_start_epochs: float = 0.0  # that loss begins then, against the teacher of that moment
    gram_every_steps: int = 10_000  # until the Gram teacher becomes the teacher of that moment
    gram_enlarge: float = 2.0  # times wider and higher are the Gram teacher's views than the student's

    def check(self, recipe: Recipe) -> None:
        for name, least in {
            "prototypes": 2, "head_hidden": 1, "head_bottleneck": 1, "sinkhorn_rounds": 1, "koleo_images": 2,
            "gram_every_steps": 1, "teacher_temp_warmup_epochs": 0, "freeze_prototypes_epochs": 0, "ibot_weight": 0,
            "koleo_weight": 0, "gram_weight": 0, "gram_start_epochs": 0, "gram_enlarge": 1,
        }.items():  # fmt: skip
            if getattr(self, name) < least:
                raise wrong(f"method.{name}", getattr(self, name), f"{least} or more")
        for name in ("student_temp", "layer_decay", "patch_embed_lr"):
            if getattr(self, name) <= 0:
                raise wrong(f"method.{name}", getattr(self, name), "above 0")
        in_range("method.layer_decay", self.layer_decay, 0, 1)
        if min(self.teacher_temp) <= 0:
            raise wrong("method.teacher_temp", self.teacher_temp, "both above 0; the paper's are 0.04 and 0.07")
        for momentum in self.teacher_momentum:
            in_range("method.teacher_momentum", momentum, 0, 1)
        in_range("method.centre_momentum", self.centre_momentum, 0, 1)
        in_range("method.hidden_share", self.hidden_share, 0, 1)
        low, high = self.hidden_ratio
        if not 0 <= low <= high < 1:
            raise wrong("method.hidden_ratio", self.hidden_ratio, "two shares, 0 <= smallest <= largest < 1")
        if recipe.views.globals.count + recipe.views.locals.count < 2:
            raise wrong(
                "views.globals.count", recipe.views.globals.count, "DINO compares views: at least 2 of each image"
            )
        self.check_encoder(recipe)
        self.check_batch(recipe)

    def check_encoder(self, recipe: Recipe) -> None:
        side, pixels = recipe.encoder.hides("dense"), recipe.views.globals.pixels
        if side is None:
            raise wrong("encoder", type(recipe.encoder).__name__, "one that can hide patches; vit and global_swin can")
        if pixels % side or pixels == side:
            right = f"{max(pixels // side, 2) * side} or {max(pixels // side + 1, 3) * side} would be"
            raise wrong("views.globals.pixels", pixels, f"not several times the hidden patches' {side}; {right}")
        enlarged = self.gram_enlarge * pixels
        if self.gram_weight and enlarged % side:
            raise wrong(
                "method.gram_enlarge",
                self.gram_enlarge,
                f"{enlarged:g} pixels are not a multiple of the patches' {side}",
            )

    def check_batch(self, recipe: Recipe) -> None:
        train, together = recipe.train, self.images_together()
        if train.global_batch % together:
            raise wrong(
                "method.koleo_images", self.koleo_images, f"must divide train.global_batch = {train.global_batch}"
            )
        if isinstance(train.micro_batch, int) and train.micro_batch < together:
            raise wrong("method.koleo_images", self.koleo_images, f"at most train.micro_batch = {train.micro_batch}")

    def check_durations(self, epochs: float) -> None:
        for name in ("teacher_temp_warmup_epochs", "freeze_prototypes_epochs", "gram_start_epochs"):
            not_longer_than_run(f"method.{name}", getattr(self, name), epochs)

    def images_together(self) -> int:
        return self.koleo_images if self.koleo_weight else 1

    def build(self, recipe: Recipe) -> "Dinov2":
        side = recipe.encoder.hides("dense")
        assert side is not None
        whole = replace(recipe.encoder, drop_path=0.0)  # the teachers see with all their blocks
        return Dinov2(
            self, recipe.encoder.build(recipe), whole.build(recipe), whole.build(recipe) if self.gram_weight else None,
            num_global_views=recipe.views.globals.count, patch=side,
        )  # fmt: skip


@dataclass(frozen=True)
class Hidden:
    """What the student does not see of the G * B global views, view by view; on the device."""

    replaced: Tensor  # bool (G * B, rows, cols)
    index: Tensor  # int64 (M,): the hidden patches' places among all patches of all views
    weight: Tensor  # float32 (M,): in iBOT's loss


@dataclass(frozen=True)
class Said:
    """What student or teacher say of views."""

    tokens: Tokens  # of the global views
    logits: Tensor  # (V * B, K), view by view; of the summaries
    patch_logits: Tensor  # (M, K), of the hidden patches


class Dinov2(Method):
    def __init__(
        self, config: Dinov2Config, student: Encoder, teacher: Encoder, gram_teacher: Encoder | None, *,
        num_global_views: int, patch: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.num_global_views = num_global_views
        self.patch = patch  # side of what is hidden as one, in pixels
        self.student = Learner(student, config)
        self.teacher = Learner(teacher, config)
        follow(self.teacher, self.student)
        self.token = nn.Parameter(torch.zeros(student.first_width))  # as DINOv2 begins
        self.gram_teacher = gram_teacher
        if gram_teacher is not None:
            follow(gram_teacher, student)
        if config.centring == "softmax":
            self.centre, self.patch_centre = Centre(config.prototypes), Centre(config.prototypes)
        # Of the step under way, when the loop showed all its parts beforehand: the teacher's answers to those that are
        # still to come, and what Sinkhorn-Knopp found for all of them.
        self.answers: deque[tuple[Tensor, Tensor]] = deque()
        self.offsets: tuple[Tensor, Tensor] | None = None

    def looks_ahead(self) -> bool:
        return self.config.centring == "sinkhorn"

    def centres(self) -> list[Centre]:
        return [self.centre, self.patch_centre] if self.config.centring == "softmax" else []

    def begin_step(self, progress: Progress) -> None:
        self.answers.clear()
        self.offsets = None
        for centre in self.centres():
            centre.begin_step()

    def forward(self, batch: Batch, progress: Progress, *, ahead: bool = False) -> dict[str, Tensor]:
        """`ahead`: only the teacher answers, which is kept for this batch's turn, and nothing is returned."""
        config, num_global = self.config, self.num_global_views
        views = batch["views"]
        seen, local = torch.cat(views[:num_global]), views[num_global:]
        hidden = self.hide(batch)
        if ahead:
            self.answers.append(self.ask_teacher(seen, hidden))
            return {}
        temp = linear(*config.teacher_temp, share_of(progress.epoch, config.teacher_temp_warmup_epochs))
        (p, entropy), (patch_p, patch_entropy) = self.targets(seen, hidden, temp)
        student = self.student(seen, hidden.index, local, replaced=hidden.replaced, token=self.token)

        student_VBK = student.logits.unflatten(0, (len(views), -1))
        by_view = dino_loss(student_VBK, p.unflatten(0, (num_global, -1)), student_temp=config.student_temp)
        by_patch = ibot_loss(student.patch_logits, patch_p, hidden.weight, student_temp=config.student_temp)
        loss = by_view + config.ibot_weight * by_patch
        log_k = math.log(config.prototypes)
        figures = {
            "view_loss": by_view.detach(),
            "patch_loss": by_patch.detach(),
            "teacher_entropy_share": entropy / log_k,
            "patch_entropy_share": patch_entropy / log_k,
            "teacher_kl": by_view.detach() - entropy,
        }
        if config.koleo_weight:
            koleo = koleo_loss(student.tokens.summary, among=config.koleo_images)
            loss = loss + config.koleo_weight * num_global * koleo
            figures["koleo_loss"] = koleo.detach()
        if self.gram_teacher is not None and progress.step >= self.gram_start(progress):
            gram = gram_loss(student.tokens.patches, self.anchor(seen, student.tokens.grid))
            loss = loss + config.gram_weight * gram
            figures["gram_loss"] = gram.detach()
        return {"loss": loss, **figures}

    def hide(self, batch: Batch) -> Hidden:
        """Drawn on the CPU, where the number of hidden patches is known without waiting for the device."""
        config, images = self.config, batch["views"][0]
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        replaced = np.concatenate(
            [
                block_hidden(batch["seeds"], grid, view=view, share=config.hidden_share, ratios=config.hidden_ratio)
                for view in range(self.num_global_views)
            ]
        )
        index = np.flatnonzero(replaced)
        of_view = replaced.sum((1, 2)).clip(min=1)
        weight = (1 / (of_view * len(replaced))).astype(np.float32)[index // replaced[0].size]
        return Hidden(*(without_waiting(torch.from_numpy(x), images.device) for x in (replaced, index, weight)))

    @torch.no_grad()
    def ask_teacher(self, seen: Tensor, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Logits of the global views' summaries and of the hidden patches."""
        said = self.teacher(seen, hidden.index)
        return said.logits, said.patch_logits

    @torch.no_grad()
    def targets(self, seen: Tensor, hidden: Hidden, temp: float) -> Iterable[tuple[Tensor, Tensor]]:
        """The teacher's probabilities and their mean entropy: of the summaries, of the hidden patches."""
        if self.answers:
            if self.offsets is None:
                self.offsets = self.balanced(self.answers, temp)
            logits, offsets = self.answers.popleft(), self.offsets
        else:
            logits = self.ask_teacher(seen, hidden)
            offsets = self.centred(logits, temp) if self.centres() else self.balanced([logits], temp)
        return [probabilities(one, offset, temp) for one, offset in zip(logits, offsets, strict=True)]

    def centred(self, logits: tuple[Tensor, Tensor], temp: float) -> tuple[Tensor, Tensor]:
        """The centres so far, and they hear of the logits."""
        for centre, one in zip(self.centres(), logits, strict=True):
            centre.add(one.float())
        return self.centre.value / -temp, self.patch_centre.value / -temp

    def balanced(self, answers: Iterable[tuple[Tensor, Tensor]], temp: float) -> tuple[Tensor, Tensor]:
        """By Sinkhorn-Knopp, over all these answers of all processes."""
        of_views, of_patches = zip(*answers, strict=True)
        rounds = self.config.sinkhorn_rounds
        return (
            sinkhorn_offsets(of_views, temp=temp, rounds=rounds),
            sinkhorn_offsets(of_patches, temp=temp, rounds=rounds),
        )

    @torch.no_grad()
    def anchor(self, seen: Tensor, grid: tuple[int, int]) -> Tensor:
        """The Gram teacher's patches of the enlarged views, brought to the student's grid: (G * B, N, D)."""
        assert self.gram_teacher is not None
        size = [round(side * self.config.gram_enlarge) for side in seen.shape[2:]]
        tokens = self.gram_teacher(F.interpolate(seen, size=size, mode="bicubic"))
        return resized(tokens.patches, tokens.grid, grid)

    def gram_start(self, progress: Progress) -> int:
        return math.ceil(self.config.gram_start_epochs * progress.steps_per_epoch)

    def gradients_done(self, progress: Progress) -> None:
        if progress.epoch < self.config.freeze_prototypes_epochs:
            for head in self.student.heads():
                head.prototypes.weight.grad = None

    def after_step(self, progress: Progress) -> None:
        move_teacher(self.teacher, self.student, cosine(*self.config.teacher_momentum, progress.share))
        for centre in self.centres():
            centre.move(self.config.centre_momentum)
        since = progress.step + 1 - self.gram_start(progress)
        if self.gram_teacher is not None and since >= 0 and since % self.config.gram_every_steps == 0:
            move_teacher(self.gram_teacher, self.teacher.encoder, 0.0)

    def parameter_groups(self) -> list[ParameterGroup]:
        """As every method's, and each layer of the encoder learns slower than the next, the heads stand above all."""
        config, model = self.config, self.student.encoder.model
        scales = layer_scales(model, config.layer_decay)
        scale_of = {id(self.token): config.layer_decay * min(scales.values())}
        for name, parameter in model.named_parameters():
            embeds = config.patch_embed_lr if name.startswith("patch_embed.") else 1.0
            scale_of[id(parameter)] = config.layer_decay * scales.get(name, 1.0) * embeds
        return grouped((p, p.ndim > 1, scale_of.get(id(p), 1.0)) for p in self.parameters())

    def backbones(self) -> dict[str, Encoder]:
        return {"teacher": self.teacher.encoder, "student": self.student.encoder}

    def recipe_encoders(self) -> list[Encoder]:
        """The Gram teacher too: at gram_start_epochs 0 it is what the run begins from."""
        return [*self.backbones().values(), *([] if self.gram_teacher is None else [self.gram_teacher])]


class Learner(nn.Module):
    """An encoder and its heads: student or teacher."""

    def __init__(self, encoder: Encoder, config: Dinov2Config) -> None:
        super().__init__()
        self.encoder = encoder
        sizes = {"hidden": config.head_hidden, "bottleneck": config.head_bottleneck, "prototypes": config.prototypes}
        self.head = PrototypeHead(encoder.width, **sizes)
        self.patch_head = PrototypeHead(encoder.width, **sizes) if config.separate_heads else None

    def heads(self) -> list[PrototypeHead]:
        return [self.head] if self.patch_head is None else [self.head, self.patch_head]

    def forward(
        self, seen: Tensor, index: Tensor, local: Iterable[Tensor] = (), *,
        replaced: Tensor | None = None, token: Tensor | None = None,
    ) -> Said:  # fmt: skip
        """seen: the global views, (G * B, C, H, W); index: of their patches those to speak of; local: other views."""
        tokens = self.encoder(seen, replaced=replaced, token=token)
        summaries = [tokens.summary]
        if local := list(local):
            summaries.append(self.encoder(torch.cat(local)).summary)
        patches = tokens.patches.flatten(0, 1).index_select(0, index)
        return Said(tokens, self.head(torch.cat(summaries)), (self.patch_head or self.head)(patches))


def probabilities(logits_NK: Tensor, offsets_K: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """softmax(logits / temp + offsets), float32, and its mean entropy in nats, 0 where there is none."""
    z_NK = (logits_NK.float() / temp).add_(offsets_K)  # in place from here on: it is as large as the logits
    z_NK.sub_(z_NK.logsumexp(-1, keepdim=True))
    p_NK = z_NK.exp()
    return p_NK, -torch.dot(p_NK.flatten(), z_NK.flatten()) / max(len(p_NK), 1)


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
