"""An export as one file that needs neither this project nor timm: torch.export's .pt2, or ONNX.

Both are traced from the model that `ssl_global.export.load` gives, with its classifier, its segmentation head and its
attention modules. The batch may have any size. Height and width may too where tracing finds nothing that depends on
them (ViTs with dynamic_img_size, ResNets); else the file is for the one size, and it is said. The file is written under
another name, read again, compared with the model on batches that it was not traced with, and then gets its name.

The global-token Swin can be traced for any size, but a small one of three blocks takes torch's solver of shapes more
than a minute, and it grows with the depth: only when asked for.

The export's config.json goes along: in .pt2 as an extra file, in ONNX as metadata of that name.
"""

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ssl_global.encoders.global_swin import GlobalSwin
from ssl_global.encoders.pretrained import said_by
from ssl_global.errors import UserError
from ssl_global.export import load

Format = Literal["onnx", "pt2"]
Sizes = Literal["any", "one"]
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # of ONNX: to write it, and to compare it
AGREES = 1e-4  # of the largest value: what a file may differ from the model, summed in another order
CONFIG = "config.json"


@dataclass(frozen=True)
class Written:
    """How a file was proven."""

    file: Path
    any_size: bool
    why_one: str  # why it takes one size only, if it does and it is known
    size: tuple[int, int, int]  # channels, height, width that it was traced with
    difference: float  # the largest between the file's answers and the model's
    largest: float  # of the model's answers, in absolute value

    def __str__(self) -> str:
        channels, height, width = self.size
        why = f" ({self.why_one})" if self.why_one else ""
        other = f" and other sizes ({2 * height} x {3 * width} was tried)"
        sizes = f"{height} x {width}" + (other if self.any_size else f" only{why}")
        return (
            f"{self.file}: any number of images of {channels} channels, {sizes}; at most {self.difference:.1e} "
            f"from what the model says, of values up to {self.largest:.2g}"
        )


def write(folder: Path, file: Path, *, form: Format, sizes: Sizes | None = None) -> Written:
    """Writes the model of an export's folder to `file`, and says how it was proven.

    sizes  of images that it has to take; None: any, where that can be had at no great cost

    Raises UserError if what ONNX needs is not installed, if the model cannot be loaded or traced, if the file says
    something else, or cannot be written.
    """
    if form == "onnx":
        refuse_missing_packages()
    try:
        text = (folder / CONFIG).read_text()
        channels, height, width = json.loads(text)["pretrained_cfg"]["input_size"]
        model = load(folder).requires_grad_(False)
    except Exception as error:  # of many kinds, whatever somebody has written into the folder
        raise UserError(f"{folder}: cannot be loaded: {said_by(error)}") from error
    images = noise(2, channels, height, width)
    slow = any(isinstance(part, GlobalSwin) for part in model.modules())
    tries = {None: (False,) if slow else (True, False), "any": (True,), "one": (False,)}[sizes]
    why_one = "any size would take minutes: --sizes any" if slow and sizes is None else ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with quiet(), tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as workshop:
            for any_size in tries:
                new = Path(workshop, "any" if any_size else "one", file.name)
                try:
                    difference, largest = write_and_compare(model, images, new, form, text, any_size=any_size)
                except OSError:
                    raise
                except Exception as error:  # of many kinds: torch's, ONNX's, a model's own refusal of another size
                    if any_size is tries[-1]:
                        raise UserError(f"{folder}: cannot be made {form}: {said_by(error)}") from error
                    why_one = f"tracing others: {said_by(error)[:100]}"
                    continue
                take(new, file)
                break
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    return Written(file, any_size, why_one, (channels, height, width), difference, largest)


def refuse_missing_packages() -> None:
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--format onnx: needs {name}: pip install 'ssl_global[onnx]'")


def write_and_compare(
    model: nn.Module, images: Tensor, file: Path, form: Format, config: str, *, any_size: bool
) -> tuple[float, float]:
    """As `compare`, of the file that it writes into a new folder."""
    file.parent.mkdir()
    program = trace(model, images, any_size=any_size)
    (save_onnx if form == "onnx" else save_pt2)(program, file, config)
    says = (onnx_says if form == "onnx" else pt2_says)(file)
    _, channels, height, width = images.shape
    batches = [noise(3, channels, height, width), noise(1, channels, height, width)]
    return compare(model, says, batches + ([larger(images)] if any_size else []))


def take(new: Path, file: Path) -> None:
    """Weights beyond 2 GB are in a file of their own, which ONNX's refers to: it has to be there first."""
    for part in sorted(new.parent.iterdir(), key=lambda part: part.name == new.name):
        part.replace(file.parent / part.name)


def trace(model: nn.Module, images: Tensor, *, any_size: bool) -> ExportedProgram:
    """Raises an exception of torch's kinds if it cannot be had, the one of a guard if it holds for `images` only."""
    sizes = {0: Dim("batch", min=1)} | ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if any_size else {})
    program = torch.export.export(model, (images,), dynamic_shapes=(sizes,), strict=False)
    if any_size:  # ONNX has no guards: what was fixed without a word would be wrong without a word
        program.module()(larger(images))
    return program


def compare(model: nn.Module, says: Callable[[Tensor], Tensor], batches: list[Tensor]) -> tuple[float, float]:
    """The largest difference, and the largest value. Raises ValueError for other answers than the model's."""
    difference = largest = 0.0
    for images in batches:
        with torch.no_grad():
            expected, found = model(images), says(images)
        if expected.shape != found.shape:
            raise ValueError(f"answers {tuple(found.shape)} where {tuple(expected.shape)} is right")
        difference = max(difference, (expected - found).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    if not difference <= AGREES * largest:
        raise ValueError(f"says something else than the model, by {difference:.2g} of {largest:.2g}")
    return difference, largest


def noise(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def larger(images: Tensor) -> Tensor:
    """Not square, and of sides that patches and strides divide if they divide those of `images`."""
    _, channels, height, width = images.shape
    return noise(1, channels, 2 * height, 3 * width)


# -------------------------------------------------------------------------------------------------------- the two forms


def save_pt2(program: ExportedProgram, file: Path, config: str) -> None:
    torch.export.save(program, file, extra_files={CONFIG: config})


def pt2_says(file: Path) -> Callable[[Tensor], Tensor]:
    program: Any = torch.export.load(file).module()
    return lambda images: program(images)


def save_onnx(program: ExportedProgram, file: Path, config: str) -> None:
    written = torch.onnx.export(program, input_names=["images"], output_names=["answers"], dynamo=True, verbose=False)
    assert written is not None
    written.model.metadata_props[CONFIG] = config
    written.save(file)


def onnx_says(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised too
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@contextmanager
def quiet() -> Iterator[None]:
    """Without what tracing and translating log and warn of: guards, folded constants. What counts is compared."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir", "onnx_ir.passes")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
