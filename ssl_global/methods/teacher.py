"""The teacher is the student's moving average, never differentiated; the centre is that of the teacher's mean logit."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def follow(teacher: nn.Module, student: nn.Module) -> None:
    """Make the teacher the student's copy, once, at the start; from then on it takes no gradient."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, all parameters in one call, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


class Centre(nn.Module):
    """The moving average of the teacher's mean logit, over all processes and all parts of a step's batch."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.value: Tensor
        self.logit_sum: Tensor
        self.register_buffer("value", torch.zeros(prototypes))
        # Of the step under way: the sum of the teacher's logits, over views and parts of the batch, and their number.
        self.register_buffer("logit_sum", torch.zeros(prototypes), persistent=False)
        self.num_logits = 0

    def begin_step(self) -> None:
        self.logit_sum.zero_()
        self.num_logits = 0

    def add(self, logits: Tensor) -> None:
        """(..., prototypes), float32."""
        self.logit_sum += logits.flatten(0, -2).sum(0)
        self.num_logits += logits.flatten(0, -2).shape[0]

    def move(self, momentum: float) -> None:
        total = torch.cat([self.logit_sum, self.logit_sum.new_full((1,), self.num_logits)])
        if dist.is_initialized():
            dist.all_reduce(total)
        # Without a logit in the whole step, as where no patch was hidden, it stays.
        mean = torch.where(total[-1] > 0, total[:-1] / total[-1], self.value)
        self.value.lerp_(mean, 1 - momentum)


def log_probabilities(logits: Tensor, centre: Centre, temp: float) -> Tensor:
    """(..., K), float32: the teacher's, centred and sharpened; the centre hears of the logits. Without gradient."""
    logits = logits.float()
    centre.add(logits)
    z = (logits - centre.value).div_(temp)  # in place from here on: it is as large as the logits
    return z.sub_(z.logsumexp(-1, keepdim=True))
