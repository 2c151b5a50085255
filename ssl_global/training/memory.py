"""What a step takes of a device's memory, counted tensor by tensor, and what a process has taken so far.

A step's tensors come and go; what counts is how much is there at once. Here each operation's results are followed from
their making to their end: on the CPU, whose allocator keeps no books, and on tensors without content (FakeTensorMode),
where nothing is computed at all. Both count the same. A GPU's own allocator says it by itself.

Not seen: what a kernel needs inside itself, and what an allocator rounds up or cannot use.
"""

import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on: bytes of all tensors that operations make, as long as anyone holds them.

    own   tensors that were there before and do not count

    peak       the most that was there at once
    casts      of that, copies of `own` in another precision, as autocast makes of weights
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.own = {storage_of(tensor)._cdata for tensor in own}
        self.known: dict[int, Any] = {}
        self.live = self.live_casts = self.peak = self.casts = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and storage_of(args[0])._cdata in self.own
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.see(storage_of(tensor), cast=cast)
        return made

    def see(self, storage: torch.UntypedStorage, *, cast: bool) -> None:
        place = storage._cdata
        if place in self.own or place in self.known:
            return
        size = storage.nbytes()
        self.known[place] = weakref.finalize(storage, self.gone, place, size, cast)
        self.live += size
        self.live_casts += size if cast else 0
        if self.live > self.peak:
            self.peak, self.casts = self.live, self.live_casts

    def gone(self, place: int, size: int, cast: bool) -> None:
        del self.known[place]
        self.live -= size
        self.live_casts -= size if cast else 0

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for watched in list(self.known.values()):
            watched.detach()


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All that it keeps, and its gradients."""
    parameters = list(module.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [*parameters, *module.buffers(), *gradients]


def peak_bytes(device: torch.device) -> int:
    """The most that this process has had at once: of the GPU's memory, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
