"""The k-NN of features beside the published loop.

    python -m benchmarks knn --out knn.json

100 000 images in the bank and 10 000 queries of ViT-S's width, 20 neighbours, temperature 0.07; the classes overlap, so
votes are close. Both give the same answer to every query but where two classes have the same votes, to rounding.
Normalising is the caller's in the published one, and is outside of its time; ours does it itself.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.measure import compare, report
from benchmarks.reference import knn as published
from ssl_global.evaluation.knn import knn_predict

NEIGHBOURS, TEMP = 20, 0.07
CLOSE = 1e-4  # of the votes: closer than that, the order of sums decides


@dataclass(frozen=True)
class Settings:
    bank: int = 100_000
    queries: int = 10_000
    width: int = 384
    classes: int = 1000
    rounds: int = 3
    device: str = "cpu"
    threads: int = 0  # 0: torch's own
    out: Path | None = None


def main() -> None:
    settings = tyro.cli(Settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    given = drawn(settings)
    print(refuse_difference(settings, *given))
    options = {name: partial(work, name, settings, *given) for name in ("published", "ours")}
    comparison = compare("k-NN, a query", options, rounds=settings.rounds, warm_up=False)
    report([comparison], {"knn: times faster": (comparison.ratio("ours"), 1.0)}, settings.out)


def drawn(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised bank (N, D) and queries (M, D), each with its labels."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(settings.classes, settings.width, generator=generator)

    def some(number: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(settings.classes, (number,), generator=generator)
        features = centres[labels] + 3 * torch.randn(number, settings.width, generator=generator)
        return F.normalize(features, dim=1).to(settings.device), labels.to(settings.device)

    return (*some(settings.bank), *some(settings.queries))


def work(name: str, settings: Settings, bank: Tensor, labels: Tensor, queries: Tensor, _: Tensor) -> int:
    answers(name, settings, bank, labels, queries)
    if settings.device != "cpu":
        torch.cuda.synchronize()
    return len(queries)


def answers(name: str, settings: Settings, bank: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    if name == "ours":
        return knn_predict(bank, labels, queries, neighbours=NEIGHBOURS, temp=TEMP)
    return published.predict(
        bank, labels, queries, neighbours=NEIGHBOURS, temp=TEMP, num_classes=settings.classes
    )  # fmt: skip


def refuse_difference(settings: Settings, bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> str:
    """Also warms both up. Returns a line with the accuracies."""
    theirs, ours = (answers(name, settings, bank, labels, queries) for name in ("published", "ours"))
    for row in (theirs != ours).nonzero()[:, 0].tolist():
        similarity, places = (queries[row].double() @ bank.double().T).topk(NEIGHBOURS)
        votes = torch.zeros(settings.classes, dtype=torch.float64, device=bank.device)
        votes.index_add_(0, labels[places], (similarity / TEMP).exp())
        gap = (votes[theirs[row]] - votes[ours[row]]).abs() / votes.max()
        if gap > CLOSE:
            raise RuntimeError(f"query {row}: published says {theirs[row]}, ours {ours[row]}, votes {gap:.2g} apart")
    accuracies = [float((answer == truth).float().mean()) for answer in (theirs, ours)]
    differ = int((theirs != ours).sum())
    return f"accuracy: published {accuracies[0]:.4f}, ours {accuracies[1]:.4f}; answers that differ, all ties: {differ}"


if __name__ == "__main__":
    main()
