"""One of two processes: synchronised batch norms beside torch's own of the whole batch. Prints what is different."""

import copy
import json

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from ssl_global.attention.base import BatchNorm
from ssl_global.training.batch_norm import synchronise

TOLERANCE = 1e-12


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    different = {}
    for name, norm, shape in (
        ("BatchNorm2d", nn.BatchNorm2d(3), (6, 3, 5, 4)),
        ("BatchNorm1d", nn.BatchNorm1d(3, momentum=None), (6, 3)),
        ("without affine", nn.BatchNorm1d(3, affine=False), (6, 3, 7)),
        ("without running", nn.BatchNorm2d(3, track_running_stats=False), (6, 3, 2, 2)),
        ("timm's with its activation", BatchNormAct2d(3), (6, 3, 5, 4)),
        ("ours", BatchNorm(3), (2, 3, 1, 1)),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(norm, nn.Identity()).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        whole = copy.deepcopy(model)
        synchronise(model, torch.device("cpu"))
        assert isinstance(model[0], type(norm))
        x, weights = torch.randn(shape).double(), torch.randn(shape).double()
        for _ in range(2):
            full, mine = x.clone().requires_grad_(), x.chunk(2)[rank].clone().requires_grad_()
            y, expected = model(mine), whole(full)
            model.zero_grad()
            whole.zero_grad()
            (y * weights.chunk(2)[rank]).sum().backward()
            (expected * weights).sum().backward()
            pairs = [(y, expected.chunk(2)[rank]), (mine.grad, full.grad.chunk(2)[rank])]
            for a, b in zip(model.parameters(), whole.parameters(), strict=True):
                dist.all_reduce(a.grad)
                pairs.append((a.grad, b.grad))
            pairs += list(zip(model.buffers(), whole.buffers(), strict=True))
            model.eval(), whole.eval()
            if norm.track_running_stats:  # else each judges its own images by themselves
                pairs.append((model(mine), whole(full).chunk(2)[rank]))
            model.train(), whole.train()
            worst = max(((a - b).abs().max().item() for a, b in pairs), default=0.0)
            different[name] = max(different.get(name, 0.0), worst)
    if rank == 0:
        print(json.dumps(different))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
