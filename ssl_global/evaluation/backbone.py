"""A backbone to judge, by name: an export folder, a run folder, or any model of timm."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import UserError
from ssl_global.recipe import Data


@dataclass(frozen=True)
class Backbone:
    """Images to features, and how the images have to be."""

    name: str
    embed: Callable[[Tensor], Tensor]  # (B, channels, pixels, pixels), normalised -> (B, width)
    pixels: int
    channels: int
    mean: tuple[float, ...]  # of each channel, in 0..1
    std: tuple[float, ...]
    width: int


def load_backbone(
    name: str, what: str | None, *, run_backbone: Callable[[Path, str | None], Backbone], device: torch.device
) -> Backbone:
    """The backbone called `name`, in eval mode, on `device`.

    name           an export folder, a run folder, or a timm name: with its .tag the published weights, which are
                   downloaded unless they are there already; without a tag untrained, from seed 0
    what           which of a run's encoders; only runs have several
    run_backbone   loads a run folder: what training wrote is not known here

    Raises UserError for a name that is none of these, and for weights that cannot be had.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return run_backbone(folder, what)
    if what is not None:
        raise UserError(f"--what {what} chooses one of a run's encoders, and {name} is no run folder")
    if folder.is_dir():
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder}: no model.safetensors there; weights in other files are pickles, and not read")
        return of_timm_model(name, timm_model(f"local-dir:{folder}", pretrained=True), device)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise UserError(f"{name}: no such folder, and no model of timm; the nearest are {', '.join(nearest) or 'none'}")
    return of_timm_model(name, timm_model(name, pretrained=bool(tag)), device)


def timm_model(name: str, *, pretrained: bool) -> nn.Module:
    # httpx's errors, which the hub lets through, share no base with anything but Exception.
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0)
            return model
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: cannot be loaded: {reason}") from error


def of_timm_model(name: str, model: nn.Module, device: torch.device) -> Backbone:
    """Raises UserError if its own config.json asks for images that it does not take, or says no features of them."""
    model = model.to(device).eval()
    try:
        config = resolve_model_data_config(model)
        channels, pixels, _ = config["input_size"]
        mean, std = (tuple(map(float, config[name])) for name in ("mean", "std"))
        Data(channels=channels, mean=mean, std=std, max_pixels=pixels**2).check()
        with torch.no_grad():
            features_BD = model(torch.zeros(1, channels, pixels, pixels, device=device))
        _, width = features_BD.shape
    except Exception as error:  # of any kind, whatever somebody has written into the file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: gives no features of images as its config describes them: {reason}") from error
    return Backbone(
        name=name,
        embed=model,
        pixels=pixels,
        channels=channels,
        mean=mean,
        std=std,
        width=width,
    )


def of_encoder(name: str, encoder: Encoder, data: Data, device: torch.device) -> Backbone:
    """An encoder of ours, as it came out of a run with these data settings."""
    encoder = encoder.to(device).eval()
    return Backbone(
        name=name,
        embed=lambda images: encoder.encode(images).summary,
        pixels=encoder.pixels,
        channels=encoder.channels,
        mean=data.normalisation[0],
        std=data.normalisation[1],
        width=encoder.width,
    )
