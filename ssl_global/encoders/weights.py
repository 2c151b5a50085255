"""Weights that exist as the beginning of a pretraining run: read, fitted to the encoder, accounted for by name.

    --encoder.weights vit_small_patch16_224.augreg_in21k     a published model of timm's, with its .tag
    --encoder.weights runs/dino                              a run, or an export
    --encoder.weights backbone.safetensors                   timm's names; or a .pth, read with weights_only

What has another size is resampled by timm: positions (bicubic), patch embeddings (the pseudo-inverse of a resize, Beyer
et al. 2022, "FlexiViT", https://arxiv.org/abs/2212.08013), a window's position bias (at distances that grow
geometrically, as BEiT does), input channels (repeated and scaled; one channel gets their sum).

An encoder gets all its tensors, or the run does not begin. Only what such weights may lack stays new: registers, and
the global tokens of a Swin with all that reads and writes them. Heads and decoders are not taken from anywhere: they
learn first, while the encoder waits (encoder.frozen_epochs).
"""

import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import clean_state_dict
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from ssl_global.encoders import files
from ssl_global.encoders.encoder import Encoder
from ssl_global.encoders.pretrained import load_but, renamed, said_by, weights_of
from ssl_global.errors import UserError, wrong

FIELD = "encoder.weights"
PATCHES = "patch_embed.proj.weight"
NAMED = 3  # tensors that a refusal names


@dataclass(frozen=True)
class Weights:
    """Tensors by timm's names, and where they are from."""

    where: str  # as the user gave it
    tensors: dict[str, Tensor]
    of: str = ""  # timm's name and arguments, where that is known


def read(weights: str) -> Weights:
    """An export, a finished run, a file, or a published model. Raises UserError if it is none of these, or damaged."""
    path = Path(weights)
    if path.is_dir():
        return of_folder(weights, path if (path / "config.json").is_file() else path / "export")
    if path.is_file():
        return Weights(weights, of_file(weights, path))
    architecture, _, tag = weights.partition(".")
    if not timm.is_model(architecture):
        raise wrong(FIELD, weights, "no such folder or file, and no published model of timm's (name.tag)")
    if not tag:
        tags = timm.list_pretrained(f"{architecture}.*")
        example = f", as {tags[0]}" if tags else "; it has none"
        raise wrong(FIELD, weights, f"a timm name without a tag has no weights; with its .tag it would{example}")
    published = weights.removeprefix("global_")  # a plain Swin's: there are no others, and new tokens would be random
    try:
        return Weights(weights, weights_of(published), of=architecture)
    except UserError as error:
        said = str(error).removeprefix(f"{published}: its weights cannot be loaded: ")
        raise wrong(FIELD, weights, f"cannot be fetched: {said}") from error


def of_folder(weights: str, folder: Path) -> Weights:
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise wrong(FIELD, weights, "no export there (config.json, model.safetensors), and no run")
    try:
        found = json.loads((folder / "config.json").read_text())
        architecture, arguments = str(found["architecture"]), dict(found.get("model_args") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise wrong(FIELD, weights, f"{folder / 'config.json'} is no configuration of timm's: {error}") from error
    sizes = ", ".join(f"{name} {value}" for name, value in arguments.items())
    return Weights(weights, of_file(weights, folder / "model.safetensors"), of=f"{architecture} ({sizes})")


def of_file(weights: str, file: Path) -> dict[str, Tensor]:
    """Those of encoders/files.py, without the prefixes of wrappers."""
    try:
        found = files.read(file).tensors
    except UserError as error:
        raise wrong(FIELD, weights, str(error).removeprefix(f"{file}: ")) from error
    tensors: dict[str, Tensor] = clean_state_dict(found)
    return tensors


# ------------------------------------------------------------------------------------------------------------- fitting


def begin(encoder: Encoder, weights: Weights) -> list[str]:
    """Puts the weights into the encoder; returns what became of each of them, in lines.

    Raises UserError, naming the first tensors, if they are another architecture's.
    """
    model = encoder.model
    ours = model.state_dict()
    found = fitted(weights, model)
    refuse_others(weights, found, encoder)
    may_be_new = tuple(name for name in ours if encoder.may_be_new(name))
    load_but(may_be_new, model, found, f"{FIELD} = {weights.where}", hint(weights))
    new = [name for name in ours if name not in found or found[name].shape != ours[name].shape]
    encoder.has_new(new)
    return report(weights, found, ours, new)


def fitted(weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """Their tensors under the model's names, resampled to its sizes by timm's own filter for its kind of model."""
    resampled = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
    tensors = renamed(weights.tensors, model.state_dict())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="timm|scipy|torch")  # of how their resizing is written
            found: dict[str, Tensor] = resampled(with_places(with_channels(tensors, model), model), model)
    except Exception as error:  # whatever shapes do to timm's filter
        raise wrong(
            FIELD, weights.where, f"not of a {type(model).__name__}: {said_by(error)}{hint(weights)}"
        ) from error
    return found


def with_channels(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The patch embedding for the model's number of channels."""
    theirs, ours = tensors.get(PATCHES), model.state_dict().get(PATCHES)
    if theirs is None or ours is None or theirs.ndim != 4 or theirs.shape[1] == ours.shape[1]:
        return tensors
    return tensors | {PATCHES: adapt_input_conv(ours.shape[1], theirs, base_chans=theirs.shape[1])}


def with_places(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Positions of as many tokens without a place (class, registers) as the model has in front of its patches: a class
    token that had none gets zeros, a new register keeps its own."""
    theirs, ours = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    if theirs is None or ours is None:
        return tensors
    wanted = 0 if model.no_embed_class else model.num_prefix_tokens
    tokens = [tensors[name].shape[1] if name in tensors else 0 for name in ("cls_token", "reg_token")]
    there = next((n for n in (sum(tokens), tokens[0], 0) if is_square(theirs.shape[1] - n)), wanted)
    if there >= wanted:
        return tensors
    more = ours.detach()[:, there:wanted].clone()
    if there == 0:
        more[:, : tokens[0]] = 0
    return tensors | {"pos_embed": torch.cat([theirs[:, :there], more.to(theirs), theirs[:, there:]], dim=1)}


def is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def refuse_others(weights: Weights, found: dict[str, Tensor], encoder: Encoder) -> None:
    """Raises UserError where nothing is the encoder's, or where there is more of what it has: deeper, other blocks."""
    kind, ours = type(encoder.model).__name__, encoder.model.state_dict()
    if not found.keys() & ours.keys():
        raise wrong(
            FIELD, weights.where,
            f"none of its {len(found)} tensors ({files.some(found, NAMED)}) is a {kind}'s ({files.some(ours, NAMED)}); "
            "ssl-global convert knows other layouts",
        )  # fmt: skip
    parts = {name.partition(".")[0] for name in ours}
    besides = [n for n in found if n not in ours and n.partition(".")[0] in parts and not encoder.may_be_new(n)]
    if besides:
        raise wrong(
            FIELD,
            weights.where,
            f"has {files.some(besides, NAMED)}, which this {kind} has not: other sizes{hint(weights)}",
        )


def hint(weights: Weights) -> str:
    return f"; they are of {weights.of}, as encoder.* would have to be" if weights.of else ""


def report(weights: Weights, found: dict[str, Tensor], ours: dict[str, Tensor], new: list[str]) -> list[str]:
    theirs, kept = weights.tensors, set(new)
    changed: dict[str, list[str]] = {}
    for name in ours:
        if name not in kept and name in theirs and theirs[name].shape != ours[name].shape:
            sizes = " to ".join(str(tuple(state[name].shape)) for state in (theirs, ours))
            changed.setdefault(sizes, []).append(name)
    others = [name for name in new if name in found]
    rows = [
        *(("resampled", f"{files.some(names, NAMED)}, {sizes}") for sizes, names in changed.items()),
        ("new", ", ".join(name for name in new if name not in found)),
        ("new", ", ".join(f"{n} (there {tuple(found[n].shape)}, here {tuple(ours[n].shape)})" for n in others)),
        ("not used", ", ".join(name for name in found if name not in ours)),
    ]
    loaded = f"weights {weights.where}: {len(ours) - len(new)} of {len(ours)} tensors loaded"
    return [loaded, *(f"  {word:9}  {text}" for word, text in rows if text)]
