"""Moving the teacher after the student: all parameters in one call, beside the published loop over tensors.

    python -m benchmarks teacher --out teacher.json

Of ViT-S/16 with DINO's head of 65 536 prototypes. Both give the same teacher, to float32's rounding.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from torch import nn

from benchmarks.measure import compare, report
from benchmarks.reference import dino as published
from ssl_global.methods.heads import PrototypeHead
from ssl_global.methods.teacher import move_teacher

MOMENTUM = 0.996


@dataclass(frozen=True)
class Settings:
    name: str = "vit_small_patch16_224"
    prototypes: int = 65_536
    rounds: int = 15
    device: str = "cpu"
    threads: int = 0  # 0: torch's own
    out: Path | None = None


def main() -> None:
    settings = tyro.cli(Settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    encoder: Any = timm.create_model(settings.name, num_classes=0)
    head = PrototypeHead(encoder.num_features, hidden=2048, bottleneck=256, prototypes=settings.prototypes)
    student = nn.Sequential(encoder, head).to(settings.device)
    teachers = {name: moved_away(student) for name in ("published", "ours")}

    def move(name: str) -> int:
        {"published": published.move_teacher, "ours": move_teacher}[name](teachers[name], student, MOMENTUM)
        if settings.device != "cpu":
            torch.cuda.synchronize()
        return 1

    comparison = compare(
        "moving average, a step", {"published": lambda: move("published"), "ours": lambda: move("ours")},
        rounds=settings.rounds,
    )  # fmt: skip
    for theirs, ours in zip(teachers["published"].parameters(), teachers["ours"].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    report([comparison], {"teacher: times faster": (comparison.ratio("ours"), 1.5)}, settings.out)


def moved_away(student: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(student).requires_grad_(False)
    torch._foreach_mul_(list(teacher.parameters()), 0.5)
    return teacher


if __name__ == "__main__":
    main()
