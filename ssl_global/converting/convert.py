"""Somebody else's checkpoint as an export of ours: a folder that timm loads, with an account of every key.

    layout     by the keys' names                           layouts.py
    model      by the tensors' shapes                       shapes.py
    account    each key of the file is taken, left out by a rule that says why, or unknown; all of the model is found
    export     as of a run: loaded again and compared       ssl_global/export.py

Unknown keys end it, unless they are allowed; a missing one always does. The account is written beside the weights,
as conversion.json.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from ssl_global.converting.layouts import CLASSIFIER, LAYOUTS, Keys, Layout, layout_of
from ssl_global.converting.shapes import Architecture, Asked, patch_embedding
from ssl_global.encoders.encoder import Encoder
from ssl_global.encoders.files import Weights, read, some
from ssl_global.encoders.pretrained import Pretrained, PretrainedConfig, said_by
from ssl_global.errors import UserError
from ssl_global.export import how_to_load, publish, refuse_other_folders
from ssl_global.recipe import Data


@dataclass
class Account:
    """What became of each key, by its name in the file."""

    taken: dict[str, str] = field(default_factory=dict)  # timm's name
    left_out: dict[str, str] = field(default_factory=dict)  # why
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # names that the layout has and the file has not


@dataclass(frozen=True)
class Converted:
    """What was found and written."""

    layout: Layout
    architecture: Architecture
    weights: Weights
    account: Account
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    num_tensors: int
    folder: Path

    def lines(self, file: Path) -> list[str]:
        entry = f", entry {self.weights.entry}" if self.weights.entry else ""
        others = [name for name in self.weights.entries if name != self.weights.entry]
        beside = self.weights.beside
        reasons: dict[str, list[str]] = {}
        for name, why in self.account.left_out.items():
            reasons.setdefault(why, []).append(name)
        return [
            f"{file}: {self.layout.name}{entry}" + (f"; --what chooses {', '.join(others)}" if others else ""),
            f"model      {self.architecture.name}: {'; '.join(self.architecture.said)}",
            f"images     mean {self.normalisation[0]}, deviation {self.normalisation[1]}: --mean, --std",
            f"taken      {len(self.account.taken)} keys",
            *(f"left out   {len(names)}, {why}: {some(names)}" for why, names in reasons.items()),
            *([f"left out   {len(beside)}, no weights: {some(beside)}"] * bool(beside)),
            *([f"unknown    {', '.join(self.account.unknown)}: left out as asked"] * bool(self.account.unknown)),
            *([f"note       {self.layout.note}"] * bool(self.layout.note)),
            f"{self.folder}: proven: {self.num_tensors} of {self.num_tensors} tensors, the same features bit for bit; "
            "each key is in its conversion.json",
        ]


def convert(
    file: Path,
    folder: Path,
    *,
    what: str | None = None,
    name: str | None = None,
    asked: Asked = Asked(),  # noqa: B008 - frozen
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    allow_unknown: bool = False,
) -> Converted:
    """Writes the backbone that `file` holds to `folder`, once timm has loaded it again and said the same.

    what            the entry to take, of several: teacher, student, model
    name            timm's architecture, where shapes do not say it
    asked           numbers that shapes do not say
    normalisation   mean and deviation of each channel that the backbone was trained with; by default the layout's
    allow_unknown   leave out keys that are in no rule; they are listed

    Raises UserError for a file that is no checkpoint, needs code, or is of no layout that is known; for missing and
    unknown keys and other shapes, each by name. Nothing is written then.
    """
    refuse_other_folders(folder)
    weights = read(file, what=what)
    keys = unwrapped(weights)
    try:
        layout = chosen_layout(keys, name)
        architecture = of_name(name, keys, asked) if name else layout.build(keys.state, asked)
        encoder = built(architecture)
        account, state = translate(keys, layout, encoder)
        refuse(account, layout, architecture, allow_unknown=allow_unknown)
        compare_shapes(state, encoder, layout, keys)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    encoder.model.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    mean, std = normalisation or layout.normalisation
    if len(mean) != architecture.channels or len(std) != architecture.channels:
        raise UserError(f"{file}: takes {architecture.channels} channels: --mean and --std need a number for each")
    found = Converted(layout, architecture, weights, account, (tuple(mean), tuple(std)), len(state), folder)
    try:
        publish(
            encoder,
            folder,
            data=Data(channels=architecture.channels, mean=tuple(mean), std=tuple(std)),
            card=lambda model, _: card(model, file, found),
            beside={"conversion.json": json.dumps(conversion(file, found), indent=2) + "\n"},
        )
    except RuntimeError as error:
        raise UserError(f"{file}: its export as {architecture.name} could not be proven: {said_by(error)}") from error
    return found


def unwrapped(weights: Weights) -> Keys:
    """Without what wraps all names, and without what wraps the backbone's; chunked blocks by their own number."""
    names = {name: name for name in weights.tensors}
    for wrap in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(wrap) for name in names):
            names = {name.removeprefix(wrap): original for name, original in names.items()}
    wrapped = next((w for w in ("backbone.", "encoder.") if any(name.startswith(w) for name in names)), "")
    shortened = {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name.removeprefix(wrapped))
        if name.startswith(wrapped)
        else f"/{name}": original
        for name, original in names.items()
    }
    state = {name: weights.tensors[original] for name, original in shortened.items()}
    return Keys(state, shortened, weights.entry, weights.entries, wrapped)


def chosen_layout(keys: Keys, name: str | None) -> Layout:
    layout = layout_of(keys)
    if layout is not None:
        return layout
    if name is not None:
        return Layout(f"timm's {name}", lambda _: True, lambda state, asked: of_name(name, keys, asked))
    known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    raise UserError(
        f"of no layout that is known ({known}); it begins with {some(keys.original.values(), 3)}; "
        "if these are timm's names, --name says of which architecture"
    )


def of_name(name: str, keys: Keys, asked: Asked) -> Architecture:
    """timm's model of that name, as it is, but for channels and size."""
    if not timm.is_model(name):
        raise UserError(f"--name {name}: timm has no such architecture")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    channels = 3
    if "patch_embed.proj.weight" in keys.state:
        _, channels, _ = patch_embedding(keys.state)
    config: Any = model.pretrained_cfg
    _, pixels, _ = config["input_size"]
    said = ["as asked for" + (f", {asked.pixels} pixels" if asked.pixels else "")]
    return Architecture(name, {"in_chans": channels}, asked.pixels or pixels, channels, said)


def built(architecture: Architecture) -> Pretrained:
    config = PretrainedConfig(name=architecture.name, model_args=json.dumps(architecture.args))
    return Pretrained(config, pixels=architecture.pixels, channels=architecture.channels)


def translate(keys: Keys, layout: Layout, encoder: Pretrained) -> tuple[Account, dict[str, Tensor]]:
    """The account, and the model's tensors that were found, by timm's names."""
    account, kept = Account(), {}
    for name, tensor in keys.state.items():
        why = layout.why_not(name) or of_classifier(name, encoder)
        if why:
            account.left_out[keys.original[name]] = why
        else:
            kept[name] = tensor
    changed = layout.change(kept) if layout.change else {name: (tensor, (name,)) for name, tensor in kept.items()}
    ours: dict[str, Tensor] = encoder.model.state_dict()
    state: dict[str, Tensor] = {}
    became: dict[str, list[str]] = {}
    for name, (tensor, used) in changed.items():
        timms = layout.to_timm(name)
        if timms in ours:
            state[timms] = tensor
            for key in used:
                became.setdefault(keys.original[key], []).append(timms)
    account.taken = {key: " and ".join(names) for key, names in became.items()}
    account.unknown = [keys.original[name] for name in kept if keys.original[name] not in became]
    account.missing = list(dict.fromkeys(layout.to_theirs(name, kept) for name in ours if name not in state))
    return account, state


def of_classifier(name: str, encoder: Pretrained) -> str | None:
    """Why a tensor of the classifier that timm knows the architecture to have is left out."""
    known: Any = encoder.model.pretrained_cfg.get("classifier") or ()
    paths = (known,) if isinstance(known, str) else known
    own = encoder.model.state_dict()
    return CLASSIFIER if name not in own and any(name.startswith(f"{path}.") for path in paths) else None


def refuse(account: Account, layout: Layout, architecture: Architecture, *, allow_unknown: bool) -> None:
    found = []
    if account.missing:
        found.append(f"lacks {len(account.missing)} of its keys: {some(account.missing, 20)}")
    if account.unknown and not (allow_unknown and not account.missing):
        more = "" if account.missing else "; --allow-unknown leaves them out"
        found.append(f"has {len(account.unknown)} that no rule knows: {some(account.unknown, 20)}{more}")
    if found:
        raise UserError(f"{layout.name}, as {architecture.name}, {', and '.join(found)}; nothing was written")


def compare_shapes(state: dict[str, Tensor], encoder: Encoder, layout: Layout, keys: Keys) -> None:
    for name, tensor in encoder.model.state_dict().items():
        if state[name].shape != tensor.shape:
            has, wants = (str(tuple(t.shape)) for t in (state[name], tensor))
            theirs = layout.to_theirs(name, keys.state)
            raise UserError(f"{layout.name}: has {theirs} as {has}, where {wants} is needed")


# ---------------------------------------------------------------------------------------------------- what is written


def conversion(file: Path, found: Converted) -> dict[str, Any]:
    return {
        "file": file.name,
        "layout": found.layout.name,
        "entry": found.weights.entry,
        "not_weights": list(found.weights.beside),
        "model": asdict(found.architecture),
        **asdict(found.account),
    }


def card(encoder: Encoder, file: Path, found: Converted) -> str:
    size = f"{encoder.channels} x {encoder.pixels} x {encoder.pixels}"
    of_rule = "".join(f"\n| {name} | {why} |" for name, why in found.account.left_out.items())
    of_rule += "".join(f"\n| {name} | unknown |" for name in found.account.unknown)
    left = f"\n## Left out\n\n| key | why |\n|---|---|{of_rule}\n" if of_rule else ""
    return f"""---
library_name: timm
tags:
- image-feature-extraction
- timm
---
# {file.stem}: {encoder.architecture}, converted

A checkpoint of {found.layout.name} as a timm model: {"; ".join(found.architecture.said)}. {size} in, {encoder.width}
features out. Its licence and its training are its authors'.

When it was written it was loaded again: {found.num_tensors} of {found.num_tensors} tensors, the same answers bit for
bit.
{found.layout.note}

## Load

{how_to_load(encoder)}
{left}"""
