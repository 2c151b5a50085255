"""The published layouts of checkpoints: known by which keys, what is left out and why, what timm calls the rest.

Names and shapes are facts of these files, read there:

    MAE       facebookresearch/mae, models_mae.py, util/misc.py (save_model)
    DINO      facebookresearch/dino, vision_transformer.py, utils.py (MultiCropWrapper), main_dino.py (save_dict)
    iBOT      bytedance/ibot, models/vision_transformer.py, models/swin_transformer.py, models/head.py,
              extract_backbone_weights.py
    DINOv2    facebookresearch/dinov2, dinov2/models/vision_transformer.py, dinov2/train/ssl_meta_arch.py; its chunked
              blocks keep their number: blocks.CHUNK.BLOCK
    DINOv3    facebookresearch/dinov3, dinov3/models/vision_transformer.py, dinov3/layers/attention.py
              (LinearKMaskedBias), dinov3/layers/rope_position_encoding.py, dinov3/hub/backbones.py
    BEiT      microsoft/unilm, beit/modeling_pretrain.py, beit/modeling_finetune.py
    SimMIM    microsoft/SimMIM, models/simmim.py, models/vision_transformer.py, models/swin_transformer.py
    Swin      microsoft/Swin-Transformer, models/swin_transformer.py
    EsViT     microsoft/esvit, models/swin_transformer.py, main_esvit.py (heads are put into the Swin itself)
    timm      huggingface/pytorch-image-models, timm/models/{vision_transformer,beit,eva,swin_transformer}.py

The renamings are timm's own (`checkpoint_filter_fn` of those files), written down again: timm's functions drop what
they do not want without a word, and here every key is accounted for. The tests hold both against each other.

Not in the shapes and known by the layout: LayerNorm's epsilon is 1e-6 in all ViTs and BEiTs, 1e-5 in DINOv3's, as
timm has them. EsViT's and iBOT's Swins have 1e-6 where timm's has 1e-5 and no way to ask for another: `note` says so.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssl_global.converting import shapes
from ssl_global.converting.shapes import Architecture, Asked, State
from ssl_global.errors import UserError

# Tensors by name, each with the names that it was made of, its own first.
Changed = dict[str, tuple[Tensor, tuple[str, ...]]]
Mean = tuple[float, float, float]
IMAGENET: tuple[Mean, Mean] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION: tuple[Mean, Mean] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Keys:
    """A file's tensors, by names without what wraps the backbone: `module.`, `backbone.`, `encoder.`.

    What stands beside the backbone in the same entry begins with "/".
    """

    state: State
    original: dict[str, str]  # the name in the file
    entry: str | None
    entries: tuple[str, ...]
    wrapped: str  # what was taken away: "backbone." or "encoder." or nothing

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, name) for name in self.state)

    @property
    def teaches(self) -> bool:
        """Whether the file is of a method with a student and a teacher."""
        return bool({"student", "teacher"} & {self.entry, *self.entries})


@dataclass(frozen=True)
class Layout:
    name: str
    is_it: Callable[[Keys], bool]
    build: Callable[[State, Asked], Architecture]
    left_out: tuple[tuple[str, str], ...] = ()  # what such names begin with, as a pattern; why
    renames: tuple[tuple[str, str], ...] = ()  # theirs, timm's; # stands for a number
    change: Callable[[State], Changed] | None = None  # what is more than a name
    sources: dict[str, str] = field(default_factory=dict)  # timm's name to theirs, of what `change` makes
    normalisation: tuple[Mean, Mean] = IMAGENET
    later_downsample: bool = False  # timm's Swin merges patches at the start of a stage, Microsoft's at the end
    note: str = ""

    def to_timm(self, name: str) -> str:
        for theirs, timms in self.renames:
            name = replaced(name, theirs, timms)
        return moved(name, 1) if self.later_downsample else name

    def to_theirs(self, name: str, present: Iterable[str]) -> str:
        """What timm's `name` is called in a file that has the names `present`."""
        for timms, theirs in self.sources.items():
            name = replaced(name, timms, theirs)
        for theirs, timms in self.renames:
            if any(replaced(other, theirs, timms) != other for other in present):  # a gated layer, or a plain one
                name = replaced(name, timms, theirs)
        return moved(name, -1) if self.later_downsample else name

    def why_not(self, name: str) -> str | None:
        """Why the tensor of that name is left out, or None if it is not."""
        return next((why for pattern, why in self.left_out if re.match(pattern, name)), None)


def replaced(name: str, old: str, new: str) -> str:
    """`old` may stand anywhere in the name, between dots; numbers, as #, are kept in their order."""
    pattern = re.escape(old).replace(r"\#", r"(\d+)")
    found = re.search(rf"(?<![^.]){pattern}(?![^.])", name)
    if found is None:
        return name
    filled = new
    for number in found.groups():
        filled = filled.replace("#", number, 1)
    return name[: found.start()] + filled + name[found.end() :]


def moved(name: str, by: int) -> str:
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + by}.downsample.", name)


# ------------------------------------------------------------------------------------------ what is more than a name


def with_registers(state: State) -> Changed:
    """DINOv2 adds a position to the class token and none to the registers between; timm's no_embed_class has none for
    both: the class token's is added to it for good."""
    changed: Changed = {name: (tensor, (name,)) for name, tensor in state.items()}
    if "register_tokens" in state and "cls_token" in state and "pos_embed" in state:
        positions = state["pos_embed"]
        changed["cls_token"] = state["cls_token"] + positions[:, :1], ("cls_token", "pos_embed")
        changed["pos_embed"] = positions[:, 1:], ("pos_embed",)
    return changed


def split_biases(state: State) -> Changed:
    """DINOv3 has a bias for q, k, v in one, times a mask that is 0 for k; timm has one for q and one for v.

    Raises UserError where k has a bias that counts: after the rotation no softmax would forgive its loss.
    """
    changed: Changed = {}
    for name, tensor in state.items():
        if not name.endswith(".attn.qkv.bias"):
            changed[name] = tensor, (name,)
            continue
        mask = state.get(f"{name}_mask")
        of_q, of_k, of_v = (tensor if mask is None else tensor * mask.to(tensor.dtype)).chunk(3)
        if of_k.any() or not torch.isfinite(torch.cat([of_q, of_k, of_v])).all():
            raise UserError(f"has a bias of k, or none that is finite, in {name}: timm's Eva has no place for it")
        used = (name,) if mask is None else (name, f"{name}_mask")
        changed[name.replace("qkv.bias", "q_bias")] = of_q, used
        changed[name.replace("qkv.bias", "v_bias")] = of_v, used
    return {name: value for name, value in changed.items() if not name.endswith(".qkv.bias_mask")}


def dinov3(state: State, asked: Asked) -> Architecture:
    """Raises UserError for periods that are not those of timm's: base 100, one for each fourth of a head."""
    periods = state.get("rope_embed.periods")
    if periods is not None:
        quarter = len(periods)
        expected = 100 ** (torch.arange(quarter) / quarter)
        # They may have been computed in bfloat16, as in the training configuration: 8 bits.
        if not torch.allclose(periods.float(), expected, rtol=2**-7):
            raise UserError("has rope_embed.periods that are not DINOv3's, 100 ** (0, 1/n, 2/n, ...)")
    return shapes.dinov3(state, asked)


# --------------------------------------------------------------------------------------------------------- the layouts

HIDDEN = "stands for hidden patches, in pretraining only"
HEAD = "a projection head, of pretraining"
CLASSIFIER = "a classifier: the export is a backbone"
COMPUTED = "computed from the sizes, nothing learnt"
DECODER = "the decoder, of pretraining"

OF_HEADS = (
    (r"/?(dino_|ibot_)?head(_dense)?\.(mlp|last_layer2?)\.", HEAD),
    (r"/?head\.last_norm2?\.", HEAD),  # iBOT's head may have a norm without parameters, or a batch norm
)
OF_CLASSIFIERS = ((r"head(_dist)?\.(fc\.)?(weight|bias)$", CLASSIFIER),)
OF_RELATIVE = ((r"(.*\.)?relative_position_index$", COMPUTED),)
OF_SWIN = ((r".*\.attn_mask$", COMPUTED), *OF_RELATIVE)
OTHER_EPSILON = (
    "its LayerNorms have an epsilon of 1e-6, timm's Swin has 1e-5: features differ by about 5e-6 of their size, more "
    "where activations vary little"
)


def is_vit(keys: Keys) -> bool:
    return keys.has(r"blocks\.\d+\.(\d+\.)?attn\.qkv\.weight") and not is_beit(keys)


def is_beit(keys: Keys) -> bool:
    return keys.has(r"blocks\.\d+\.attn\.(q_bias|relative_position)|rel_pos_bias\.") and not is_dinov3(keys)


def is_dinov3(keys: Keys) -> bool:
    return keys.has(r"storage_tokens$|rope_embed\.periods$") or (
        keys.has(r"reg_token$") and keys.has(r"blocks\.\d+\.gamma_1$") and not keys.has("pos_embed$")
    )


def is_swin(keys: Keys) -> bool:
    return keys.has(r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table") and not keys.has(
        r"layers\.\d+\.blocks\.\d+\.attn\.logit_scale"
    )


# In this order: the first that is it. What is a plain ViT without anything beside it is the last of the ViTs.
LAYOUTS = (
    Layout(
        "DINOv3",
        lambda keys: is_dinov3(keys) and not keys.has("reg_token$"),
        dinov3,
        left_out=(
            ("mask_token$", HIDDEN),
            (r"rope_embed\.periods$", "timm's own: compared, and the same"),
            (r"local_cls_norm\.", "for local crops, in pretraining only"),
            *OF_HEADS,
        ),
        renames=(
            ("storage_tokens", "reg_token"),
            ("blocks.#.ls1.gamma", "blocks.#.gamma_1"),
            ("blocks.#.ls2.gamma", "blocks.#.gamma_2"),
            ("blocks.#.mlp.w1", "blocks.#.mlp.fc1_g"),
            ("blocks.#.mlp.w2", "blocks.#.mlp.fc1_x"),
            ("blocks.#.mlp.w3", "blocks.#.mlp.fc2"),
        ),
        change=split_biases,
        sources={
            "blocks.#.attn.q_bias": "blocks.#.attn.qkv.bias",
            "blocks.#.attn.v_bias": "blocks.#.attn.qkv.bias",
        },
    ),
    Layout("timm's DINOv3", is_dinov3, shapes.dinov3, left_out=OF_CLASSIFIERS),
    Layout(
        "DINOv2",
        lambda keys: (
            is_vit(keys)
            and keys.has("mask_token$|register_tokens$")
            and keys.has(r"blocks\.\d+\.ls1\.gamma$|register_tokens$")
        ),
        shapes.vit,
        left_out=(("mask_token$", HIDDEN), *OF_HEADS),
        renames=(
            ("register_tokens", "reg_token"),
            ("blocks.#.mlp.w12", "blocks.#.mlp.fc1"),
            ("blocks.#.mlp.w3", "blocks.#.mlp.fc2"),
        ),
        change=with_registers,
    ),
    Layout(
        "SimMIM",
        lambda keys: is_beit(keys) and keys.wrapped == "encoder.",
        shapes.beit,
        left_out=(("mask_token$", HIDDEN), (r"/decoder\.", DECODER), *OF_RELATIVE),
    ),
    Layout(
        "BEiT",
        is_beit,
        shapes.beit,
        left_out=(("mask_token$", HIDDEN), (r"lm_head\.", HEAD), *OF_CLASSIFIERS, *OF_RELATIVE),
        normalisation=INCEPTION,
    ),
    Layout(
        "MAE",
        lambda keys: (
            is_vit(keys) and (keys.has("decoder_") or keys.entry == "model") and not keys.has("head|blocks.*ls1")
        ),
        shapes.vit,
        left_out=(("decoder_", DECODER), ("mask_token$", HIDDEN)),
    ),
    Layout(
        "iBOT",
        lambda keys: is_vit(keys) and (keys.teaches or keys.entry == "state_dict") and is_ibot(keys),
        shapes.vit,
        left_out=(("masked_embed$", HIDDEN), *OF_HEADS),
        renames=(("blocks.#.gamma_1", "blocks.#.ls1.gamma"), ("blocks.#.gamma_2", "blocks.#.ls2.gamma")),
    ),
    Layout("DINO", lambda keys: is_vit(keys) and keys.teaches, shapes.vit, left_out=OF_HEADS),
    Layout("a plain ViT (DINO's, DeiT's, timm's)", is_vit, shapes.vit, left_out=OF_CLASSIFIERS),
    Layout(
        "SimMIM",
        lambda keys: is_swin(keys) and keys.wrapped == "encoder.",
        shapes.swin,
        left_out=(("mask_token$", HIDDEN), (r"/decoder\.", DECODER), *OF_SWIN),
        later_downsample=True,
    ),
    Layout(
        "iBOT",
        lambda keys: is_swin(keys) and (keys.wrapped == "backbone." or keys.has("masked_embed$")),
        shapes.swin,
        left_out=(("masked_embed$", HIDDEN), *OF_HEADS, *OF_SWIN),
        later_downsample=True,
        note=OTHER_EPSILON,
    ),
    Layout(
        "EsViT",
        lambda keys: is_swin(keys) and (keys.teaches or keys.has(r"head\.mlp\.")),
        shapes.swin,
        left_out=(*OF_HEADS, *OF_SWIN),
        later_downsample=True,
        note=OTHER_EPSILON,
    ),
    Layout(
        "Microsoft's Swin",
        lambda keys: is_swin(keys) and keys.has(r"layers\.0\.downsample\."),
        shapes.swin,
        left_out=(*OF_CLASSIFIERS, *OF_SWIN),
        later_downsample=True,
    ),
    Layout("timm's Swin", is_swin, shapes.swin, left_out=(*OF_CLASSIFIERS, *OF_SWIN)),
)


def is_ibot(keys: Keys) -> bool:
    """What DINO has not: a second output of the head, something for hidden patches, LayerScale, an entry of its own."""
    own = r"masked_embed$|/head\.last_layer2|blocks\.\d+\.gamma_1$|fc_norm\."
    return keys.entry == "state_dict" or keys.has(own)


def layout_of(keys: Keys) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.is_it(keys)), None)
