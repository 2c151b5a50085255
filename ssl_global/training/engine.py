"""One code path for one process, DDP, FSDP2 and HSDP: what is done to a method before and after Accelerate prepares it.

The launch file says which engine it is (launch/*.yaml); what that means for this model is said here: which modules are
sharded each by itself (the transformer blocks), in which precision they travel, what is recomputed and compiled.

Under FSDP2 each process keeps its part of every parameter, of the teacher's and the optimizer's too. A part of the
model cannot be called by itself then: whoever wants the backbone whole, to judge or export it, asks `whole_backbone`.
"""

import contextlib
import os
import time

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import UserError
from ssl_global.methods.method import Method
from ssl_global.recipe import Recipe
from ssl_global.training.batch_norm import synchronise

BLOCKS = (Block, SwinTransformerBlock)  # what is compiled, and sharded, by itself
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name(accelerator: Accelerator) -> str:
    """In words."""
    if accelerator.num_processes == 1:
        return "one process"
    if not accelerator.is_fsdp2:
        return "DDP"
    sizes = accelerator.parallelism_config
    if sizes is not None and sizes.dp_replicate_size > 1:
        return f"HSDP, {sizes.dp_replicate_size} x {sizes.dp_shard_size}"
    return "FSDP2"


def prepare(
    accelerator: Accelerator, method: Method, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The method and its optimizer, on the device and shared as the launch file says.

    The method itself is changed in place under FSDP2, and stays as it is otherwise. Raises UserError where the launch
    file asks for what cannot be.
    """
    refuse_other_engines(accelerator)
    if recipe.train.recompute_activations:
        for encoder in method.backbones().values():
            encoder.recompute_activations()
    if recipe.train.compile:
        compile_blocks(method)
    if accelerator.num_processes > 1:
        synchronise(method, accelerator.device)
    if accelerator.is_fsdp2:
        shard_by_block(accelerator.state.fsdp_plugin, method, recipe.train.precision)
    model, prepared = accelerator.prepare(method, optimizer)
    return model, prepared


def compile_blocks(method: nn.Module, *, backend: str = "inductor") -> None:
    """Each block by itself. They share their code, and torch gives up on code that it has compiled eight times: room is
    made for each block's sizes of views, with and without gradient."""
    blocks = [module for module in method.modules() if isinstance(module, BLOCKS)]
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 8 * len(blocks))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 64 * len(blocks))
    for block in blocks:
        block.compile(backend=backend)


def state_bytes(method: Method) -> int:
    """What this process keeps for good: its part of weights, teacher and buffers, and AdamW's two averages."""
    kept = sum(local(tensor).numel() * tensor.element_size() for tensor in method.state_dict().values())
    learning = (parameter for parameter in method.parameters() if parameter.requires_grad)
    return kept + 2 * sum(local(parameter).numel() * parameter.element_size() for parameter in learning)


def refuse_other_engines(accelerator: Accelerator) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not accelerator.is_fsdp2:
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError(f"fsdp_version = {version}: this program shards with 2; launch/fsdp2.yaml has it")
        # Accelerate says nothing and replicates.
        raise UserError("distributed_type = FSDP: needs two GPUs or more; on CPUs use torchrun without a launch file")
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise UserError("fsdp_cpu_ram_efficient_loading = true: fails with buffers such as DINO's centre; give false")


def shard_by_block(plugin: FullyShardedDataParallelPlugin, method: Method, precision: str) -> None:
    """A unit for each transformer block, one for the rest. Gathered in the step's precision, reduced in float32."""
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(
        {type(module).__name__ for module in method.modules() if isinstance(module, BLOCKS)}
    )
    # Inputs are not cast: MAE's targets are the pixels themselves.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=None if precision == "fp32" else DTYPES[precision],
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )


def precision(accelerator: Accelerator, recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """Accelerate wraps the forward pass in autocast, but not under FSDP2: there it is done here."""
    if not accelerator.is_fsdp2 or recipe.train.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(accelerator.device.type, DTYPES[recipe.train.precision])


def slower_than_float32(device: torch.device, precision: str) -> str | None:
    """A line where it would be faster not to: processors without instructions for bfloat16 emulate it."""
    if device.type != "cpu" or precision != "bf16":
        return None
    times = seconds_of_a_product(torch.bfloat16) / seconds_of_a_product(torch.float32)
    if times <= 1:
        return None
    return f"train.precision = bf16: this processor's products take {times:.1f} times as long as in fp32"


def seconds_of_a_product(dtype: torch.dtype) -> float:
    """The best of three."""
    matrix, seconds = torch.ones(512, 512, dtype=dtype), []
    for _ in range(3):
        begin = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def clip(accelerator: Accelerator, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> Tensor:
    """Scale the whole gradient down to `clip_norm`, if it is longer; returns its norm before that, on the device.

    Its norm is that of all parts on all processes.
    """
    accelerator.unscale_gradients()
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in learning if parameter.grad is not None])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(learning, clip_norm, norm)
    return whole(norm).to(accelerator.device)


def whole(tensor: Tensor) -> Tensor:
    """All parts of it, on every process, which all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_backbone(method: Method, recipe: Recipe, device: torch.device) -> Encoder:
    """The method's first backbone, to be called by itself: the method's own, or a gathered copy where it is sharded."""
    encoder = next(iter(method.backbones().values()))
    return gathered(method, recipe, device) if is_sharded(encoder) else encoder


def seen_backbone(method: Method, recipe: Recipe, device: torch.device) -> Encoder:
    """The same, to be looked into with hooks, of which compiled blocks know nothing: then a copy too."""
    encoder = next(iter(method.backbones().values()))
    return gathered(method, recipe, device) if is_sharded(encoder) or recipe.train.compile else encoder


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in module.state_dict().values())


@torch.no_grad()
def gathered(method: Method, recipe: Recipe, device: torch.device) -> Encoder:
    """A copy of the method's first backbone, whole, not compiled."""
    tensors = next(iter(method.backbones().values())).state_dict()
    with torch.random.fork_rng(devices=[]):
        copy = method.new_backbone(recipe).to(device)
    own = copy.state_dict()
    for key, tensor in tensors.items():
        own[key].copy_(whole(tensor))
    return copy
