"""The teacher is the student's moving average. It is never differentiated."""

import torch
from torch import nn


def follow(teacher: nn.Module, student: nn.Module) -> None:
    """Make the teacher the student's copy, once, at the start; from then on it takes no gradient."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, all parameters in one call, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
