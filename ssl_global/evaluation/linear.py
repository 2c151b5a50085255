"""How much a linear layer reads out of frozen features.

The protocol of DINO (eval_linear.py: SGD, momentum 0.9, no weight decay, cosine, 100 epochs) on MAE's standardised
features (He et al. 2021, https://arxiv.org/abs/2111.06377, appendix A.1: a BatchNorm without affine parameters).

Not as there: the features are computed once, from one plain view, not anew from random crops in each epoch. They are
standardised with the mean and spread of all training features, not of each batch. Several learning rates are trained
side by side, as DINOv2 does.

    N  training images    M  images to judge    D  width    C  classes    L  learning rates    B  images of a step
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_global.evaluation.features import Split
from ssl_global.evaluation.knn import confusion_matrix
from ssl_global.schedules import cosine

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # ours, for batches of 256 standardised features
EPOCHS = 100  # DINO, eval_linear.py
BATCH = 256  # ours; DINO's is 1024 over all processes, with the learning rate scaled to it
MOMENTUM = 0.9  # DINO, eval_linear.py
SMALL_STEP = 2**25  # ours, multiply-adds: a step of about a millisecond gains nothing from a second thread
VARIANCE_FLOOR = 1e-6  # MAE, main_linprobe.py: the BatchNorm's eps


@dataclass(frozen=True)
class LinearResult:
    """The best of several probes, and all of them."""

    top1: float  # 0 to 1, the best probe's
    best_lr: float
    table: list[dict[str, float]]  # {"lr": ..., "top1": ...} of each probe, in the order of the learning rates
    confusion: Tensor  # int64 (C, C), the best probe's: row = true class, column = answer


def linear(split: Split, *, device: torch.device, seed: int = 0) -> LinearResult:
    """`linear_probe` of features that `ssl_global.evaluation.features.split` put side by side."""
    train_ND, train_labels, val_MD, val_labels = (tensor.to(device) for tensor in split.tensors())
    return linear_probe(train_ND, train_labels, val_MD, val_labels, num_classes=split.num_classes, seed=seed)


def linear_probe(
    train_ND: Tensor,
    train_labels: Tensor,
    val_MD: Tensor,
    val_labels: Tensor,
    *,
    num_classes: int,
    lrs: tuple[float, ...] = LEARNING_RATES,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    seed: int = 0,
) -> LinearResult:
    """Trains a linear classifier at each learning rate and reports the best on val, with the whole table.

    The best is picked on val itself, as the published figures of DINO and MAE are: compare it with those, and not
    with accuracies on images that no choice has seen. Labels are int64, 0 to num_classes - 1.
    """
    train_ND, val_MD = standardise(train_ND.float(), val_MD.float())
    with one_thread_if(min(batch, len(train_ND)) * train_ND.shape[1] * len(lrs) * num_classes < SMALL_STEP):
        weight_DLC, bias_LC = train_probes(
            train_ND, train_labels, num_classes=num_classes, lrs=lrs, epochs=epochs, batch=batch, seed=seed
        )
    answers_ML = (torch.einsum("md,dlc->mlc", val_MD, weight_DLC) + bias_LC).argmax(dim=2)
    top1_L = (answers_ML == val_labels[:, None]).float().mean(dim=0)
    best = int(top1_L.argmax())
    return LinearResult(
        top1=top1_L[best].item(),
        best_lr=lrs[best],
        table=[{"lr": lr, "top1": top1} for lr, top1 in zip(lrs, top1_L.tolist(), strict=True)],
        confusion=confusion_matrix(val_labels, answers_ML[:, best], num_classes).cpu(),
    )


@contextmanager
def one_thread_if(small: bool) -> Iterator[None]:
    """On a CPU that others use too, threads that wait for each other after each small operation cost 40 times the work.

    Measured on 2 busy cores, 3000 features of 192 numbers, 16 classes: 68 s with two threads, 1.8 s with one.
    """
    before = torch.get_num_threads()
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def standardise(train_ND: Tensor, val_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the training features' mean and spread: each of the D numbers has mean 0 and variance 1 over N."""
    mean_D = train_ND.mean(dim=0)
    spread_D = (train_ND.var(dim=0, correction=0) + VARIANCE_FLOOR).sqrt()
    return (train_ND - mean_D) / spread_D, (val_MD - mean_D) / spread_D


def train_probes(
    x_ND: Tensor,
    labels_N: Tensor,
    *,
    num_classes: int,
    lrs: tuple[float, ...],
    epochs: int,
    batch: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """weight (D, L, C) and bias (L, C) of one probe for each learning rate: all see the same batches.

    SGD at rate 1 on `lr * loss` moves as SGD at rate lr on `loss`, momentum included; so one optimizer, with the
    cosine as its rate, serves all. The problem is convex: they start at zero.
    """
    num_probes = len(lrs)
    lr_L = torch.tensor(lrs, device=x_ND.device)
    weight_DLC = torch.zeros(x_ND.shape[1], num_probes, num_classes, device=x_ND.device, requires_grad=True)
    bias_LC = torch.zeros(num_probes, num_classes, device=x_ND.device, requires_grad=True)
    optimizer = torch.optim.SGD([weight_DLC, bias_LC], lr=1.0, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(seed)
    order = [rows for _ in range(epochs) for rows in torch.randperm(len(x_ND), generator=generator).split(batch)]
    for step, rows in enumerate(order):
        optimizer.param_groups[0]["lr"] = cosine(1.0, 0.0, step / len(order))
        rows = rows.to(x_ND.device)
        logits_BLC = torch.einsum("bd,dlc->blc", x_ND[rows], weight_DLC) + bias_LC
        labels_BL = labels_N[rows, None].expand(-1, num_probes)
        loss_BL = F.cross_entropy(logits_BLC.flatten(0, 1), labels_BL.flatten(), reduction="none").view(-1, num_probes)
        (lr_L * loss_BL.mean(dim=0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight_DLC.detach(), bias_LC.detach()
