"""Where a loss or gradient stopped being finite: which layer, on which process. Asked once, when a run has to end."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ssl_global.methods.method import Batch, Method
from ssl_global.schedules import Progress
from ssl_global.training.engine import local


def where_not_finite(model: nn.Module, method: Method, batch: Batch, progress: Progress) -> list[str]:
    """Takes the batch through the model once more, without gradients, and says what was met first, process by process.

    All processes must call it. The model is as it was afterwards, its hooks too.
    """
    # The model may wait for the other processes: none of them may call it alone.
    if found := of_all([*bad_parameters(method), *bad_views(batch)]):
        return found
    last = "weights, images and outputs are finite: the gradient overflowed on the way back"
    return of_all(bad_outputs(model, method, batch, progress) or [last])


def of_all(mine: list[str]) -> list[str]:
    """The lines of all processes, each with its number."""
    mine = [f"process {dist.get_rank() if dist.is_initialized() else 0}: {line}" for line in mine]
    everyone = [mine]
    if dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    return [line for lines in everyone for line in lines]


def bad_parameters(method: Method) -> list[str]:
    names = [name for name, tensor in method.state_dict().items() if not finite(tensor)]
    return [f"the weights of {names[0]} and {len(names) - 1} more are not finite"] if names else []


def bad_views(batch: Batch) -> list[str]:
    return [
        f"view {number} of {batch['key'][image]} is not finite"
        for number, view in enumerate(batch["views"])
        for image in range(len(view))
        if not finite(view[image])
    ][:3]


def bad_outputs(model: nn.Module, method: Method, batch: Batch, progress: Progress) -> list[str]:
    """The first module, in the order in which they compute, whose output is not finite."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if not found and not all(map(finite, tensors_in(output))):
                largest = max((float(local(t).abs().max()) for t in tensors_in(given) if t.numel()), default=0.0)
                found.append(
                    f"the output of {name} ({type(module).__name__}) is not finite; largest input {largest:.3g}"
                )

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in method.named_modules() if name]
    try:
        with torch.no_grad():
            loss = model(batch, progress)["loss"]
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not finite(loss):
        found.append("every layer's output is finite, the loss is not")
    return found


def tensors_in(output: Any) -> list[Tensor]:
    """Of tensors, lists, dicts, and dataclasses such as Tokens."""
    content = vars(output) if hasattr(output, "__dataclass_fields__") else output
    return [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(local(tensor)).all())
