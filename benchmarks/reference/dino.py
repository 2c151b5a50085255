"""DINO's loss and moving average as published: Caron et al. 2021, https://arxiv.org/abs/2104.14294, Algorithm 1.

A loop over pairs of views, autograd through each of its terms; the centre moved at every call; the teacher moved tensor
by tensor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Loss(nn.Module):
    """student (V * B, K) raw logits, teacher (G * B, K) raw logits -> scalar."""

    def __init__(self, prototypes: int, *, num_views: int, student_temp: float, teacher_temp: float) -> None:
        super().__init__()
        self.num_views, self.student_temp, self.teacher_temp = num_views, student_temp, teacher_temp
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        views = (student / self.student_temp).chunk(self.num_views)
        targets = F.softmax((teacher - self.centre) / self.teacher_temp, dim=-1).detach().chunk(2)
        total, terms = student.new_zeros(()), 0
        for g, target in enumerate(targets):
            for v, view in enumerate(views):
                if v != g:
                    total = total + torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1).mean()
                    terms += 1
        self.move_centre(teacher)
        return total / terms

    @torch.no_grad()
    def move_centre(self, teacher: Tensor) -> None:
        self.centre = 0.9 * self.centre + 0.1 * teacher.mean(dim=0, keepdim=True)


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for theirs, ours in zip(teacher.parameters(), student.parameters(), strict=True):
        theirs.data.mul_(momentum).add_((1 - momentum) * ours.detach().data)
