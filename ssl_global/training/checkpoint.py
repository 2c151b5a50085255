"""A run on disk: all that it changes, written so that a kill at any moment leaves the last whole checkpoint.

    OUT/checkpoints/step-00000100/
        model.safetensors        the method: student, teacher, heads, centre
        optimizer.safetensors    AdamW's averages, by the names of the parameters
        checkpoint.json          the commit record: the run's state, recipe, versions, and each file's size and checksum

It is written to a temporary name, flushed, and renamed when whole; the last K stay, and at least two. Nothing here is a
pickle. No random state is kept, because there is none: all that is random is a function of the seed and of its place.
"""

import json
import os
import platform
import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import UserError
from ssl_global.methods.method import Method
from ssl_global.recipe import Recipe, as_json, from_json

FORMAT = 1
RECORD = "checkpoint.json"


@dataclass
class RunState:
    """What a run changes outside of the method and the optimizer."""

    step: int = 0  # optimizer steps done, skipped ones too
    images: int = 0  # consumed, over all processes: the place in the data
    seconds: float = 0.0  # spent training, over all sessions
    data: str = ""  # fingerprint of the samples
    scaler: dict[str, Any] = field(default_factory=dict)  # of the loss, under fp16
    baselines: dict[str, float] = field(default_factory=dict)  # how the untrained encoder and raw pixels were judged
    last_loss: float | None = None


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
    }


# ------------------------------------------------------------------------------------------------------------- saving


def save(
    run: Path, method: Method, optimizer: torch.optim.Optimizer, state: RunState, recipe: Recipe, *, keep: int
) -> Path:
    """Write the checkpoint of `state.step`, then prune to the `keep` newest. One process calls it."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f".tmp-step-{state.step:08d}", folder / f"step-{state.step:08d}"
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    save_file(whole(method.state_dict()), temporary / "model.safetensors")
    save_file(whole(optimizer_tensors(method, optimizer)), temporary / "optimizer.safetensors")
    record = {
        "format": FORMAT,
        "state": asdict(state),
        "recipe": as_json(recipe),
        "versions": versions(),
        "files": {file.name: describe(file) for file in sorted(temporary.iterdir())},
    }
    (temporary / RECORD).write_text(json.dumps(record, indent=2))
    for file in temporary.iterdir():
        flush(file)
    flush(temporary)
    if final.exists():  # saved at this step before, by a run that was told to save again
        shutil.rmtree(final)
    temporary.rename(final)
    flush(folder)
    for old in checkpoints(run)[keep:]:
        shutil.rmtree(old)
    return final


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def optimizer_tensors(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"student.encoder...weight/exp_avg": ...}: rates and betas are the recipe's, so tensors are all there is."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in method.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value for parameter, kept in optimizer.state.items() for key, value in kept.items()
    }


def describe(file: Path) -> dict[str, int]:
    return {"bytes": file.stat().st_size, "crc32": checksum(file)}


def checksum(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def flush(path: Path) -> None:
    """To the disk, not only to the system's memory; a folder's flush makes a rename in it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ loading


def checkpoints(run: Path) -> list[Path]:
    """The committed ones, newest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def newest(run: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """(folder, its record, why newer ones were passed over); None where there is no checkpoint at all.

    Raises UserError when there are some and none is whole.
    """
    damaged: list[str] = []
    for folder in checkpoints(run):
        try:
            return folder, verified(folder), damaged
        except (OSError, ValueError, KeyError) as error:
            damaged.append(f"{folder}: {error}")
    if damaged:
        raise UserError(
            f"{run}: no checkpoint is whole: {'; '.join(damaged)}; --fresh begins anew and keeps these aside"
        )
    return None


def verified(folder: Path) -> dict[str, Any]:
    """The record, once every file is as it says. Raises OSError, ValueError or KeyError with the reason."""
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']}, this program reads {FORMAT}")
    for name, expected in record["files"].items():
        found = describe(folder / Path(name).name)
        if found != expected:
            raise ValueError(f"{name} is damaged: {found}, written as {expected}")
    return record


def load(folder: Path, method: Method, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> RunState:
    """Put the checkpoint into method and optimizer, strictly: every tensor named, none left over."""
    method.load_state_dict(load_file(folder / "model.safetensors"))
    kept: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("/")
        kept.setdefault(parameter, {})[key] = tensor
    names = {parameter: name for name, parameter in method.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: kept[name] for index, name in enumerate(order) if name in kept}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return RunState(**record["state"])


def load_method(run: Path) -> tuple[Recipe, Method, dict[str, Any]]:
    """The method of a run's newest checkpoint, on the CPU, with its recipe and the checkpoint's record.

    Raises UserError if there is none.
    """
    found = newest(run)
    if found is None:
        raise UserError(f"{run}: no checkpoint there; a run's --out has a folder checkpoints/")
    folder, record, _ = found
    recipe = from_json(record["recipe"])
    method = recipe.method.build(recipe)
    method.load_state_dict(load_file(folder / "model.safetensors"))
    return recipe, method.eval(), record


def choose(backbones: dict[str, Encoder], what: str | None) -> tuple[str, Encoder]:
    """The backbone of that name, the method's first one if None. Raises UserError for a name that it has not."""
    name = what or next(iter(backbones))
    if name not in backbones:
        raise UserError(f"--what {name}: this run has {' and '.join(backbones)}")
    return name, backbones[name]
