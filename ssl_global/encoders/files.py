"""A checkpoint's file as tensors by name, without running anything that is written in it.

.safetensors hold tensors alone. All else is a pickle, read by torch's own restricted reader (`weights_only=True`),
which makes tensors, containers and numbers. Two more kinds are let through, because the authors of MAE, DINO, iBOT and
EsViT save their settings beside the weights: argparse.Namespace, and numpy's scalars. Whatever else a pickle asks for
is named and refused: the file would run code of its choosing.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_global.errors import UserError

# What numpy's scalars are pickled by; "numpy.core" is what numpy 1 called it.
SCALAR = np.float64(0).__reduce__()[0]
KINDS = [type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")]
HARMLESS: list[Any] = [argparse.Namespace, np.dtype, SCALAR, (SCALAR, "numpy.core.multiarray.scalar"), *KINDS]

# Where several entries of a file hold weights, the first of these is taken: what its authors evaluate.
USUAL = ("teacher", "model_ema", "state_dict_ema", "model", "state_dict", "module", "student")


@dataclass(frozen=True)
class Weights:
    """What a file holds."""

    tensors: dict[str, Tensor]  # by the names in the file
    entry: str | None  # that they were found in; None: the file is them
    entries: tuple[str, ...]  # that could be chosen
    beside: tuple[str, ...]  # entries that hold no weights: optimizer, epoch, args


def read(file: Path, *, what: str | None = None) -> Weights:
    """The tensors of a .safetensors or of a pickle of torch's (.pth, .pt, .bin).

    what  the entry to take, of several: teacher, student, model

    Raises UserError if there is no such file or entry, if it is damaged, or if it would have code run.
    """
    if not file.is_file():
        raise UserError(f"{file}: there is no such file")
    found = load_file_of_tensors(file) if file.suffix == ".safetensors" else load_pickle(file)
    choices = {name: value for name, value in found.items() if holds_tensors(value)}
    if what is not None and what not in choices:
        raise UserError(f"--what {what}: {file} has {', '.join(choices) or 'no entries: it is its weights'}")
    flat = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if flat and what is None:
        return Weights(flat, None, (), tuple(name for name in found if name not in flat))
    known = [name for name in USUAL if name in choices] or list(choices)
    if not known:
        raise UserError(f"{file}: has no weights, but {some(map(str, found)) or 'nothing'}")
    entry = what or known[0]
    beside = tuple(str(name) for name in found if name not in choices or (name != entry and name not in USUAL))
    return Weights(dict(choices[entry]), entry, tuple(n for n in choices if n not in beside), beside)


def holds_tensors(value: Any) -> bool:
    named = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    return named and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def load_file_of_tensors(file: Path) -> dict[str, Any]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read, is it whole? {error}") from error


def load_pickle(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL |allowed global: |class )([\w.]+)", str(error))
        if wanted is None:
            # Not in torch's words, which advise to run what is in the file.
            raise UserError(f"{file}: no checkpoint, or a damaged one: not read") from error
        raise UserError(
            f"{file}: a pickle that needs code, {wanted[1]}, and is not read; if you trust it, save its weights alone "
            "where that is installed, by torch.save of the entry that holds them"
        ) from error
    except Exception as error:  # of many kinds, whatever bytes are there
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{file}: cannot be read, is it whole? {reason}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{file}: holds a {type(found).__name__}; tensors by their names would be right")
    return {str(name): value for name, value in found.items()}


def some(names: Any, most: int = 12) -> str:
    """As many as fit a line, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
