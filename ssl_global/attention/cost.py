"""What a model costs: parameters, arithmetic, and the memory that training it takes, before a run is paid for.

    cost("swin_tiny_patch4_window7_224", (3, 512, 512), batch=8)
    cost(model, batch=8)           # any module that is given (B, C, H, W)

Without an accelerator it is a dry run on tensors without content (FakeTensorMode): nothing is computed, no memory is
taken, and shapes, operations and what autograd keeps are those of a real run on the CPU, exactly (tested), attention
on fused kernels included. For the memory of a GPU that is an estimate, and called so: its kernels keep about the same,
but need room besides. With an accelerator a step is run there and its peak is measured.
"""

import copy
import difflib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssl_global.attention.layout import tensors_of
from ssl_global.attention.places import input_size_of

Precision = Literal["fp32", "bf16"]  # of the forward pass; weights are float32
ADAMW_BYTES = 16  # of a float32 parameter that learns: itself, its gradient, and AdamW's two averages
FROZEN_BYTES = 4
ESTIMATE = "estimated by a dry run"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one training step on `batch` images of `input_size`, (channels, height, width)."""

    input_size: tuple[int, int, int]
    batch: int
    parameters: int
    learning: int  # of the parameters; the others are frozen
    flops: int  # of the forward pass, 2 to a multiply-add; papers that say FLOPs often count multiply-adds
    activation_bytes: int  # kept from forward for backward; where it is measured, all that a step needs at its peak
    source: str  # of activation_bytes: ESTIMATE, or "measured on cuda"

    @property
    def training_bytes(self) -> int:
        """With float32 weights and AdamW."""
        frozen = self.parameters - self.learning
        return self.learning * ADAMW_BYTES + frozen * FROZEN_BYTES + self.activation_bytes

    def __str__(self) -> str:
        return table([{"what": "backbone", **figures(self)}], self)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"training_bytes": self.training_bytes}


def cost(
    model: nn.Module | str,
    input_size: tuple[int, int, int] | None = None,
    batch: int = 1,
    *,
    precision: Precision = "fp32",
    device: torch.device | None = None,
) -> Cost:
    """Of a model, or of timm's of that name.

    input_size  (channels, height, width) of an image, or of a module's features; by default what the model says
    precision   bf16: under autocast
    device      where a step is measured; by default the accelerator, if there is one. "cpu" always estimates

    Raises ValueError for a name that is none, and for images that the model does not take.
    """
    if batch < 1:
        raise ValueError(f"batch = {batch}: at least 1")
    model = named(model) if isinstance(model, str) else model
    size = input_size or input_size_of(model)
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parameters = list(model.parameters())
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        dry = copy.deepcopy(model)
    try:
        with fake:
            flops, kept_bytes = dry_run(dry.train(), zeros_for(model, batch, size), precision)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{type(model).__name__}: takes no images of {size}: {reason}") from error
    source = ESTIMATE
    if device.type != "cpu":
        images = zeros_for(model, batch, size).to(device)
        try:
            kept_bytes, source = peak_of_a_step(model, images, precision), f"measured on {device.type}"
        except torch.OutOfMemoryError:
            source = f"{ESTIMATE}: more than {device.type} has free"
    return Cost(
        input_size=size,
        batch=batch,
        parameters=sum(p.numel() for p in parameters),
        learning=sum(p.numel() for p in parameters if p.requires_grad),
        flops=flops,
        activation_bytes=kept_bytes,
        source=source,
    )


def named(name: str) -> nn.Module:
    """timm's model of that name, untrained: only its sizes matter."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(f"{name}: no model of timm; the nearest are {', '.join(nearest) or 'none'}")
    model: nn.Module = timm.create_model(architecture, num_classes=0)
    return model


def zeros_for(model: nn.Module, batch: int, size: tuple[int, int, int]) -> Tensor:
    """Images where the model is, in its precision."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(batch, *size, dtype=like.dtype, device=like.device)


def dry_run(model: nn.Module, images: Tensor, precision: Precision) -> tuple[int, int]:
    """FLOPs of the forward pass, and bytes that it keeps for backward beside the model's own."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # one storage may be kept by several operations, and takes its room once
        return tensor

    with (
        torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        outputs = model(images)  # bound to a name: what nobody holds is not kept
    del outputs
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def peak_of_a_step(model: nn.Module, images: Tensor, precision: Precision) -> int:
    """Bytes that forward and backward take on the images' device beside weights and gradients."""
    model = copy.deepcopy(model).to(images.device).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    before = torch.accelerator.memory_allocated(images.device)
    torch.accelerator.reset_peak_memory_stats(images.device)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        outputs = model(images)
    torch.stack(
        [tensor.float().square().mean() for tensor in tensors_of(outputs) if tensor.requires_grad]
    ).sum().backward()
    return torch.accelerator.max_memory_allocated(images.device) - before


@dataclass(frozen=True)
class Report:
    """What attached modules cost: without them, with all of them, and with each alone. str() of it is a table."""

    before: Cost
    after: Cost
    alone: dict[str, Cost]  # by place
    names: dict[str, str]
    gates: dict[str, float | None]

    def rows(self) -> list[dict[str, Any]]:
        """The backbone, what each module adds to it alone, and all together."""
        rows: list[dict[str, Any]] = [{"what": "backbone", **figures(self.before)}]
        for place, alone in self.alone.items():
            added = {key: value - figures(self.before)[key] for key, value in figures(alone).items()}
            rows.append({"what": f"+ {self.names[place]} at {place}", **added, "gate": self.gates[place]})
        return [*rows, {"what": "with all of them", **figures(self.after)}]

    def __str__(self) -> str:
        return table(self.rows(), self.after)


def table(rows: list[dict[str, Any]], of: Cost) -> str:
    gates = ["gate"] if any("gate" in row for row in rows) else []
    lines = [["", "parameters, M", "GFLOPs", "activations, MB", "training, MB", *gates]]
    for row in rows:
        millions = [f"{row['parameters'] / 1e6:.3f}", f"{row['flops'] / 1e9:.3f}"]
        megabytes = [f"{row[name] / 1e6:.1f}" for name in ("activation_bytes", "training_bytes")]
        gate = row.get("gate")
        lines.append([row["what"], *millions, *megabytes, *("" if gate is None else f"{gate:.3g}" for _ in gates)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    images = " x ".join(map(str, (of.batch, *of.input_size)))
    return "\n".join([*shown, f"images {images}; memory {of.source}"])


def figures(of: Cost) -> dict[str, int]:
    return {name: getattr(of, name) for name in ("parameters", "flops", "activation_bytes", "training_bytes")}
