"""DINO's loss, Caron et al. 2021, https://arxiv.org/abs/2104.14294, equations 1 to 3, with its gradient in closed form.

Letters, in this file only:

    B  images     G  global views     V  all views, global ones first     K  prototypes

With z = student / temp, t[g] the teacher's probabilities and n(v) the number of global views that v is compared with:

    loss         = mean over B of sum over v of (n(v) * logsumexp(z[v]) - sum over K of T[v] * z[v]) / pairs
    dloss / dz[v] = (n(v) * softmax(z[v]) - T[v]) / (pairs * B)                  T[v] = sum over g != v of t[g]

since each t[g] sums to 1. So one walk over the logits makes both, a few images at a time, while they are in the
processor's cache: nothing of the logits' size is kept but the gradient itself. Autograd would keep log-probabilities
besides. Figures: `python -m benchmarks loss`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_global.methods.chunks import chunks


def dino_loss(
    student_VBK: Tensor, teacher_GBK: Tensor, *, student_temp: float, first: int = 0, num_views: int | None = None
) -> Tensor:
    """Mean cross-entropy, in nats, of the teacher's view g under the student's view v, over all g != v.

    student_VBK   raw logits; rows 0..G-1 are of the global views that the teacher saw
    teacher_GBK   probabilities, centred and sharpened already: each sums to 1 over K; no gradient
    student_temp  the paper's tau_s; above 0
    first         which view the first row is of, where they are some of `num_views`: then the loss is what these views
                  add to the whole, so that parts of it, each with its own backward, add up

    Returns a float32 scalar, whatever the inputs' precision. Raises ValueError for a single view. Slowly:

        total, pairs = 0, 0
        for g in range(G):
            for v in range(V):
                if v != g:                       # at v == g the student looked at the teacher's very view
                    total += mean over B of -sum over K of teacher[g] * log_softmax(student[v] / student_temp)
                    pairs += 1
        return total / pairs
    """
    num_views = num_views or len(student_VBK)
    if num_views < 2:
        raise ValueError(f"DINO compares different views of an image; got {num_views}")
    loss: Tensor = CrossEntropies.apply(student_VBK, teacher_GBK, student_temp, first, num_views)
    return loss


class CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_VBK: Tensor, teacher_GBK: Tensor, temp: float, first_view: int, num_views: int
    ) -> Tensor:
        num_rows, num_images = student_VBK.shape[:2]
        num_global = len(teacher_GBK)
        terms = num_images * (num_global * num_views - num_global)
        gradient = torch.empty_like(student_VBK) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=student_VBK.device)
        with torch.autocast(student_VBK.device.type, enabled=False):
            for some in chunks(student_VBK[0]):
                teacher_GbK = teacher_GBK[:, some].float()
                of_all_bK = teacher_GbK.sum(0)
                for row in range(num_rows):
                    v = first_view + row
                    # Not of_all - teacher[v]: what is left of a small number beside a large one would be rounding.
                    others = [teacher_bK for g, teacher_bK in enumerate(teacher_GbK) if g != v]
                    target_bK = of_all_bK if v >= num_global else sum(others, torch.zeros_like(of_all_bK))
                    z_bK = student_VBK[row, some].float() / temp
                    log_sum_b1 = z_bK.logsumexp(-1, keepdim=True)
                    total += len(others) * log_sum_b1.sum() - torch.dot(target_bK.flatten(), z_bK.flatten())
                    if gradient is not None:
                        p_bK = z_bK.sub_(log_sum_b1).exp_()
                        gradient[row, some] = p_bK.mul_(len(others)).sub_(target_bK)
        # Divided later, by what brings fp16's scale of the loss: without it fp16 has no numbers so small.
        ctx.gradient, ctx.divisor = gradient, temp * terms
        return total / terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place: it is as large as all logits
        if gradient is None:
            raise RuntimeError("dino_loss: its gradient was asked for twice, and is kept for one time only")
        return gradient.mul_(of_loss / ctx.divisor), None, None, None, None
