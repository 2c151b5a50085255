"""A run on disk: all that it changes, written so that a kill at any moment leaves the last whole checkpoint.

    OUT/checkpoints/step-00000100/
        shard-00001-*.safetensors ...   a file of each process: its part of every tensor, and where that part belongs
        checkpoint.json                 the commit record: the run's state, recipe, versions, all tensors' shapes, and
                                        each file's size and checksum

    tensors -> copied to the CPU -> [in the background] written, flushed, checksummed by each process
            -> record -> flushed -> renamed -> older ones pruned

torch.distributed.checkpoint cuts the tensors and puts them together again, so what N processes saved under DDP or
FSDP2, M processes load under either. Nothing here is a pickle: the tensors are safetensors, the rest is JSON. No random
state is kept, because there is none: all that is random is a function of the seed and of its place.

The background thread talks to its like through a gloo group of its own: on the training group its messages would get
between those of the steps. DCP checks no payload, hence the checksums. It raises CheckpointException, which is a
BaseException: an `except Exception` lets a full disk end the run.
"""

import json
import os
import platform
import re
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import UserError
from ssl_global.methods.method import Method
from ssl_global.recipe import Checkpoint, Recipe, as_json, from_json, is_a
from ssl_global.training.sharded import METHOD, OPTIMIZER, Sharded

FORMAT = 2
RECORD = "checkpoint.json"
COUNT = range(2**53)  # steps and images in a record (ours)
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what `verified` may raise

T = TypeVar("T")


@dataclass
class RunState:
    """What a run changes outside of the method and the optimizer."""

    step: int = 0  # optimizer steps done, skipped ones too
    images: int = 0  # consumed, over all processes
    moved_past: int = 0  # steps' worth of data that a roll-back left behind: the place in the data is step + moved_past
    seconds: float = 0.0  # spent training, over all sessions
    data: str = ""  # fingerprint of the samples
    scaler: dict[str, Any] = field(default_factory=dict)  # of the loss, under fp16
    baselines: dict[str, float] = field(default_factory=dict)  # how the untrained encoder and raw pixels were judged
    last_loss: float | None = None


@dataclass(frozen=True)
class Layout:
    """How the processes shared the work when a checkpoint was written: it may differ when it is loaded."""

    processes: int
    engine: str  # one process, DDP, FSDP2, HSDP
    micro_batch: int
    accumulate: int
    workers: int


class SaveError(Exception):
    """A checkpoint could not be written; those before it are untouched."""


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
    }


# ------------------------------------------------------------------------------------------------------------- saving


class Writer:
    """Writes a run's checkpoints. All processes make one and make the same calls."""

    def __init__(self, run: Path, recipe: Recipe, layout: Layout, *, last_step: int | None = None) -> None:
        self.folder = run / "checkpoints"
        self.recipe = recipe
        self.layout = layout
        self.group = own_group()
        on_gpu = torch.cuda.is_available()
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            )
        )
        self.pending: threading.Thread | None = None
        self.failed: str | None = None  # why the last save came to nothing
        self.last_step = last_step  # that is saved, or being saved

    def save(self, method: Method, optimizer: torch.optim.Optimizer, state: RunState, *, wait: bool) -> float:
        """Begin to save, and with `wait` see it done. Returns the seconds that training stood still.

        The save before is finished first. Raises UserError if it is to wait and the checkpoint cannot be written; else
        `news` says so later.
        """
        began = time.monotonic()
        self.settle()
        parts = tensors(method, optimizer)
        record = {
            "format": FORMAT,
            "state": asdict(state),
            "recipe": as_json(self.recipe),
            "layout": asdict(self.layout),
            "versions": versions(),
            "tensors": table(parts),
        }
        self.last_step = state.step
        staged = self.stager.stage({name: tensor.contiguous() for name, tensor in parts.items()})
        self.pending = threading.Thread(target=self.write, args=(staged, record), name="checkpoint")
        self.pending.start()
        if wait:
            self.settle(must=True)
        return time.monotonic() - began

    def settle(self, *, must: bool = False) -> None:
        """Wait for the save under way. Raises UserError if it `must` have come to something and did not."""
        if self.pending is not None:
            self.pending.join()
            self.pending = None
        if must and self.failed:
            raise UserError(f"{self.folder}: the run could not be saved: {self.failed}; {self.kept()}")

    def news(self) -> str | None:
        """Why a save came to nothing, once; waits for nothing."""
        if not self.ready():
            return None
        failed, self.failed = self.failed, None
        return failed

    def ready(self) -> bool:
        """Whether no save is under way here."""
        return self.pending is None or not self.pending.is_alive()

    def kept(self) -> str:
        newest = checkpoints(self.folder.parent)
        return f"the checkpoint of before is {newest[0].name}" if newest else "there is no checkpoint of before"

    def write(self, staged: dict[str, Tensor], record: dict[str, Any]) -> None:
        """In the background: data, then record, then the name that makes it a checkpoint."""
        step = record["state"]["step"]
        temporary, final = self.folder / f".tmp-step-{step:08d}", self.folder / f"step-{step:08d}"
        try:
            together(self.group, lambda: on_main(lambda: begin(temporary)))
            described = together(self.group, lambda: write_data(staged, temporary, self.group))
            record["files"] = {name: facts for files in described for name, facts in files.items()}
            together(self.group, lambda: on_main(lambda: commit(temporary, final, record)))
            on_main(lambda: prune(self.folder, self.recipe.checkpoint))
        except SaveError as error:
            self.failed = str(error)
            on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
        except Exception as error:  # another process is gone: the steps will notice too
            self.failed = f"{type(error).__name__}: {error}"


def own_group() -> dist.ProcessGroup | None:
    """For the background thread, so that its messages and those of the steps do not mix."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def begin(temporary: Path) -> None:
    """An empty folder to write to, and nothing left of earlier attempts."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob(".tmp-*"):
        shutil.rmtree(leftover)
    temporary.mkdir()


def write_data(staged: dict[str, Tensor], temporary: Path, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """This process's shards, on the disk for good: {file name: its size and checksum}."""
    if group is None:  # DCP would write the same file, and warn that it is alone
        save_file(staged, temporary / "shard-00001-model-00001-of-00001.safetensors")
    else:
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(staged, storage_writer=writer, process_group=group)
    own = sorted(temporary.glob(f"shard-{dist.get_rank() + 1 if group else 1:05d}-*"))
    for file in own:
        flush(file)
    return {file.name: describe(file) for file in own}


def commit(temporary: Path, final: Path, record: dict[str, Any]) -> None:
    """Everything is there: write the record and give the folder its name."""
    missing = [name for name in record["files"] if not (temporary / name).is_file()]
    if missing:
        raise OSError(f"{', '.join(missing)} of other processes are not here: --out must be shared by all machines")
    (temporary / RECORD).write_text(json.dumps(record | {"crc32": own_checksum(record)}, indent=2))
    flush(temporary / RECORD)
    flush(temporary)
    put_in_place(temporary, final)


def put_in_place(temporary: Path, final: Path) -> None:
    """After a roll-back a step is saved a second time: the first one makes room, and `bring_back` knows where it is."""
    aside = final.with_name(f".old-{final.name}")
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def prune(folder: Path, settings: Checkpoint) -> None:
    """Keep the newest, and those at a multiple of keep_every. That a file cannot be deleted ends no run."""
    for old in checkpoints(folder.parent)[settings.keep :]:
        if settings.keep_every is None or step_of(old) % settings.keep_every:
            shutil.rmtree(old, ignore_errors=True)


def drop_after(run: Path, step: int) -> None:
    """A roll-back has left these behind."""
    for folder in checkpoints(run):
        if step_of(folder) > step:
            shutil.rmtree(folder)


def tensors(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that is kept, by name; under FSDP2 each process has its part of them.

    {"method/student.encoder...weight": ..., "optimizer/student.encoder...weight/exp_avg": ...}: rates and betas are the
    recipe's, so tensors are all that the optimizer has.
    """
    named = {f"{METHOD}{name}": tensor.detach() for name, tensor in method.state_dict().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in method.named_parameters()}
    for parameter, kept in optimizer.state.items():
        named |= {f"{OPTIMIZER}{names[parameter]}/{key}": value for key, value in kept.items()}
    return named


def table(parts: dict[str, Tensor]) -> dict[str, list[Any]]:
    """{name: [dtype, *shape]} of the whole tensors."""
    return {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in parts.items()}


def describe(file: Path) -> dict[str, int]:
    return {"bytes": file.stat().st_size, "crc32": checksum(file)}


def checksum(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def own_checksum(record: dict[str, Any]) -> int:
    """Of the record's content, however it is laid out."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def flush(path: Path) -> None:
    """To the disk, not only to the system's memory; a folder's flush makes a rename in it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------- doing it together


def on_main(work: Callable[[], T]) -> T | None:
    """Only the main process does it."""
    return work() if not dist.is_initialized() or dist.get_rank() == 0 else None


def together(group: dist.ProcessGroup | None, work: Callable[[], T]) -> list[T]:
    """Everyone does its part; returns what came of each. Raises SaveError on all of them if one could not."""
    result, complaint = None, None
    try:
        result = work()
    except (Exception, CheckpointException) as error:
        complaint = reason(error)
    everyone = gather((result, complaint), group)
    if complaints := list(dict.fromkeys(complaint for _, complaint in everyone if complaint)):
        raise SaveError("; ".join(complaints))
    return [result for result, _ in everyone]  # type: ignore[misc]


def reason(error: BaseException) -> str:
    """Of DCP's collection of tracebacks: what each process says."""
    if isinstance(error, CheckpointException):
        return "; ".join(dict.fromkeys(str(failure[0]) for failure in error.failures.values()))
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)


def gather(mine: T, group: dist.ProcessGroup | None) -> list[T]:
    if group is None:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


# ------------------------------------------------------------------------------------------------------------ loading


def checkpoints(run: Path) -> list[Path]:
    """The committed ones, newest first."""
    folder = run / "checkpoints"
    named = [found for found in folder.glob("step-*") if re.fullmatch(r"step-\d+", found.name)]
    return sorted(named, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def newest(run: Path, *, before: int | None = None) -> tuple[Path, dict[str, Any], list[str]] | None:
    """(folder, its record, why newer ones were passed over); None where there is no checkpoint at all.

    before  only those of a step up to this one

    All processes call it, each checks its share of the files, and all get the same answer. Raises UserError when there
    are some and none is whole.
    """
    on_main(lambda: bring_back(run / "checkpoints"))
    world = dist.group.WORLD if dist.is_initialized() else None
    (candidates, *_) = gather([str(f) for f in checkpoints(run) if before is None or step_of(f) <= before], world)
    damaged: list[str] = []
    for folder in map(Path, candidates):
        record, complaint = None, None
        try:
            record = verified(folder, part=dist.get_rank() if world else 0, parts=dist.get_world_size() if world else 1)
        except DAMAGE as error:
            complaint = f"{folder}: {error}"
        complaints = [said for said in gather(complaint, world) if said]
        if record is not None and not complaints:
            return folder, record, damaged
        damaged.append(complaints[0])
    if damaged:
        raise UserError(
            f"{run}: no checkpoint is whole: {'; '.join(damaged)}; --fresh begins anew and keeps these aside"
        )
    return None


def bring_back(folder: Path) -> None:
    """A run was killed between the two renames of `put_in_place`."""
    for aside in folder.glob(".old-step-*"):
        final = folder / aside.name.removeprefix(".old-")
        try:
            if final.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(final)
        except OSError as error:
            raise UserError(f"{aside}: cannot be put in its place: {error.strerror or error}") from error


def verified(folder: Path, *, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """The record, once every `parts`-th file is as it says, from file number `part` on.

    Raises one of DAMAGE with the reason.
    """
    if not (folder / RECORD).is_file():
        raise ValueError(f"{RECORD} is missing")
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']}, this program reads {FORMAT}")
    if record.pop("crc32") != own_checksum(record):
        raise ValueError(f"{RECORD} is damaged: its content has another checksum than it says")
    check_kinds(record, step_of(folder))
    if foreign := {file.name for file in folder.glob("*.safetensors")} - record["files"].keys():
        raise ValueError(f"{min(foreign)} is none of its files")
    for name, expected in sorted(record["files"].items())[part::parts]:
        file = folder / Path(name).name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        found = describe(file)
        if found != expected:
            raise ValueError(f"{name} is damaged: {found}, written as {expected}")
    return record


def check_kinds(record: dict[str, Any], step: int) -> None:
    """A right checksum does not say who made the record: what is used later must be of the kind that is used."""
    state = typed(RunState, record["state"])
    typed(Layout, record["layout"])
    counts = (state.step, state.images, state.moved_past)
    tables = {name: record[name] for name in ("recipe", "tensors", "files")}
    for name, kept in tables.items():
        if not isinstance(kept, dict):
            raise TypeError(f"{RECORD}: {name} is no table")
    sizes = [size for name, facts in tables["tensors"].items() for size in facts[1:]]
    sizes += [facts[key] for facts in tables["files"].values() for key in ("bytes", "crc32")]
    if state.step != step or not all(type(n) is int and n in COUNT for n in (*counts, *sizes)):
        raise ValueError(f"{RECORD} is of another step, or counts what cannot be counted")


def typed(cls: type[T], values: dict[str, Any]) -> T:
    """An instance of the dataclass. Raises TypeError for a field that it does not have, or of another type."""
    made = cls(**values)
    for known in fields(made):  # type: ignore[arg-type]
        if not is_a(getattr(made, known.name), known.type):
            raise TypeError(f"{RECORD}: {known.name} = {getattr(made, known.name)!r}")
    return made


def load(folder: Path, method: Method, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> RunState:
    """Put the checkpoint into method and optimizer, on however many processes. All call it.

    Raises UserError, before anything is touched, if its tensors are not those of this method.
    """
    fill_state(optimizer, method, record)
    parts = tensors(method, optimizer)
    with Sharded(folder) as kept:
        for saved in (record["tensors"], kept.table()):
            refuse_other_tensors(table(parts), saved, folder)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it may well be alone
        dcp.load(parts, storage_reader=reader)
    return RunState(**record["state"])


def fill_state(optimizer: torch.optim.Optimizer, method: Method, record: dict[str, Any]) -> None:
    """Give the optimizer the entries that the checkpoint has, for the loader to read into."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    kept: dict[str, dict[str, list[Any]]] = {}
    for name, facts in record["tensors"].items():
        if name.startswith(OPTIMIZER):
            parameter, _, key = name.removeprefix(OPTIMIZER).rpartition("/")
            kept.setdefault(parameter, {})[key] = facts
    state: dict[int, dict[str, Tensor]] = {}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(order):
        state[index] = {
            key: torch.zeros_like(parameter) if len(facts) > 1 else torch.zeros((), device=parameter.device)
            for key, facts in kept.get(names[parameter], {}).items()
        }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: entry for i, entry in state.items() if entry}, "param_groups": groups})


def refuse_other_tensors(here: dict[str, list[Any]], saved: dict[str, list[Any]], folder: Path) -> None:
    differences = [
        f"{name} {' '.join(map(str, tables[0].get(name, ['is missing'])))} {word}"
        for word, tables in (("in the checkpoint only", (saved, here)), ("in the model only", (here, saved)))
        for name in tables[0]
        if name not in tables[1]
    ]
    differences += [f"{n} is {saved[n]}, here {here[n]}" for n in here if n in saved and here[n] != saved[n]]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(f"{folder}: not a checkpoint of this model: {'; '.join(differences[:3])}{more}")


def newest_of(run: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the record of a run's newest whole checkpoint. Raises UserError if there is none."""
    found = newest(run)
    if found is None:
        raise UserError(f"{run}: no checkpoint there; a run's --out has a folder checkpoints/")
    folder, record, _ = found
    return folder, record


def load_encoder(run: Path, what: str | None) -> tuple[Recipe, str, Encoder]:
    """A backbone of a run's newest checkpoint, on the CPU, in eval mode; the method's own choice if `what` is None.

    Whatever processes wrote it, it takes the memory of that encoder and of its largest tensor: the method is only built
    in outline. Raises UserError if there is no checkpoint, or no backbone of that name.
    """
    folder, record = newest_of(run)
    recipe, outline = built(folder, record["recipe"])
    backbones = outline.backbones()
    name = what or next(iter(backbones))
    if name not in backbones:
        raise UserError(f"--what {name}: this run has {' and '.join(backbones)}")
    prefix = next(prefix for prefix, module in outline.named_modules() if module is backbones[name])
    with Sharded(folder) as kept, torch.no_grad():
        saved = {name: facts for name, facts in kept.table().items() if name.startswith(f"{METHOD}{prefix}.")}
        own = {f"{METHOD}{prefix}.{key}": tensor for key, tensor in backbones[name].state_dict().items()}
        refuse_other_tensors(table(own), saved, folder)  # first: what is no larger than its files can be built
        encoder = outline.new_backbone(recipe, name)
        for key, tensor in encoder.state_dict().items():
            tensor.copy_(kept.read(f"{METHOD}{prefix}.{key}"))
    return recipe, name, encoder.eval()


def load_method(run: Path) -> tuple[Recipe, Method]:
    """All that a run's newest checkpoint holds of its method (encoders, decoder, heads), on the CPU, in eval mode.

    Whatever processes wrote it. Raises UserError if there is no checkpoint, or if its tensors are not the recipe's.
    """
    folder, record = newest_of(run)
    recipe, outline = built(folder, record["recipe"])
    with Sharded(folder) as kept, torch.no_grad():
        saved = {name: facts for name, facts in kept.table().items() if name.startswith(METHOD)}
        own = {METHOD + name: tensor for name, tensor in outline.state_dict().items()}
        refuse_other_tensors(table(own), saved, folder)  # first: what is no larger than its files can be built
        with torch.random.fork_rng(devices=[]):
            method = recipe.method.build(recipe)
        for name, tensor in method.state_dict().items():
            tensor.copy_(kept.read(METHOD + name))
    return recipe, method.eval()


def built(folder: Path, saved: dict[str, Any]) -> tuple[Recipe, Method]:
    """The recipe of a record, and its method without memory. Raises UserError if it is no recipe of this program."""
    try:
        recipe = from_json(saved)
        recipe.check()
        with torch.device("meta"):
            return recipe, recipe.method.build(recipe)
    except Exception as error:  # of any kind: its values may be of any kind
        raise UserError(f"{folder}: its recipe cannot be built: {error}".splitlines()[0]) from error
