"""Any model of timm with weights from somewhere, to be fine-tuned: an export of ours, a published model, or none.

    PretrainedConfig(name="resnet50", attention=("layer3=non_local",))

What it is made of is in the settings (timm's name and arguments, the attention modules), so that a checkpoint can be
built again without the weights that the run began from: those are read once, by `begin_from`.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import to_2tuple
from torch import Tensor, nn

from ssl_global.attention.attach import Attachment, attach, placed, spelled
from ssl_global.attention.cost import named
from ssl_global.encoders.encoder import Encoder, Tokens
from ssl_global.encoders.pooling import attention_pool, pool_by_attention
from ssl_global.errors import UserError, wrong
from ssl_global.recipe import EncoderConfig

if TYPE_CHECKING:
    from ssl_global.recipe import Recipe

USUAL_PIXELS = 224  # of timm's models
POOLINGS = ("token", "avg", "max", "avgmax", "map")  # that are offered where another was asked for
# Arguments of timm.create_model by which a stranger's configuration could have other files read or fetched.
NOT_THE_MODELS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
OF_THE_POOLING = ("attn_pool", "fc_norm")  # parts that a model gets with another pooling; new, like a head


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig(EncoderConfig):
    name: str = "vit_base_patch16_224"  # timm's architecture; --backbone sets it
    model_args: str = "{}"  # for timm.create_model, as JSON; --backbone sets it
    attention: tuple[str, ...] = ()  # modules to put in: non_local, PLACE=MODULE, or 'PLACE=MODULE(option=value)'
    pool: str = ""  # token, avg, max, avgmax, or map (a learned query's attention); the model's own if empty

    def check(self, recipe: "Recipe") -> None:
        try:
            arguments = json.loads(self.model_args)
        except json.JSONDecodeError as error:
            raise wrong("encoder.model_args", self.model_args, f"no JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise wrong("encoder.model_args", self.model_args, "a JSON object would be right")
        if others := sorted(arguments.keys() & NOT_THE_MODELS):
            raise wrong("encoder.model_args", self.model_args, f"without {others[0]}: weights are --backbone's")
        if not timm.is_model(self.name):
            try:
                named(self.name)
            except ValueError as error:
                raise UserError(f"encoder.name = {error}") from error
        if not 0 <= self.drop_path < 1:
            raise wrong("encoder.drop_path", self.drop_path, "at least 0, below 1")

    def hides(self, masking: str) -> int | None:
        return None

    def build(self, recipe: "Recipe") -> "Pretrained":
        return Pretrained(self, pixels=recipe.views.globals.pixels, channels=recipe.data.channels)


def of_backbone(config: PretrainedConfig, backbone: str) -> PretrainedConfig:
    """With the name, arguments and weights of `backbone`: an export's folder, a run's, or a timm name.

    A name with its .tag has published weights, one without has none. Raises UserError for what is none of these.
    """
    folder = Path(backbone)
    if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "export" / "config.json").is_file():
        folder = folder / "export"
    if folder.is_dir():
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise UserError(f"--backbone {backbone}: no export there (config.json); ssl-global export RUN writes one")
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"--backbone {backbone}: no model.safetensors there; is the export whole?")
        try:
            found = json.loads(config_file.read_text())
            name, arguments = str(found["architecture"]), found.get("model_args") or {}
            if others := sorted(arguments.keys() & NOT_THE_MODELS):
                raise ValueError(f"model_args has {others[0]}")
            attention = tuple(spelled(place, *one) for place, one in (found.get("attention") or {}).items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--backbone {config_file}: no configuration of timm's: {error}") from error
        if "segmenter" in found:
            raise UserError(f"--backbone {backbone}: a segmenter; the backbone that it was made of would be right")
        # Its attention modules and its pooling come along, unless others are chosen.
        modules, pool = config.attention or attention, config.pool or ("map" if found.get("attention_pool") else "")
        return replace(
            config,
            name=name,
            model_args=json.dumps(arguments),
            weights=str(folder.resolve()),
            attention=modules,
            pool=pool,
        )
    architecture, _, tag = backbone.partition(".")
    if not timm.is_model(architecture):
        try:
            named(architecture)
        except ValueError as error:
            raise UserError(f"--backbone {error}, and no folder either") from error
    # With published weights, which are a plain Swin's, it begins as what they are of.
    arguments = {"start": "identity"} if tag and architecture.startswith("global_swin_") else {}
    return replace(config, name=architecture, model_args=json.dumps(arguments), weights=backbone if tag else None)


class Pretrained(Encoder):
    """See `Encoder`; `model` has attention modules as its `attached` children. It hides nothing."""

    model: Any  # timm's models share names, and no type

    def __init__(self, config: PretrainedConfig, *, pixels: int, channels: int) -> None:
        super().__init__()
        self.architecture, self.pixels, self.channels = config.name, pixels, channels
        self.model_args: dict[str, Any] = json.loads(config.model_args) | {"in_chans": channels}
        if config.pool:
            self.model_args["global_pool"] = global_pool(config, self.model_args)
        try:
            if takes_size(config.name, self.model_args):
                self.model_args["img_size"] = pixels
            self.model = create(config.name, config.drop_path, num_classes=0, **self.model_args)
        except Exception as error:  # of many kinds, whatever the arguments say
            raise UserError(f"encoder.name = {config.name}: cannot be built so: {said_by(error)}") from error
        if config.pool == "map" and self.model_args["global_pool"] != "map":
            pool_by_attention(self.model)
        self.width = self.first_width = int(getattr(self.model, "head_hidden_size", self.model.num_features))
        self.patch = 0  # nothing is hidden
        if config.attention:
            try:
                attach(self.model, placed(self.model, config.attention), input_size=(channels, pixels, pixels))
            except ValueError as error:
                raise UserError(f"encoder.attention = {config.attention}: {error}") from error

    def encode(
        self,
        images: Tensor,
        hidden: Tensor | None = None,
        *,
        num_hidden: int | None = None,
        replaced: Tensor | None = None,
        token: Tensor | None = None,
    ) -> Tokens:
        assert hidden is None, "hides nothing"
        assert replaced is None, "replaces nothing"
        features = self.model.forward_features(images)
        summary = self.model.forward_head(features, pre_logits=True)
        return Tokens(summary=summary, patches=summary[:, None], grid=(1, 1))

    def tell_apart(self, classes: tuple[str, ...], *, multi_label: bool = False) -> None:
        """A new classifier for these behind the pooling that is there."""
        pool = attention_pool(self.model)
        self.model.reset_classifier(len(classes))
        if pool is not None and attention_pool(self.model) is None:  # some of timm's make their average anew
            pool_by_attention(self.model).load_state_dict(pool.state_dict())
        self.classes, self.multi_label = classes, multi_label

    @property
    def attachment(self) -> Attachment:
        return Attachment(self.model)

    def classifiers(self) -> list[nn.Module]:
        """One, or the two of a distilled model."""
        found = self.model.get_classifier()
        return list(found) if isinstance(found, tuple) else [found]

    def new_parts(self) -> list[nn.Module]:
        """What did not come with the weights: the classifier, another pooling, attention modules."""
        parts = [*self.classifiers(), *(getattr(self.model, name, None) for name in OF_THE_POOLING)]
        parts.append(attention_pool(self.model))
        return [part for part in parts if isinstance(part, nn.Module)] + list(self.attachment.places.values())

    def recompute_activations(self) -> None:
        self.model.set_grad_checkpointing(True)

    def begin_from(self, weights: str) -> None:
        """Reads the weights. Raises UserError if they cannot be had, or are not this model's."""
        own = {name: value for name, value in self.model_args.items() if name != "global_pool"}
        of_classifiers = paths(self.model, self.classifiers())
        source = weights_of(weights, num_classes=0, **own)
        source = {key: tensor for key, tensor in source.items() if not key.startswith(of_classifiers)}
        load_all_but(self.new_parts(), self.model, renamed(source, self.model.state_dict()), weights)


def create(name: str, drop_path: float, **options: Any) -> nn.Module:
    """timm's model, untrained. Raises UserError for a drop path where there can be none."""
    try:
        model: nn.Module = timm.create_model(name, drop_path_rate=drop_path, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        if drop_path:
            raise wrong("encoder.drop_path", drop_path, f"{name} has none; 0 would be right") from error
        model = timm.create_model(name, **options)
    return model


def weights_of(weights: str, **options: Any) -> dict[str, Tensor]:
    """Of an export's folder, or of timm's published model of that name. Raises UserError if they cannot be had."""
    folder = Path(weights)
    try:
        with torch.random.fork_rng(devices=[]):
            if folder.is_dir():
                return of_export(folder, options)
            state: dict[str, Tensor] = timm.create_model(weights, pretrained=True, **options).state_dict()
            return state
    except Exception as error:  # of many kinds: the hub's, safetensors', timm's
        raise UserError(f"{weights}: its weights cannot be loaded: {said_by(error)}") from error


def said_by(error: Exception) -> str:
    """The first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def of_export(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    """Resampled to the sizes in `options` by timm, as it loads them; parts that timm does not know are as they are."""
    found = json.loads((folder / "config.json").read_text())
    if not (found.get("attention") or found.get("attention_pool")):
        state: dict[str, Tensor] = timm.create_model(f"local-dir:{folder}", pretrained=True, **options).state_dict()
        return state
    tensors = load_file(folder / "model.safetensors")
    known = timm.create_model(found["architecture"], **(options | {"num_classes": 0, "features_only": False}))
    own = {key: tensor for key, tensor in tensors.items() if key in known.state_dict()}
    resampled = getattr(sys.modules[type(known).__module__], "checkpoint_filter_fn", lambda state, model: state)
    return {key: tensor for key, tensor in tensors.items() if key not in own} | resampled(own, known)


def load_all_but(new_parts: list[nn.Module], model: nn.Module, found: dict[str, Tensor], weights: str) -> None:
    """See `load_but`."""
    load_but(paths(model, new_parts), model, found, weights)


def load_but(new: tuple[str, ...], model: nn.Module, found: dict[str, Tensor], weights: str, hint: str = "") -> None:
    """New parts, whose names begin so, that are there too, of the same shapes, are loaded, each whole or not at all.
    Raises UserError, ending in `hint`, if `found` lacks a tensor that is in none of them, or has it in another shape.
    """
    ours = model.state_dict()
    unlike = [key for key in ours if key not in found or found[key].shape != ours[key].shape]
    old = [key for key in unlike if not key.startswith(new)]
    if missing := [key for key in old if key not in found]:
        raise UserError(f"{weights}: lacks {missing[0]} and {len(missing) - 1} more of {type(model).__name__}{hint}")
    if old:
        shapes = " and not ".join(str(tuple(state[old[0]].shape)) for state in (found, ours))
        raise UserError(f"{weights}: its {old[0]} is {shapes}: not of this {type(model).__name__}{hint}")
    others = tuple(path for path in new if any(key.startswith(path) for key in unlike))
    taken = {key: found[key] for key in ours if not key.startswith(others)}
    model.load_state_dict(taken, strict=False)


def paths(model: nn.Module, parts: list[nn.Module]) -> tuple[str, ...]:
    """What the keys of these parts' tensors begin with."""
    return tuple(f"{path}." for path, part in model.named_modules() if part in parts)


def renamed(state: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm calls a ViT's last norm fc_norm where it stands behind the pooling: it begins as what was before it, and
    the other way round."""
    for theirs, new in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        if f"{new}weight" in ours.keys() - state.keys() and f"{theirs}weight" in state.keys() - ours.keys():
            return {new + key.removeprefix(theirs) if key.startswith(theirs) else key: v for key, v in state.items()}
    return state


def takes_size(name: str, arguments: dict[str, Any]) -> bool:
    """Whether timm's model is built for one size of images."""
    with torch.device("meta"):
        outline = timm.create_model(name, num_classes=0, **arguments)
    return getattr(getattr(outline, "patch_embed", None), "img_size", None) is not None


def global_pool(config: PretrainedConfig, arguments: dict[str, Any]) -> str:
    """What timm is to be asked for to have the pooling that the settings say; "avg" where ours takes its place.

    Raises UserError, listing the poolings that the model can have.
    """

    def asked_for(pool: str) -> str | None:
        for timms in (pool, "avg") if pool == "map" else (pool,):
            try:
                with torch.device("meta"):
                    model = timm.create_model(config.name, num_classes=0, **(arguments | {"global_pool": timms}))
                    if timms != pool:
                        pool_by_attention(model)
                        size = (arguments["in_chans"], *to_2tuple(arguments.get("img_size", USUAL_PIXELS)))
                        model.eval()(torch.zeros(1, *size))  # a head may want more of its average than this
            except (TypeError, AssertionError, ValueError, RuntimeError):
                continue
            return timms
        return None

    found = asked_for(config.pool)
    if found is None:
        others = ", ".join(pool for pool in POOLINGS if asked_for(pool))
        raise wrong("encoder.pool", config.pool, f"{config.name} has {others or 'no choice of pooling'}")
    return found
