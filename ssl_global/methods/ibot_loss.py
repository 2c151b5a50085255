"""iBOT's loss on hidden patches, Zhou et al. 2021, https://arxiv.org/abs/2111.07832, equation 2, with its gradient.

Letters, in this file only:

    M  hidden patches, of all images and views together     K  prototypes

A weight for each patch says what the mean is over. As in DINOv2's code it is 1 / (hidden patches of its view of its
image), over the views that there are, those without hidden patches included: so the loss of a batch is the mean of
those of its parts, whatever is hidden in which. In iBOT's paper each image has the same weight too.

Value and gradient are made in one walk, a few patches at a time, as in dino_loss.py and for its reasons.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_global.methods.chunks import chunks


def ibot_loss(student_MK: Tensor, teacher_MK: Tensor, weight_M: Tensor, *, student_temp: float) -> Tensor:
    """Weighted sum of cross-entropies, in nats, of the teacher's view of each patch under the student's guess.

    student_MK    raw logits, of the tokens that the student has where patches are hidden from it
    teacher_MK    probabilities, of the same patches as the teacher sees them: each sums to 1 over K; no gradient
    weight_M      float32, see above
    student_temp  above 0

    Returns a float32 scalar, 0 where nothing is hidden. Slowly:

        total = 0
        for m in range(M):
            total += weight[m] * -sum over K of teacher[m] * log_softmax(student[m] / student_temp)
        return total
    """
    loss: Tensor = CrossEntropies.apply(student_MK, teacher_MK, weight_M, student_temp)
    return loss


class CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_MK: Tensor, teacher_MK: Tensor, weight_M: Tensor, temp: float) -> Tensor:
        gradient = torch.empty_like(student_MK) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=student_MK.device)
        largest = weight_M.max() if len(weight_M) else weight_M.new_ones(())
        with torch.autocast(student_MK.device.type, enabled=False):
            for some in chunks(student_MK):
                teacher_mK, weight_m1 = teacher_MK[some].float(), weight_M[some, None]
                z_mK = student_MK[some].float() / temp
                log_sum_m1 = z_mK.logsumexp(-1, keepdim=True)
                total += (weight_m1 * (log_sum_m1 - (teacher_mK * z_mK).sum(-1, keepdim=True))).sum()
                if gradient is not None:
                    p_mK = z_mK.sub_(log_sum_m1).exp_()
                    gradient[some] = p_mK.sub_(teacher_mK).mul_(weight_m1 / largest)
        # The rest comes with fp16's scale of the loss, as in dino_loss.py.
        ctx.gradient, ctx.factor = gradient, largest / temp
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place: it is as large as all logits
        if gradient is None:
            raise RuntimeError("ibot_loss: its gradient was asked for twice, and is kept for one time only")
        return gradient.mul_(of_loss * ctx.factor), None, None, None
