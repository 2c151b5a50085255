"""Checkpoints of 1, 2 and 4 processes, replicated and sharded, each loaded by each: run by torchrun with 4 processes.

`torchrun --nproc_per_node 4 resharding.py FOLDER` prints, as JSON, what was compared and what each process had to keep.
Smaller worlds are made of the first processes of the four, in a group that they make for a while.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from recipes_under_test import load_recipe
from timm.models.vision_transformer import Block
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ssl_global.methods.method import Method
from ssl_global.training import checkpoint
from ssl_global.training.checkpoint import Layout, RunState, Writer
from ssl_global.training.engine import local, whole
from ssl_global.training.optim import build_optimizer

RECIPES = {name: load_recipe(name, "demo", width=48, depth=2, heads=2) for name in ("dino", "mae")}
WAYS = [(1, "replicated"), (2, "replicated"), (2, "sharded"), (4, "replicated"), (4, "sharded")]
STEP = 5


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=120)
    )
    report: dict[str, list] = {"compared": [], "different": [], "kept_bytes": []}
    for turn in ("save", "load"):
        for world, way in WAYS:
            name = f"{turn} {world} {way}"
            if rank < world:
                group_store = dist.PrefixStore(name, store)
                dist.init_process_group("gloo", store=group_store, rank=rank, world_size=world)
                for kind in RECIPES:
                    (save if turn == "save" else load_all)(folder, kind, world, way, report)
                dist.barrier()
                dist.destroy_process_group()
            store.set(f"{name} {rank}", "done")
            store.wait([f"{name} {other}" for other in range(4)])
    if rank == 0:
        print(json.dumps(report))


def build(kind: str, way: str, seed: int) -> tuple[Method, torch.optim.Optimizer]:
    """The method after a step whose gradients are random, the same on every process however it is shared."""
    recipe = RECIPES[kind]
    torch.manual_seed(seed)
    method = recipe.method.build(recipe)
    for name, tensor in method.named_buffers():
        tensor.add_(torch.randn_like(tensor)) if name == "centre.value" else None
    gradients = {name: torch.randn_like(parameter) for name, parameter in method.named_parameters()}
    if way == "sharded":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in method.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        fully_shard(method, mesh=mesh)
    optimizer = build_optimizer(method, recipe.optim)
    for name, parameter in method.named_parameters():
        if parameter.requires_grad and "prototypes" not in name:  # frozen at first: the optimizer knows nothing of them
            gradient = gradients[name]
            shared = isinstance(parameter, DTensor)
            parameter.grad = (
                distribute_tensor(gradient, parameter.device_mesh, parameter.placements) if shared else gradient
            )
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    return method, optimizer


def save(folder: Path, kind: str, world: int, way: str, report: dict) -> None:
    method, optimizer = build(kind, way, seed=0)
    kept = sum(local(t).numel() * t.element_size() for t in checkpoint.tensors(method, optimizer).values())
    report["kept_bytes"].append([kind, world, way, kept])
    layout = Layout(processes=world, engine=way, micro_batch=1, accumulate=1, workers=0)
    writer = Writer(folder / f"{kind}-{world}-{way}", RECIPES[kind], layout)
    writer.save(method, optimizer, RunState(step=STEP, images=77), wait=world != 2)
    writer.settle(must=True)


def load_all(folder: Path, kind: str, world: int, way: str, report: dict) -> None:
    """Into a method with other weights; what comes out is compared with what one process would have."""
    want = {name: tensor.clone() for name, tensor in checkpoint.tensors(*build(kind, "replicated", seed=0)).items()}
    for saved_world, saved_way in WAYS:
        method, optimizer = build(kind, way, seed=1)
        found = checkpoint.newest(folder / f"{kind}-{saved_world}-{saved_way}")
        assert found is not None
        path, record, _ = found
        assert checkpoint.load(path, method, optimizer, record) == RunState(step=STEP, images=77)
        have = {name: whole(tensor) for name, tensor in checkpoint.tensors(method, optimizer).items()}
        pair = f"{kind}: {saved_world} {saved_way} -> {world} {way}"
        report["compared"].append([pair, len(have), len(record["files"])])
        wrong = [name for name in want.keys() | have.keys() if name not in want or name not in have]
        wrong += [name for name in want.keys() & have.keys() if not torch.equal(want[name], have[name])]
        report["different"] += [[pair, name] for name in wrong]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
