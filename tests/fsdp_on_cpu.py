"""A job with FSDP2 over gloo: `torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py [--shards N | --finetune] ARGUMENTS`.

Accelerate 1.15 shards on GPUs only and replicates silently elsewhere. Its state is told here that this is FSDP, after
which prepare, backward, accumulation and clipping take their FSDP2 path. This reaches into Accelerate: tests only.
--shards N replicates groups of N processes (HSDP). The job is pretrain.py's, or with --finetune that one's.
"""

import sys

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from ssl_global import finetune, pretrain
from ssl_global.training import processes


def start_sharded(*, shards: int | None, **how) -> tuple[Accelerator, dist.Store | None]:
    accelerator, store = START(**how)
    if accelerator.num_processes > 1:
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False
        )
        if shards is not None:
            replicas = accelerator.num_processes // shards
            sizes = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
            mesh = sizes.build_device_mesh("cpu")
            AcceleratorState._shared_state["parallelism_config"] = sizes
            AcceleratorState._shared_state["device_mesh"] = mesh
        assert accelerator.is_fsdp2
    return accelerator, store


START = processes.start

if __name__ == "__main__":
    words, number, job = sys.argv[1:], None, pretrain.main
    if words[0] == "--shards":
        number, words = int(words[1]), words[2:]
    elif words[0] == "--finetune":
        job, words = finetune.main, words[1:]
    processes.start = lambda **how: start_sharded(shards=number, **how)  # type: ignore[assignment]
    job(words)
