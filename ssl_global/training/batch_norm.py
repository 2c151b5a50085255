"""Batch norms over the images that all processes take at once, so that N processes learn what one does.

Where a batch is taken in parts, each part has statistics of its own, as everywhere.

On GPUs these are torch's, brought in by timm, which keeps the activations of its own norms. torch has none for CPUs, so
there the norms' classes get this one in front:

    mean = sum over all processes, images and places of x / their number n
    var  = sum of (x - mean)^2 / n                      (n - 1 for the running one, as torch)
    y    = (x - mean) / sqrt(var + eps) * weight + bias

with sums that gradients go through. Evidence: tests/training/test_batch_norm.py.
"""

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(model: nn.Module, device: torch.device) -> None:
    """In place; parameters and buffers stay the same tensors."""
    if device.type == "cuda":
        before = dict(model.named_modules())
        for child_name, child in list(model.named_children()):
            setattr(model, child_name, convert_sync_batchnorm(child))
        for name, module in before.items():
            keep_hooks(module, model.get_submodule(name))
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, Synchronised):
            own = type(module)
            module.__class__ = type(f"Synchronised{own.__name__}", (Synchronised, own), {"__module__": own.__module__})


def keep_hooks(before: nn.Module, now: nn.Module) -> None:
    """timm makes new modules, without the hooks: an attention module that stands at a norm would never be called."""
    for name, value in vars(before).items():
        if name.startswith(("_forward_", "_backward_")) and isinstance(value, dict):
            setattr(now, name, value)  # the same one, in which a hook's handle finds what it is to remove


class Synchronised(_BatchNorm):
    """In front of a class of batch norms. In eval mode that class's own."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y = self.standardised(x if x.dtype == torch.float64 else x.float())
        if self.weight is not None:
            y = y * along_channels(self.weight, x) + along_channels(self.bias, x)
        y = y.to(x.dtype)
        for name in ("drop", "act"):  # timm's norms have them inside
            part = getattr(self, name, None)
            y = y if part is None else part(y)
        return y

    def standardised(self, x: Tensor) -> Tensor:
        dims = [0, *range(2, x.ndim)]
        count = all_reduce(x.new_tensor(float(x.numel() // x.shape[1])))
        if count == 1:  # no deviation: as in evaluation
            mean, var = self.running_mean, self.running_var
            assert mean is not None
            assert var is not None
        else:
            mean = all_reduce(x.sum(dims)) / count
            var = all_reduce((x - along_channels(mean, x)).square().sum(dims)) / count
            self.follow(mean.detach(), var.detach() * count / (count - 1))
        return (x - along_channels(mean, x)) / along_channels(var + self.eps, x).sqrt()

    @torch.no_grad()
    def follow(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(var.to(self.running_var), share)


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))
