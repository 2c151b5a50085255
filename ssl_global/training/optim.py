"""AdamW over what learns, its rates set from the step: there is no scheduler whose state could be lost."""

from typing import Any

import torch
from torch.optim import AdamW

from ssl_global.methods.method import Method
from ssl_global.recipe import Optim
from ssl_global.schedules import Progress, cosine, warmup_cosine


def build_optimizer(method: Method, optim: Optim) -> AdamW:
    """Groups as the method has them. Fused where the device can."""
    groups: list[dict[str, Any]] = [{**group} for group in method.parameter_groups()]
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
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return lr
