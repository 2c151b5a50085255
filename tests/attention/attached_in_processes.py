"""For test_attach: run by torchrun in two processes. Each writes the gradients that it has after one step."""

import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ssl_global.attention.attach import attach


def model_with_attention():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", dynamic_img_size=True)
    attached = attach(model, {"blocks.2": "non_local", "blocks.4": "cbam"})
    with torch.no_grad():
        for one in attached.places.values():
            for gate in one.attention.gate_parameters():
                gate += 0.3
    return model.eval()  # batch norms see all images in one process, and half of them in two


def gradients(model, images):
    model(images).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    images = torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    if rank == 0:
        torch.save(gradients(model_with_attention(), images), folder / "one.pt")
    wrapped = DistributedDataParallel(model_with_attention())
    torch.save(gradients(wrapped, images.chunk(2)[rank]), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
