"""AdamW over what learns, its rates set from the step: there is no scheduler whose state could be lost."""

from typing import Any

import torch
from torch.optim import AdamW

from ssl_global.methods.method import Method
from ssl_global.recipe import Optim
from ssl_global.schedules import Progress, cosine, linear, share_of, warmup_cosine


def build_optimizer(method: Method, optim: Optim, *, waiting_epochs: float = 0.0) -> AdamW:
    """Groups as the method has them. Fused where the device can.

    waiting_epochs  how long the recipe's encoders wait for what is new; then they have groups of their own
    """
    waiting = {p for encoder in method.recipe_encoders() for p in encoder.parameters()} if waiting_epochs else set()
    groups: list[dict[str, Any]] = []
    for group in method.parameter_groups():
        apart = [p for p in group["params"] if p in waiting]
        others = [p for p in group["params"] if p not in waiting]
        groups += [{**group, "params": others, "waiting_epochs": 0.0}] if others else []
        groups += [{**group, "params": apart, "waiting_epochs": waiting_epochs}] if apart else []
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda", "mps")
    return AdamW(groups, lr=0.0, betas=optim.betas, fused=fused)


def peak_lr(optim: Optim, global_batch: int) -> float:
    """The linear rule (Goyal et al. 2017): twice the images in a step, twice the rate."""
    return optim.lr_per_256_images * global_batch / 256


def set_rates(optimizer: torch.optim.Optimizer, optim: Optim, global_batch: int, progress: Progress) -> float:
    """Set learning rates and weight decay for the coming step; returns the rate that groups have shares of."""
    lr = warmup_cosine(peak_lr(optim, global_batch), optim.lr_end, warmup_epochs=optim.warmup_epochs, progress=progress)
    weight_decay = cosine(*optim.weight_decay, progress.share)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] * awake(group["waiting_epochs"], optim.warmup_epochs, progress)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return lr


def awake(waiting_epochs: float, warmup_epochs: float, progress: Progress) -> float:
    """The share of its rate that a group has by now: if it waited, it rises from 0 over the warm-up's length."""
    if not waiting_epochs:
        return 1.0
    return linear(0.0, 1.0, share_of(progress.epoch - waiting_epochs, warmup_epochs))


def withhold(optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """No gradient for groups that wait: neither their weights nor their averages move, and clipping looks past them."""
    for group in optimizer.param_groups:
        if progress.epoch < group["waiting_epochs"]:
            for parameter in group["params"]:
                parameter.grad = None
