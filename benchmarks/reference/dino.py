"""DINO's step as published, written from Algorithm 1 and the text of Caron et al. 2021 (arXiv 2104.14294).

Crops go through the network resolution by resolution; for each pair of a teacher's view and another view of the student
a log-softmax of that view, over again; the last layer's weight norm is a module; the teacher moves, and gradients are
clipped, tensor by tensor. Tensors have the names that ours have, but for the last layer, as weight norm splits it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.reference.vit import Vit


class Head(nn.Module):
    def __init__(self, width: int, *, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        norms = self.prototypes.parametrizations.weight.original0
        norms.data.fill_(1)
        norms.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.prototypes(F.normalize(self.mlp(x), dim=-1, p=2))
        return out


class MultiCrop(nn.Module):
    def __init__(self, encoder: Vit, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, views: list[Tensor]) -> Tensor:
        sizes = torch.tensor([view.shape[-1] for view in views])
        stops = torch.cumsum(torch.unique_consecutive(sizes, return_counts=True)[1], 0)
        start, output = 0, torch.empty(0, device=views[0].device)
        for stop in stops:
            output = torch.cat((output, self.encoder(torch.cat(views[start:stop]))[:, 0]))
            start = stop
        logits: Tensor = self.head(output)
        return logits


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


def clip_each(model: nn.Module, longest: float) -> list[float]:
    """Each tensor's gradient by itself; their norms, one by one, on the host."""
    norms = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.data.norm(2)
            norms.append(norm.item())
            factor = longest / (norm + 1e-6)
            if factor < 1:
                parameter.grad.data.mul_(factor)
    return norms


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for theirs, ours in zip(teacher.parameters(), student.parameters(), strict=True):
        theirs.data.mul_(momentum).add_((1 - momentum) * ours.detach().data)
