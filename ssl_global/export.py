"""A run's backbone as a folder that timm and the Hugging Face hub understand, proven before it is called done.

    FOLDER/
        model.safetensors   the timm model's own state_dict
        config.json         timm's hub format: architecture, model_args, pretrained_cfg (mean, std, input size)
        README.md           the model card

config.json is written here and not by timm's `save_for_hf`: timm 1.0.31's adds num_classes to model_args, which
transformers' TimmWrapperModel then passes twice; older ones keep the input size and the mean of timm's own weights.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_global.attention.attach import Attachment, attach
from ssl_global.encoders.encoder import Encoder
from ssl_global.encoders.pooling import attention_pool, pool_by_attention
from ssl_global.encoders.pretrained import NOT_THE_MODELS
from ssl_global.errors import UserError
from ssl_global.finetuning.segmenter import Segmenter, SegmenterSpec
from ssl_global.recipe import Data, Recipe, as_json

MULTI_LABEL = "multi_label_classification"  # as transformers has it
CROP_SHARE = 0.875  # of the shorter side, as in our own evaluation: 224 of 256


def export(encoder: Encoder, folder: Path, *, recipe: Recipe, summary: dict[str, Any], what: str) -> Path:
    """Writes `encoder` to `folder` and returns it, once timm has loaded it again and said the same of a batch.

    recipe    that it was trained with
    summary   the run's figures, for the model card
    what      its name in the run: teacher, student, encoder

    An export that is there already is replaced, but only by one that is proven. Raises UserError if something else is
    there, RuntimeError with the tensor's name if what timm loads is not what was trained.
    """
    run = Path(folder).resolve().parent.name
    return publish(
        encoder,
        Path(folder),
        data=recipe.data,
        card=lambda model, num_tensors: model_card(model, run, recipe, summary, what=what, num_tensors=num_tensors),
    )


def publish(
    encoder: Encoder,
    folder: Path,
    *,
    data: Data,
    card: Callable[[Encoder, int], str],
    beside: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """As `export`, of an encoder without a run.

    data     how images are normalised for it
    card     the model card, of the encoder and the number of its tensors
    beside   files to write there too, by their names
    """
    refuse_other_folders(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A copy, on the CPU and in eval mode: the run goes on with its own, and both sides compute alike.
    encoder = copy.deepcopy(encoder).cpu().eval().requires_grad_(False)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop:
        new, old = Path(workshop, "new"), Path(workshop, "old")
        new.mkdir()
        write_model(encoder, new, data)
        num_tensors = prove(encoder, new)
        texts = {"README.md": card(encoder, num_tensors), **beside}
        for name, text in texts.items():
            (new / name).write_text(text, errors="backslashreplace")  # a name that is no UTF-8
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    return folder


def is_export(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def refuse_other_folders(folder: Path) -> None:
    if folder.is_dir() and (is_export(folder) or not any(folder.iterdir())):
        return
    if folder.exists():
        raise UserError(f"{folder} is there and is no export: it will not be replaced; give another --out")


def write_model(encoder: Encoder, folder: Path, data: Data) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in encoder.model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(timm_config(encoder, data), indent=2) + "\n")


def timm_config(encoder: Encoder, data: Data) -> dict[str, Any]:
    """What timm's hub format asks for."""
    owner = encoder.backbone if isinstance(encoder, Segmenter) else encoder.model
    own: dict[str, Any] = owner.pretrained_cfg  # type: ignore[assignment]
    return {
        "architecture": encoder.architecture,
        "num_classes": encoder.num_classes,
        "num_features": encoder.width,
        "model_args": encoder.model_args,
        **({"label_names": list(encoder.classes)} if encoder.classes else {}),
        **({"problem_type": MULTI_LABEL} if encoder.multi_label else {}),
        **more_of(encoder),
        "pretrained_cfg": {
            "input_size": [encoder.channels, encoder.pixels, encoder.pixels],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": CROP_SHARE,
            "crop_mode": "center",
            "mean": list(data.normalisation[0]),
            "std": list(data.normalisation[1]),
            "num_classes": encoder.num_classes,
            "first_conv": own.get("first_conv"),  # timm's to adapt to other channels
            "classifier": own.get("classifier"),  # timm's to leave out of the weights
        },
    }


def prove(encoder: Encoder, folder: Path) -> int:
    """Loads the folder as a user will and compares: names, shapes and values of all tensors, and what they compute.

    Returns the number of tensors. Raises RuntimeError at the first difference.
    """
    expected = encoder.model.state_dict()
    compare(expected, load_file(folder / "model.safetensors"), where="model.safetensors")
    model = load(folder)
    compare(expected, model.state_dict(), where="timm's model")
    size = (2, encoder.channels, encoder.pixels, encoder.pixels)
    batch = torch.randn(size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = encoder.model(batch) if encoder.num_classes else encoder.encode(batch).summary
        difference = (model(batch) - ours).abs().max().item()
        if difference != 0:
            raise RuntimeError(f"export: the loaded model says something else of the same images, by {difference:.2g}")
        if is_ours(encoder):
            return len(expected)
        # The last stage only: by default timm asks for three or more, which a small model may not have.
        stages = load(folder, features_only=True, out_indices=[-1])(batch)
    if len(stages) != 1 or not stages[0].isfinite().all():
        raise RuntimeError("export: features_only=True gives no feature map of the last stage")
    return len(expected)


def load(folder: Path, **options: Any) -> torch.nn.Module:
    """An export's model, in eval mode: as timm loads it, and with its attention modules or attention pooling, which
    timm does not know.

    options  of timm.create_model; for a model with such there are none
    """
    folder = Path(folder)
    found = json.loads((folder / "config.json").read_text())
    if "segmenter" in found:
        return segmenter(folder, found["segmenter"])
    if not (found.get("attention") or found.get("attention_pool")):
        model: torch.nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
        return model.eval()
    if options:
        raise ValueError(f"{folder}: has attention that is ours: it is loaded as it is, without {', '.join(options)}")
    if others := sorted(found["model_args"].keys() & NOT_THE_MODELS):
        raise ValueError(f"{folder}/config.json: model_args has {others[0]}")
    model = timm.create_model(found["architecture"], num_classes=found["num_classes"], **found["model_args"])
    if found.get("attention_pool"):
        pool_by_attention(model)
    if found.get("attention"):
        size = tuple(found["pretrained_cfg"]["input_size"])
        attach(model, {place: tuple(chosen) for place, chosen in found["attention"].items()}, input_size=size)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def more_of(encoder: Encoder) -> dict[str, Any]:
    """What our own `load` needs besides timm's configuration."""
    if isinstance(encoder, Segmenter):
        return {"segmenter": asdict(encoder.spec)}
    attention = Attachment(encoder.model).modules
    pool = {"attention_pool": True} if attention_pool(encoder.model) else {}
    return pool | ({"attention": attention} if attention else {})


def segmenter(folder: Path, spec: dict[str, Any]) -> torch.nn.Module:
    tuples = {"classes": tuple(spec["classes"]), "attention": {p: tuple(c) for p, c in spec["attention"].items()}}
    model = Segmenter(SegmenterSpec(**(spec | tuples))).model
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def is_ours(encoder: Encoder) -> bool:
    """Whether it has parts that timm does not know."""
    return bool(more_of(encoder))


def compare(expected: dict[str, Tensor], found: dict[str, Tensor], *, where: str) -> None:
    for complaint, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has besides", found.keys() - expected.keys()),
        ("has another shape of", [n for n in expected if n in found and expected[n].shape != found[n].shape]),
    ):
        if names:
            raise RuntimeError(f"export: {where} {complaint} {', '.join(sorted(names))}")
    for name, tensor in expected.items():
        if not torch.equal(tensor, found[name]):
            raise RuntimeError(f"export: {where} has other values in {name}")


# --------------------------------------------------------------------------------------------------------- model card


def model_card(
    encoder: Encoder, run: str, recipe: Recipe, summary: dict[str, Any], *, what: str, num_tensors: int
) -> str:
    numbers = as_json(recipe)
    figures = {name: value for name, value in summary.items() if isinstance(value, str | int | float)}
    method, size = str(numbers["method.kind"]).upper(), f"{encoder.pixels} x {encoder.pixels}"
    tuned = bool(encoder.classes)
    title = f"fine-tuned for {encoder.num_classes} classes" if tuned else "pretrained without labels"
    gives = f"{encoder.num_classes} logits" if tuned else f"{encoder.width} features"
    patches = f",\npatches of {encoder.patch} pixels; other image sizes work too." if encoder.patch else "."
    attention = ", ".join(f"{name} after {place}" for place, (name, _) in attached(encoder).items())
    with_attention = f"\n\nAttention modules: {attention}." if attention else ""
    return f"""---
library_name: timm
tags:
- {"image-classification" if tuned else "image-feature-extraction"}
- timm
{"" if tuned else "- self-supervised"}
---
# {run}: {encoder.architecture}, {title}

The {what} of a {method} run. {encoder.channels} x {size} pixels in, {gives} out{patches}{with_attention}

When it was written it was loaded again: {num_tensors} of {num_tensors} tensors, the same answers bit for bit.

## Load

{how_to_load(encoder)}

## Figures

{table("figure", figures)}

## Data

Channels, in 0..1, are normalised with mean {list(recipe.data.mean)} and deviation {list(recipe.data.std)}.

## Recipe

{table("field", numbers)}
"""


def attached(encoder: Encoder) -> dict[str, Any]:
    return dict(Attachment(encoder.model).modules)


def how_to_load(encoder: Encoder) -> str:
    ours = type(encoder.model).__module__.startswith("ssl_global.")
    register = "import ssl_global  # timm knows the architecture from here on\n" if ours else ""
    transform = "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    if isinstance(encoder, Segmenter):
        return f"""```python
from ssl_global.export import load
from ssl_global.inference.sliding_window import SlidingWindow

model = load("PATH/OF/THIS/FOLDER")  # (B, {encoder.channels}, H, W) -> (B, {encoder.num_classes}, H, W)
model = SlidingWindow(model, window={encoder.pixels}, overlap={encoder.pixels // 4}, margin=0)  # as it was judged
```"""
    if more_of(encoder):
        return f"""```python
import timm
from ssl_global.export import load

model = load("PATH/OF/THIS/FOLDER")  # with its attention, which timm does not know
{transform}
```"""
    if encoder.classes:
        return f"""```python
{register}import timm

model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True)  # images -> (B, {encoder.num_classes})
{transform}
```"""
    return f"""```python
{register}import timm

name = "local-dir:PATH/OF/THIS/FOLDER"
model = timm.create_model(name, pretrained=True)  # images -> (B, {encoder.width})
model = timm.create_model(name, pretrained=True, num_classes=10)  # with a new head
model = timm.create_model(name, pretrained=True, features_only=True, out_indices=[-1])  # feature maps
{transform}
```

```python
{register}from transformers import AutoModel

model = AutoModel.from_pretrained("PATH/OF/THIS/FOLDER")  # .pooler_output: (B, {encoder.width})
```"""


def table(head: str, rows: dict[str, Any]) -> str:
    return "\n".join([f"| {head} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
