"""The tensors of a checkpoint, away from the processes that wrote it: read one by one, whichever way they were cut.

A shard is a safetensors file; its header's metadata has, for each tensor in it, the place of this part in the whole, as
torch.distributed.checkpoint's HuggingFaceStorageWriter writes it. Memory: the largest tensor, once.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ssl_global.errors import UserError

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
    """`with Sharded(folder) as kept: kept.read(name)`.

    Raises UserError, naming the file, for what is no shard of a checkpoint, and for tensors whose parts do not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Sharded":
        self.parts: dict[str, list[Part]] = {}
        with contextlib.ExitStack() as files:
            for path in sorted(self.folder.glob("*.safetensors")):
                try:
                    self.add(files.enter_context(safe_open(path, framework="pt")))
                except Exception as error:  # whoever made it: the parsers raise whatever they stumble over
                    raise UserError(f"{path}: no shard of a checkpoint: {error}".splitlines()[0]) from error
            for name, parts in self.parts.items():
                if not fit(parts):
                    raise UserError(f"{self.folder}: the parts of {name} do not make a whole tensor")
            self.files = files.pop_all()
        return self

    def add(self, file: Any) -> None:
        """An open shard. Raises ValueError or whatever a header of somebody else's makes of itself."""
        places = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            cut = file.get_slice(name)
            shape, dtype = cut.get_shape(), cut.get_dtype()
            offsets = places.get(name, {}).get("saved_offsets", [0] * len(shape))
            if dtype not in TYPES.values():
                raise ValueError(f"{name} is of the type {dtype}")
            if len(offsets) != len(shape) or not all(type(offset) is int and offset >= 0 for offset in offsets):
                raise ValueError(f"{name} begins at {offsets}, its shape is {shape}")
            self.parts.setdefault(name, []).append(Part(file, offsets, shape))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.parts if name.startswith(prefix))

    def shape(self, name: str) -> list[int]:
        """Of the whole tensor."""
        return whole_shape(self.parts[name])

    def table(self) -> dict[str, list[Any]]:
        """{name: [dtype, *shape]} of the whole tensors."""
        types = {name: str(dtype).removeprefix("torch.") for dtype, name in TYPES.items()}
        return {
            name: [types[parts[0].file.get_slice(name).get_dtype()], *whole_shape(parts)]
            for name, parts in self.parts.items()
        }

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


def whole_shape(parts: list[Part]) -> list[int]:
    return [max(p.offsets[d] + p.shape[d] for p in parts) for d in range(len(parts[0].shape))]


def fit(parts: list[Part]) -> bool:
    """Of equally many dimensions, and as many numbers as the whole has: what is read is never larger than the files."""
    if len({len(part.shape) for part in parts}) > 1:
        return False
    return sum(math.prod(part.shape) for part in parts) >= math.prod(whole_shape(parts))


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
