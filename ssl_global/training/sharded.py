"""The tensors of a checkpoint, away from the processes that wrote it: read one by one, whichever way they were cut.

A shard is a safetensors file; its header's metadata has, for each tensor in it, the place of this part in the whole, as
torch.distributed.checkpoint's HuggingFaceStorageWriter writes it. Memory: the largest tensor, once.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

METHOD, OPTIMIZER = "method/", "optimizer/"  # what a tensor's name begins with

# The names of torch's types in a safetensors header.
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Part(NamedTuple):
    """A piece of a tensor."""

    file: Any  # an open safetensors file
    offsets: list[int]  # of its first element, in each dimension of the whole
    shape: list[int]


class Sharded:
    """`with Sharded(folder) as kept: kept.read(name)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Sharded":
        self.parts: dict[str, list[Part]] = {}
        with contextlib.ExitStack() as files:
            for path in sorted(self.folder.glob("*.safetensors")):
                file = files.enter_context(safe_open(path, framework="pt"))
                places = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    shape = file.get_slice(name).get_shape()
                    offsets = places.get(name, {}).get("saved_offsets", [0] * len(shape))
                    self.parts.setdefault(name, []).append(Part(file, offsets, shape))
            self.files = files.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.parts if name.startswith(prefix))

    def shape(self, name: str) -> list[int]:
        """Of the whole tensor."""
        parts = self.parts[name]
        return [max(p.offsets[d] + p.shape[d] for p in parts) for d in range(len(parts[0].shape))]

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        parts = self.parts[name]
        if len(parts) == 1:
            return parts[0].file.get_tensor(name)
        whole = torch.empty(self.shape(name), dtype=parts[0].file.get_slice(name)[:0].dtype)
        for part in parts:
            place = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.shape, strict=True))
            whole[place] = part.file.get_tensor(name)
        return whole


def merge(kept: Sharded, names: Iterable[str], out: Path) -> Iterator[str]:
    """Write these tensors into one safetensors file, one after the other; yields each name when it is written.

    What says whether they are the method's or the optimizer's is left out of their names in the file.

    The file gets its name when it is whole. safetensors' own save_file wants all tensors in memory at once; the format
    is eight bytes of length, a JSON header of types, shapes and places, and the numbers.
    """
    names = list(names)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype = kept.parts[name][0].file.get_slice(name).get_dtype()
        begin, end = end, end + size_bytes(dtype, kept.shape(name))
        header[name.partition("/")[2]] = {
            "dtype": dtype, "shape": kept.shape(name), "data_offsets": [begin, end],
        }  # fmt: skip
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the numbers begin at a multiple of eight bytes, as the format asks
    temporary = out.with_name(f".{out.name}.unfinished")
    try:
        with temporary.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                tensor = kept.read(name).contiguous()
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
                yield name
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)


def size_bytes(dtype: str, shape: list[int]) -> int:
    itemsize = next(known.itemsize for known, name in TYPES.items() if name == dtype)
    return itemsize * torch.Size(shape).numel()
