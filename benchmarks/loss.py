"""DINO's loss, forward and backward from the logits, beside the published loop over pairs of views.

    python -m benchmarks loss --out loss.json

65 536 prototypes, 2 global and 8 local views; the teacher's softmax and centre included. Both say the same loss and
the same gradient, to 1e-5 of the largest. Memory is what a process takes at its peak beside the logits, which both are
given: of a CPU the resident set, measured in processes of their own, of a GPU what torch allocates.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks.measure import alone, compare, report, resident
from benchmarks.reference.dino import Loss
from ssl_global.methods.dino_loss import dino_loss
from ssl_global.methods.teacher import Centre, log_probabilities

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
VIEWS, GLOBAL = 10, 2


@dataclass(frozen=True)
class Settings:
    images: int = 64  # in a batch
    prototypes: int = 65_536
    rounds: int = 7
    device: str = "cpu"
    threads: int = 0  # 0: torch's own
    out: Path | None = None


def main() -> None:
    settings = tyro.cli(Settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    refuse_difference(settings)
    logits = drawn(settings)
    options = {name: partial(step, name, settings, *logits) for name in ("published", "ours")}
    comparison = compare("loss, an image", options, rounds=settings.rounds)
    peaks = {name: alone(peak_bytes, name, settings) for name in options}
    print(f"memory beside the logits: published {peaks['published'] / 1e6:.0f} MB, ours {peaks['ours'] / 1e6:.0f} MB")
    bars = {
        "loss: times faster": (comparison.ratio("ours"), 1.5 if settings.device == "cpu" else 3.0),
        "loss: times less memory": (peaks["published"] / max(peaks["ours"], 1), 2.5),
    }
    report([comparison], bars, settings.out)


def drawn(settings: Settings) -> tuple[Tensor, Tensor]:
    """Logits of student (V, B, K) and teacher (G, B, K): cosines, as of the head."""
    generator = torch.Generator().manual_seed(0)
    size = (settings.images, settings.prototypes)
    student, teacher = (torch.randn(views, *size, generator=generator).mul_(0.2) for views in (VIEWS, GLOBAL))
    return student.to(settings.device), teacher.to(settings.device)


def step(name: str, settings: Settings, student_VBK: Tensor, teacher_GBK: Tensor) -> int:
    loss_and_gradient(name, settings, student_VBK, teacher_GBK)
    if settings.device != "cpu":
        torch.cuda.synchronize()
    return settings.images


def loss_and_gradient(name: str, settings: Settings, student_VBK: Tensor, teacher_GBK: Tensor) -> tuple[Tensor, Tensor]:
    student = student_VBK.detach().requires_grad_()
    if name == "published":
        published = Loss(settings.prototypes, num_views=VIEWS, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP).to(
            settings.device
        )
        loss = published(student.flatten(0, 1), teacher_GBK.flatten(0, 1))
    else:
        centre = Centre(settings.prototypes).to(settings.device)
        with torch.no_grad():
            targets = log_probabilities(teacher_GBK, centre, TEACHER_TEMP).exp_()
        loss = dino_loss(student, targets, student_temp=STUDENT_TEMP)
        centre.move(0.9)
    loss.backward()
    assert student.grad is not None
    return loss.detach(), student.grad


def refuse_difference(settings: Settings) -> None:
    logits = drawn(settings)
    (published, of_published), (ours, of_ours) = (
        loss_and_gradient(name, settings, *logits) for name in ("published", "ours")
    )
    if (
        not torch.isclose(ours, published, rtol=1e-5)
        or (of_ours - of_published).abs().max() > 1e-5 * of_published.abs().max()
    ):
        raise RuntimeError(f"not the same: loss {published.item()} and {ours.item()}")


def peak_bytes(name: str, settings: Settings) -> int:
    """Beside the logits and what the process had before."""
    small = Settings(images=1, prototypes=64, device=settings.device)
    loss_and_gradient(name, small, *drawn(small))  # what torch brings with its first backward
    logits = drawn(settings)
    if settings.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradient(name, settings, *logits)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    loss_and_gradient(name, settings, *logits)
    return resident("VmHWM") - before


if __name__ == "__main__":
    main()
