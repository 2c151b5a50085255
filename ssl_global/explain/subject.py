"""What is explained, by name: an export's folder, a run's, or any model of timm."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import UserError
from ssl_global.evaluation.backbone import load_backbone
from ssl_global.explain.gradcam import class_names
from ssl_global.explain.places import network
from ssl_global.export import is_export, load
from ssl_global.methods.method import Method
from ssl_global.recipe import Data


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    model    an encoder of ours, or any model, in eval mode, on the device
    data     how its images are normalised, and how many channels they have
    pixels   side of the images that it is made for
    classes  their names, of a classifier
    method   of a run: what it was learnt with
    run      its folder
    """

    name: str
    model: nn.Module
    data: Data
    pixels: int
    classes: list[str] = field(default_factory=list)
    method: Method | None = None
    run: Path | None = None
    recipe: dict[str, Any] | None = None

    @property
    def multiple(self) -> int:
        """What the sides of its images should be multiples of: its patch, or the stride of its last map."""
        model = network(self.model)
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        reductions = [int(stage["reduction"]) for stage in getattr(model, "feature_info", []) if "reduction" in stage]
        side = max(patch) if isinstance(patch, tuple | list) else patch
        return max([1, *reductions, *([side] if isinstance(side, int) else [])])

    def summaries(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D). Raises UserError for a model that says nothing of a whole image, as a segmenter."""
        with torch.no_grad():
            if isinstance(self.model, Encoder) and type(self.model).encode is not Encoder.encode:
                return self.model.encode(images).summary.float()
            model: Any = network(self.model)
            if not hasattr(model, "forward_head"):
                raise UserError(f"{type(model).__name__}: says nothing of a whole image")
            summary: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
            return summary.float()


def subject(
    name: str, what: str | None, *, run_subject: Callable[[Path, str | None], Subject], device: torch.device
) -> Subject:
    """The backbone called `name`, as `load_backbone` takes names.

    what         which of a run's encoders; only runs have several
    run_subject  loads a run's folder: what training wrote is not known here

    Raises UserError for a name that is none of these, and for weights that cannot be had.
    """
    folder = Path(name)
    if folder.is_dir() and not is_export(folder):
        return run_subject(folder, what)
    if what is not None:
        raise UserError(f"--what {what} chooses one of a run's encoders, and {name} is no run folder")
    if folder.is_dir():
        try:
            model = load(folder)
            own = of_timm_config(folder)
        except Exception as error:  # of any kind, whatever somebody has written into the files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder}: cannot be loaded: {reason}") from error
        run = folder.parent if (folder.parent / "run.json").is_file() else None
        return Subject(name=name, model=model.to(device), classes=class_names(folder), run=run, **own)
    chosen = load_backbone(name, None, run_backbone=never, device=device)
    data = Data(channels=chosen.channels, mean=chosen.mean, std=chosen.std)
    assert isinstance(chosen.embed, nn.Module)
    return Subject(name=name, model=chosen.embed, data=data, pixels=chosen.pixels)


def of_timm_config(folder: Path) -> dict[str, Any]:
    """How its images have to be."""
    own = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    channels, pixels, _ = own["input_size"]
    data = Data(channels=channels, mean=tuple(own["mean"]), std=tuple(own["std"]))
    data.check()
    return {"data": data, "pixels": pixels}


def never(folder: Path, what: str | None) -> Any:
    raise AssertionError(folder)
