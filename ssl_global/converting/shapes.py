"""Which of timm's models a checkpoint's tensors are of, read off their shapes.

Each function takes tensors by their published names and gives a timm name with all arguments written out, so that no
default of the name matters but those that have no shape: activation, epsilon, rotary temperature.

How many heads there are is in no shape of a plain ViT. They are 64 wide in all published ones but those of `HEADS`;
relative positions (BEiT, Swin) and DINOv3's periods do give the number. The side of the images is the positions' grid
times the patch; a Swin's is what its last stage's window covers, 7 x 32 = 224, which is so for all published ones,
unless its attention masks say more. What was assumed is said, and can be set.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ssl_global.errors import UserError, wrong

State = dict[str, Tensor]

HEAD_WIDTH = 64
# Heads of the published ViTs whose heads have another width: MAE's and timm's ViT-H, EVA's and timm's ViT-g and -G.
HEADS = {1280: 16, 1408: 16, 1664: 16}

# timm's names by width; the first one stands for widths that nobody has published.
VIT = {
    384: "vit_small_patch16_224", 192: "vit_tiny_patch16_224", 768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224", 1280: "vit_huge_patch14_224",
}  # fmt: skip
DINOV2 = {
    384: "vit_small_patch14_dinov2", 768: "vit_base_patch14_dinov2", 1024: "vit_large_patch14_dinov2",
    1536: "vit_giant_patch14_dinov2",
}  # fmt: skip
DINOV3 = {
    384: "vit_small_patch16_dinov3", 768: "vit_base_patch16_dinov3", 1024: "vit_large_patch16_dinov3",
    1280: "vit_huge_plus_patch16_dinov3", 4096: "vit_7b_patch16_dinov3",
}  # fmt: skip
BEIT = {768: "beit_base_patch16_224", 1024: "beit_large_patch16_224"}
SWIN = {
    96: "swin_tiny_patch4_window7_224", 128: "swin_base_patch4_window7_224", 192: "swin_large_patch4_window7_224",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """What `timm.create_model(name, num_classes=0, **args)` builds, for square images."""

    name: str
    args: dict[str, Any]
    pixels: int
    channels: int
    said: list[str] = field(default_factory=list)  # in words, with what was assumed


@dataclass(frozen=True)
class Asked:
    """What the user knows better than the shapes."""

    heads: int | None = None
    pixels: int | None = None


def vit(state: State, asked: Asked) -> Architecture:
    """timm's VisionTransformer: positions learned or fixed, LayerScale, registers, pooled by class token or mean."""
    width, channels, patch = patch_embedding(state)
    depth = blocks(state)
    registers = next((state[name] for name in ("register_tokens", "reg_token") if name in state), None)
    num_registers = 0 if registers is None else size(registers, 1)
    grid, prefix = positions(need(state, "pos_embed"), num_registers)
    num_heads, of_heads = heads(width, asked)
    pooled = "fc_norm.weight" in state and "norm.weight" not in state
    swiglu = in_a_block(state, "mlp.w12.weight")
    hidden = size(need(state, "blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight"), 0)
    scaled = in_a_block(state, "ls1.gamma") or in_a_block(state, "gamma_1")
    pixels = grid * patch
    args = {
        "img_size": pixels, "patch_size": patch, "in_chans": channels, "embed_dim": width, "depth": depth,
        "num_heads": num_heads, "mlp_ratio": ratio(hidden, width), "qkv_bias": in_a_block(state, "attn.qkv.bias"),
        "class_token": "cls_token" in state or prefix > 0, "reg_tokens": num_registers,
        "no_embed_class": prefix == 0 or "register_tokens" in state,  # DINOv2's class token takes its position along
        "global_pool": "avg" if pooled else "token", "fc_norm": pooled,
        "dynamic_img_size": True, "dynamic_img_pad": True,
    } | ({"init_values": 1e-5} if scaled else {})  # fmt: skip
    # timm's giant is the only name with DINOv2's gated hidden layer.
    name = DINOV2[1536] if swiglu else named(DINOV2 if scaled and patch == 14 else VIT, width)
    said = [
        f"width {width}, depth {depth}, {of_heads}, patch {patch}",
        f"positions {grid} x {grid} ({pixels} pixels)",
        f"{num_registers} registers" if num_registers else "no registers",
        "the mean of the patches" if pooled else "the class token",
    ]
    return Architecture(name, args, pixels, channels, said)


def beit(state: State, asked: Asked) -> Architecture:
    """timm's Beit: biases of q and v only, relative positions, of each block or shared, class token or mean."""
    width, channels, patch = patch_embedding(state)
    depth = blocks(state)
    tables = ("rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table")
    shared, own = (name in state for name in tables)
    if shared or own:
        table = state[tables[0] if shared else tables[1]]
        # (2 G - 1)^2 offsets, and three for the class token: to it, from it, of itself.
        grid, num_heads = (square_root(size(table, 0) - 3, tables[0] if shared else tables[1]) + 1) // 2, size(table, 1)
        of_heads = f"{num_heads} heads"
    else:
        grid, _ = positions(need(state, "pos_embed"), 0)
        num_heads, of_heads = heads(width, asked)
    pooled = "fc_norm.weight" in state
    pixels = grid * patch
    args = {
        "img_size": pixels, "patch_size": patch, "in_chans": channels, "embed_dim": width, "depth": depth,
        "num_heads": num_heads, "mlp_ratio": ratio(size(need(state, "blocks.0.mlp.fc1.weight"), 0), width),
        "qkv_bias": in_a_block(state, "attn.q_bias"), "use_abs_pos_emb": "pos_embed" in state,
        "use_rel_pos_bias": own, "use_shared_rel_pos_bias": shared,
        "init_values": 0.1 if in_a_block(state, "gamma_1") else None, "global_pool": "avg" if pooled else "token",
    }  # fmt: skip
    said = [
        f"width {width}, depth {depth}, {of_heads}, patch {patch}",
        f"relative positions {'shared by all blocks' if shared else 'of each block' if own else 'none'}, grid "
        f"{grid} x {grid} ({pixels} pixels)",
        "the mean of the patches" if pooled else "the class token",
    ]
    return Architecture(named(BEIT, width), args, pixels, channels, said)


def dinov3(state: State, asked: Asked) -> Architecture:
    """timm's Eva with DINOv3's rotary positions, registers and LayerScale; images of any size."""
    width, channels, patch = patch_embedding(state)
    depth = blocks(state)
    registers = next((state[name] for name in ("storage_tokens", "reg_token") if name in state), None)
    num_registers = 0 if registers is None else size(registers, 1)
    if "rope_embed.periods" in state:
        num_heads = width // (4 * size(state["rope_embed.periods"], 0))
        of_heads = f"{num_heads} heads"
    else:
        num_heads, of_heads = heads(width, asked, known={4096: 32})
    gate = next((name for name in ("blocks.0.mlp.w1.weight", "blocks.0.mlp.fc1_g.weight") if name in state), None)
    hidden = size(need(state, gate or "blocks.0.mlp.fc1.weight"), 0)
    pixels = asked.pixels or 16 * patch
    args: dict[str, Any] = {
        "img_size": pixels, "patch_size": patch, "in_chans": channels, "embed_dim": width, "depth": depth,
        "num_heads": num_heads, "mlp_ratio": ratio(hidden, width), "num_reg_tokens": num_registers,
        "qkv_bias": in_a_block(state, "attn.qkv.bias") or in_a_block(state, "attn.q_bias"),
        "swiglu_mlp": gate is not None, "swiglu_align_to": 1 if gate else 0, "global_pool": "token",
        "dynamic_img_size": True,
    }  # fmt: skip
    said = [
        f"width {width}, depth {depth}, {of_heads}, patch {patch}",
        f"rotary positions, any size; {pixels} pixels {'asked for' if asked.pixels else 'assumed: --pixels'}",
        f"{num_registers} registers" if num_registers else "no registers",
        "the class token",
    ]
    return Architecture(named(DINOV3, width), args, pixels, channels, said)


def swin(state: State, asked: Asked) -> Architecture:
    """timm's Swin, of any number of stages, depths, heads and windows."""
    width, channels, patch = patch_embedding(state)
    stages = numbered(state, r"layers\.(\d+)\.")
    depths = [numbered(state, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)]
    names = [f"layers.{stage}.blocks.0.attn.relative_position_bias_table" for stage in range(stages)]
    tables = [need(state, name) for name in names]
    num_heads = [size(table, 1) for table in tables]
    windows = [(square_root(size(table, 0), name) + 1) // 2 for table, name in zip(tables, names, strict=True)]
    stride = patch * 2 ** (stages - 1)
    pixels, why = asked.pixels or windows[-1] * stride, "asked for" if asked.pixels else "what the last window covers"
    masks = {name: tensor for name, tensor in state.items() if name.endswith(".attn_mask")}
    if masks and not asked.pixels:
        name, mask = next(iter(masks.items()))  # (windows, window^2, window^2)
        side = square_root(size(mask, 0) * size(mask, 1), name) * patch * 2 ** int(name.split(".")[1])
        pixels, why = side, "as its masks say"
    args = {
        "img_size": pixels, "patch_size": patch, "in_chans": channels, "embed_dim": width, "depths": depths,
        "num_heads": num_heads, "window_size": [[window, window] for window in windows],
        "mlp_ratio": ratio(size(need(state, "layers.0.blocks.0.mlp.fc1.weight"), 0), width),
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state,
    }  # fmt: skip
    shown = windows[0] if len(set(windows)) == 1 else windows
    said = [
        f"width {width}, depths {depths}, heads {num_heads}, window {shown}, patch {patch}",
        f"{pixels} pixels ({why}: --pixels)",
        "the mean of the patches",
    ]
    return Architecture(named(SWIN, width), args, pixels, channels, said)


# ------------------------------------------------------------------------------------------------------------- reading


def need(state: State, name: str) -> Tensor:
    if name not in state:
        raise UserError(f"lacks {name}, by whose shape it would be known")
    return state[name]


def patch_embedding(state: State) -> tuple[int, int, int]:
    """Width, channels, side of a patch."""
    weight = need(state, "patch_embed.proj.weight")
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise UserError(f"has patch_embed.proj.weight as {tuple(weight.shape)}; (width, channels, side, side) is read")
    width, channels, patch, _ = map(int, weight.shape)
    return width, channels, patch


def blocks(state: State) -> int:
    return numbered(state, r"blocks\.(\d+)\.")


def numbered(state: State, pattern: str) -> int:
    """How many there are of what the names number from 0."""
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    if not found:
        raise UserError(f"has no {pattern.replace(chr(92), '')}")
    return max(found) + 1


def in_a_block(state: State, name: str) -> bool:
    """Whether any block has it: one of them may be what is missing."""
    return any(re.fullmatch(rf"blocks\.\d+\.{re.escape(name)}", key) for key in state)


def positions(table: Tensor, num_registers: int) -> tuple[int, int]:
    """The side of the grid, and how many tokens before the patches have positions too: none, or all."""
    count = size(table, 1)
    for prefix in (0, 1, 1 + num_registers):
        if math.isqrt(count - prefix) ** 2 == count - prefix:
            return math.isqrt(count - prefix), prefix
    raise UserError(f"has positions for {count} tokens, which are no square grid, with or without a class token")


def heads(width: int, asked: Asked, known: dict[int, int] = HEADS) -> tuple[int, str]:
    """Their number, and how it is known."""
    if asked.heads is not None:
        if asked.heads < 1 or width % asked.heads:
            raise wrong("--heads", asked.heads, f"a divisor of the width, {width}, would be right")
        return asked.heads, f"{asked.heads} heads (asked for)"
    if width in known:
        return known[width], f"{known[width]} heads (of that width's published model, no shape says it: --heads)"
    if width % HEAD_WIDTH:
        raise UserError(f"is {width} wide, and no shape says how many heads it has: --heads N does")
    return width // HEAD_WIDTH, f"{width // HEAD_WIDTH} heads ({HEAD_WIDTH} wide, which no shape says: --heads)"


def named(names: dict[int, str], width: int) -> str:
    return names.get(width, next(iter(names.values())))


def ratio(hidden: int, width: int) -> float:
    """Of a hidden layer to the width, so that int(width * ratio) is `hidden` again."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def size(tensor: Tensor, dimension: int) -> int:
    if tensor.ndim <= dimension:
        raise UserError(f"has a tensor as {tuple(tensor.shape)} where {dimension + 1} dimensions are read")
    return int(tensor.shape[dimension])


def square_root(number: int, name: str) -> int:
    if math.isqrt(max(number, 0)) ** 2 != number:
        raise UserError(f"has {name} for {number} places, which are no square")
    return math.isqrt(number)
