"""The processes of a run: how they meet, and how one of them does what must be done once.

Accelerate would make the process group itself. It is made here first, and Accelerate takes it as it is, for two
reasons. torchrun's restarted workers find the addresses of the dead ones in the agent's store (torch 2.15 gives all
attempts the same keys, pytorch#135712): here each attempt has its own. And the group carries CPU tensors beside the
GPU's, for checkpoints and for parameters that are kept on the CPU.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs

from ssl_global.errors import UserError

# How long a collective may wait (ours): for a fetched data set, a compiled model, an evaluation on the main process.
# A run that hangs in the middle is ended much sooner, by training/watch.py.
PATIENCE = timedelta(hours=6)

T = TypeVar("T")


def start(*, cpu: bool, precision: str, trackers: list[str], run: str) -> tuple[Accelerator, dist.Store | None]:
    """Accelerate, with the processes and the device from how it was launched; and where the processes leave notes.

    Raises UserError for what this machine cannot do.
    """
    store = meet(on_gpu=torch.cuda.is_available() and not cpu)
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision={"fp32": "no"}.get(precision, precision),
            log_with=trackers or None,
            project_dir=run,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise UserError(str(error).replace("\n", " ")) from error
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes < world:
        raise UserError(
            f"WORLD_SIZE = {world}: Accelerate joins {accelerator.num_processes} of the processes; "
            "without GPUs --device cpu joins all"
        )
    return accelerator, store


def meet(*, on_gpu: bool) -> dist.Store | None:
    """Make the process group, if there is more than one process and a place to meet. Returns its store."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        return None  # alone; or Accelerate finds out by itself (MPI)
    rank = int(os.environ["RANK"])
    launcher_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=rank == 0 and not launcher_has_it, timeout=PATIENCE)
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if on_gpu else "gloo",
        store=dist.PrefixStore(f"{attempt()}/group", store), rank=rank, world_size=world, timeout=PATIENCE,
    )  # fmt: skip
    # A connection of its own: while the group waits on the first one, notes go through the second.
    notes = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=20))
    return dist.PrefixStore(f"{attempt()}/notes", notes)


def restarted() -> bool:
    """Whether the launcher has begun these processes again, after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def attempt() -> str:
    """Each machine's agent counts restarts by itself, so over several machines the number would not be the same."""
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_machine else 0}"


def here(accelerator: Accelerator) -> int:
    """Training processes on this machine: they share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def on_main_for_all(work: Callable[[], T]) -> T:
    """What `work` gives on the main process, on all of them; its UserError too. All must call it."""
    if not dist.is_initialized():
        return work()
    told: list[tuple[T | None, str | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            told = [(work(), None)]
        except UserError as error:
            told = [(None, str(error))]
    dist.broadcast_object_list(told)
    ((result, complaint),) = told
    if complaint is not None:
        raise UserError(complaint)
    return result  # type: ignore[return-value]
