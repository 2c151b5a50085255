"""Checkpoints with the published names and shapes, small and random, and what the published models compute of them.

The names are facts of the files that ssl_global/converting/layouts.py lists. The forwards are plain: one matrix of
weights over all tokens, no windows cut out, nothing of timm's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
WIDTH, DEPTH, HEADS, PATCH, GRID = 128, 2, 2, 4, 4  # of the ViTs: 64 wide heads, as the published ones
PIXELS = PATCH * GRID
DEPTHS, SWIN_HEADS, WINDOW = (2, 2), (1, 2), 4  # of the Swins: 8 x 8 patches with shifts, then 4 x 4
SWIN_WIDTH, SWIN_PIXELS = 32, 32


class Random:
    """Tensors one after the other, of about the size that keeps activations near 1."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = True) -> State:
        weight = {f"{name}.weight": self(outputs, inputs, scale=inputs**-0.5)}
        return weight | ({f"{name}.bias": self(outputs)} if bias else {})

    def norm(self, name: str, width: int) -> State:
        return {f"{name}.weight": 1 + self(width), f"{name}.bias": self(width)}


# --------------------------------------------------------------------------------------------------------------- states


def patches(draw: Random, width: int, patch: int = PATCH) -> State:
    return {"patch_embed.proj.weight": draw(width, 3, patch, patch), "patch_embed.proj.bias": draw(width)}


def block(draw: Random, name: str, width: int, *, bias: bool = True) -> State:
    return (
        draw.norm(f"{name}.norm1", width)
        | draw.linear(f"{name}.attn.qkv", width, 3 * width, bias=bias)
        | draw.linear(f"{name}.attn.proj", width, width)
        | draw.norm(f"{name}.norm2", width)
        | draw.linear(f"{name}.mlp.fc1", width, 4 * width)
        | draw.linear(f"{name}.mlp.fc2", 4 * width, width)
    )


def vit(draw: Random, *, norm: str = "norm", scale: tuple[str, str] | None = None) -> State:
    """MAE's, DINO's, iBOT's. `scale`: what the two LayerScales are called."""
    state = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, GRID**2 + 1, WIDTH)} | patches(draw, WIDTH)
    for number in range(DEPTH):
        state |= block(draw, f"blocks.{number}", WIDTH)
        for name in scale or ():
            state[f"blocks.{number}.{name}"] = draw(WIDTH, scale=1)
    return state | draw.norm(norm, WIDTH)


def dinov2(draw: Random, *, registers: int = 0, gated: bool = False) -> State:
    state = vit(draw, scale=("ls1.gamma", "ls2.gamma")) | {"mask_token": draw(1, WIDTH)}
    if registers:
        state["register_tokens"] = draw(1, registers, WIDTH)
    for number in range(DEPTH * gated):
        hidden, mlp = 88, f"blocks.{number}.mlp"
        state = {name: tensor for name, tensor in state.items() if not name.startswith(mlp)}
        state |= draw.linear(f"{mlp}.w12", WIDTH, 2 * hidden) | draw.linear(f"{mlp}.w3", hidden, WIDTH)
    return state


def dinov3(draw: Random, *, gated: bool = False) -> State:
    state = {"cls_token": draw(1, 1, WIDTH), "storage_tokens": draw(1, 4, WIDTH), "mask_token": draw(1, WIDTH)}
    quarter = WIDTH // HEADS // 4
    state |= patches(draw, WIDTH) | {"rope_embed.periods": 100 ** (torch.arange(quarter) / quarter)}
    mask = torch.cat([torch.ones(WIDTH), torch.zeros(WIDTH), torch.ones(WIDTH)])
    for number in range(DEPTH):
        name = f"blocks.{number}"
        state |= block(draw, name, WIDTH) | {f"{name}.attn.qkv.bias_mask": mask}
        state |= {f"{name}.ls1.gamma": draw(WIDTH, scale=1), f"{name}.ls2.gamma": draw(WIDTH, scale=1)}
        if gated:
            state = {key: t for key, t in state.items() if not key.startswith(f"{name}.mlp")}
            for gate in ("w1", "w2"):
                state |= draw.linear(f"{name}.mlp.{gate}", WIDTH, 88)
            state |= draw.linear(f"{name}.mlp.w3", 88, WIDTH)
    return state | draw.norm("norm", WIDTH) | draw.norm("local_cls_norm", WIDTH)


def beit(draw: Random, *, shared: bool, norm: str) -> State:
    """BEiT's and SimMIM's: biases of q and v, relative positions, gammas; before fine-tuning shared by all blocks."""
    table = (2 * GRID - 1) ** 2 + 3
    index = beit_index(GRID)
    state = {"cls_token": draw(1, 1, WIDTH)} | patches(draw, WIDTH)
    if shared:
        name = "rel_pos_bias.relative_position"
        state |= {f"{name}_bias_table": draw(table, HEADS, scale=1), f"{name}_index": index}
    for number in range(DEPTH):
        name = f"blocks.{number}"
        state |= block(draw, name, WIDTH, bias=False)
        state |= {f"{name}.attn.{one}_bias": draw(WIDTH) for one in "qv"}
        state |= {f"{name}.gamma_{one}": draw(WIDTH, scale=1) for one in (1, 2)}
        if not shared:
            own = f"{name}.attn.relative_position"
            state |= {f"{own}_bias_table": draw(table, HEADS, scale=1), f"{own}_index": index}
    return state | draw.norm(norm, WIDTH)


def swin(draw: Random) -> State:
    """Microsoft's, EsViT's, SimMIM's, iBOT's: patches are merged at the end of a stage."""
    state = patches(draw, SWIN_WIDTH) | draw.norm("patch_embed.norm", SWIN_WIDTH)
    for stage, (depth, heads) in enumerate(zip(DEPTHS, SWIN_HEADS, strict=True)):
        width = SWIN_WIDTH * 2**stage
        for number in range(depth):
            name = f"layers.{stage}.blocks.{number}"
            state |= block(draw, name, width)
            state[f"{name}.attn.relative_position_bias_table"] = draw((2 * WINDOW - 1) ** 2, heads, scale=1)
            state[f"{name}.attn.relative_position_index"] = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)
        if stage + 1 < len(DEPTHS):
            merge = f"layers.{stage}.downsample"
            state |= draw.norm(f"{merge}.norm", 4 * width)
            state |= draw.linear(f"{merge}.reduction", 4 * width, 2 * width, bias=False)
    return state | draw.norm("norm", SWIN_WIDTH * 2 ** (len(DEPTHS) - 1))


def dino_head(draw: Random, name: str, width: int) -> State:
    return (
        draw.linear(f"{name}.mlp.0", width, 16)
        | draw.linear(f"{name}.mlp.2", 16, 8)
        | {f"{name}.last_layer.weight_g": torch.ones(12, 1), f"{name}.last_layer.weight_v": draw(12, 8)}
    )


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------------------- forwards


def attend(s: State, name: str, x: Tensor, heads: int, bias: Tensor | float = 0.0, rotate=None) -> Tensor:
    weight = s[f"{name}.qkv.weight"]
    width = x.shape[-1]
    if f"{name}.q_bias" in s:
        offset = torch.cat([s[f"{name}.q_bias"], torch.zeros(width), s[f"{name}.v_bias"]])
    else:
        offset = s[f"{name}.qkv.bias"] * s.get(f"{name}.qkv.bias_mask", torch.ones(3 * width))
    q, k, v = (
        t.unflatten(-1, (heads, width // heads)).transpose(1, 2) for t in (x @ weight.T + offset).chunk(3, dim=-1)
    )
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads) + bias
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return mixed @ s[f"{name}.proj.weight"].T + s[f"{name}.proj.bias"]


def feed_forward(s: State, name: str, x: Tensor) -> Tensor:
    def linear(one: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.{one}.weight"].T + s[f"{name}.{one}.bias"]

    if f"{name}.w12.weight" in s:  # DINOv2's
        gate, value = linear("w12", x).chunk(2, dim=-1)
        return linear("w3", F.silu(gate) * value)
    if f"{name}.w1.weight" in s:  # DINOv3's
        return linear("w3", F.silu(linear("w1", x)) * linear("w2", x))
    return linear("fc2", F.gelu(linear("fc1", x)))


def normalised(s: State, name: str, x: Tensor, eps: float) -> Tensor:
    spread = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / spread * s[f"{name}.weight"] + s[f"{name}.bias"]


def blocks_of(s: State, x: Tensor, eps: float, bias: dict[int, Tensor] | None = None, rotate=None) -> Tensor:
    for number in range(DEPTH):
        name = f"blocks.{number}"
        ones = torch.ones(x.shape[-1])
        first, second = (
            next((s[f"{name}.{scale}"] for scale in (f"ls{i}.gamma", f"gamma_{i}") if f"{name}.{scale}" in s), ones)
            for i in (1, 2)
        )
        offset = 0.0 if bias is None else bias[number]
        x = x + first * attend(s, f"{name}.attn", normalised(s, f"{name}.norm1", x, eps), HEADS, offset, rotate)
        x = x + second * feed_forward(s, f"{name}.mlp", normalised(s, f"{name}.norm2", x, eps))
    return x


def embedded(s: State, images: Tensor) -> Tensor:
    weight = s["patch_embed.proj.weight"]
    maps = F.conv2d(images, weight, s["patch_embed.proj.bias"], stride=weight.shape[-1])
    return maps.flatten(2).transpose(1, 2)


def vit_says(s: State, images: Tensor) -> Tensor:
    """The class token, or the mean of the patches where the norm stands behind it; (B, WIDTH)."""
    x = embedded(s, images)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], dim=1) + s["pos_embed"]
    if "register_tokens" in s:
        x = torch.cat([x[:, :1], s["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    x = blocks_of(s, x, 1e-6)
    return (
        normalised(s, "fc_norm", x[:, 1:].mean(1), 1e-6)
        if "fc_norm.weight" in s
        else normalised(s, "norm", x, 1e-6)[:, 0]
    )


def dinov3_says(s: State, images: Tensor) -> Tensor:
    x = embedded(s, images)
    side = math.isqrt(x.shape[1])
    centres = 2 * (torch.arange(side) + 0.5) / side - 1
    rows, cols = centres.repeat_interleave(side), centres.repeat(side)
    angles = 2 * math.pi * torch.cat([at[:, None] / s["rope_embed.periods"] for at in (rows, cols)], dim=1).repeat(1, 2)

    def rotate(q: Tensor) -> Tensor:
        before, placed = q[:, :, :5], q[:, :, 5:]  # the class token and the registers have no place
        first, second = placed.chunk(2, dim=-1)
        turned = placed * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
        return torch.cat([before, turned], dim=2)

    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), s["storage_tokens"].expand(len(x), -1, -1), x], dim=1)
    return normalised(s, "norm", blocks_of(s, x, 1e-5, rotate=rotate), 1e-5)[:, 0]


def beit_index(side: int) -> Tensor:
    """Which row of the table stands for each pair of tokens, the class token first."""
    distances = 2 * side - 1
    index = torch.empty(side**2 + 1, side**2 + 1, dtype=torch.int64)
    for a in range(side**2):
        for b in range(side**2):
            down, right = a // side - b // side, a % side - b % side
            index[a + 1, b + 1] = (down + side - 1) * distances + right + side - 1
    index[0, :], index[:, 0] = distances**2, distances**2 + 1
    index[0, 0] = distances**2 + 2
    return index


def beit_says(s: State, images: Tensor) -> Tensor:
    x = embedded(s, images)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], dim=1)
    shared = "rel_pos_bias.relative_position_bias_table"
    tables = [s.get(f"blocks.{n}.attn.relative_position_bias_table", s.get(shared)) for n in range(DEPTH)]
    bias = {n: table[beit_index(GRID)].permute(2, 0, 1) for n, table in enumerate(tables)}
    x = blocks_of(s, x, 1e-6, bias)
    return (
        normalised(s, "fc_norm", x[:, 1:].mean(1), 1e-6)
        if "fc_norm.weight" in s
        else normalised(s, "norm", x, 1e-6)[:, 0]
    )


def swin_says(s: State, images: Tensor, eps: float = 1e-5) -> Tensor:
    """Attention over the whole map, with nothing between patches of different windows: no windows are cut out."""
    x = normalised(s, "patch_embed.norm", embedded(s, images), eps)
    for stage, (depth, heads) in enumerate(zip(DEPTHS, SWIN_HEADS, strict=True)):
        side = math.isqrt(x.shape[1])
        for number in range(depth):
            name = f"layers.{stage}.blocks.{number}"
            shift = WINDOW // 2 if number % 2 and side > WINDOW else 0
            bias = window_bias(s[f"{name}.attn.relative_position_bias_table"], side, shift)
            x = x + attend(s, f"{name}.attn", normalised(s, f"{name}.norm1", x, eps), heads, bias)
            x = x + feed_forward(s, f"{name}.mlp", normalised(s, f"{name}.norm2", x, eps))
        if stage + 1 < len(DEPTHS):
            grid = x.unflatten(1, (side, side))
            merged = torch.cat([grid[:, down::2, right::2] for right in (0, 1) for down in (0, 1)], dim=-1).flatten(
                1, 2
            )
            merge = f"layers.{stage}.downsample"
            x = normalised(s, f"{merge}.norm", merged, eps) @ s[f"{merge}.reduction.weight"].T
    return normalised(s, "norm", x, eps).mean(1)


def window_bias(table: Tensor, side: int, shift: int) -> Tensor:
    """(heads, side^2, side^2): the relative position's bias, or minus infinity from one window to another."""
    bias = torch.full((table.shape[1], side**2, side**2), -math.inf)

    def window(place: int) -> tuple[int, bool]:
        return (place - shift) % side // WINDOW, place < shift  # what is rolled around the edge stays by itself

    for a in range(side**2):
        for b in range(side**2):
            (up, left), (down, right) = divmod(a, side), divmod(b, side)
            if window(up) == window(down) and window(left) == window(right):
                bias[:, a, b] = table[(up - down + WINDOW - 1) * (2 * WINDOW - 1) + left - right + WINDOW - 1]
    return bias
