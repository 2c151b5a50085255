"""The one place that knows how each kind of attention makes its queries, keys and biases.

Models run fused attention, which never shows its weights. So they are made a second time, from the layer's own
projections and the very input that it was called with. A kind is known by its forward: a subclass that computes
something else is not taken for what it is not.

    timm.layers Attention (with or without qk-norm), AttentionRope     timm's ViT, DeiT, DINOv2 and DINOv3, ...
    Eva's, BEiT's, ViT-RelPos's attention, the parallel block of ViT-22B
    Swin's and Swin V2's blocks: windows, shifts and padding as the block cuts them
    our Swin with global tokens: its windows, tokens that read patches, patches that read tokens

Not among them: differential attention, whose map is a difference of two softmaxes and no distribution.

Evidence: tests/explain/test_maps.py compares each with what timm's own unfused arithmetic computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log, prod
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention as ViTAttention
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention, window_partition
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from ssl_global.attention.base import Attention as AttachedAttention
from ssl_global.attention.global_tokens import GlobalTokens
from ssl_global.attention.windows import Windows, biases
from ssl_global.encoders.global_swin import GlobalBlock, GlobalSwin
from ssl_global.errors import UserError
from ssl_global.explain.layer import PADDING, LayerMap

SUPPORTED = "timm's ViT, DeiT, DINOv2/v3, EVA, BEiT, ViT-RelPos, Swin, Swin V2, and the Swin with global tokens"
MERGINGS = (PatchMerging, PatchMergingV2)


@dataclass
class Trunk:
    """What the layers of one model share, as of its last call.

    images  at most so many of a batch are looked at; None: all
    grid    of the layer that was called last; None: not known
    stride  of a patch there, in pixels
    """

    prefix: int = 0
    class_token: bool = False
    images: int | None = None
    grid: tuple[int, int] | None = None
    stride: tuple[float, float] = (1.0, 1.0)

    def few(self, x: Tensor) -> Tensor:
        return x[: self.images]

    def layer(self, path: str, query: Tensor, key: Tensor, **places: Any) -> LayerMap:
        """Its key is copied: a view would keep the values alive beside it."""
        return LayerMap(
            path=path, query=query, key=key.contiguous(), prefix=self.prefix, class_token=self.class_token,
            stride=self.stride, **places,
        )  # fmt: skip


def trunk_of(model: nn.Module, images: int | None) -> Trunk:
    """For a model that has a patch_embed."""
    tokens = model.num_global_tokens if isinstance(model, GlobalSwin) else getattr(model, "num_prefix_tokens", 0)
    assert isinstance(tokens, int)
    return Trunk(prefix=tokens, class_token=getattr(model, "cls_token", None) is not None, images=images)


# ------------------------------------------------------------------------------------------ sequences, as ViTs have it


def sequence(
    path: str, trunk: Trunk, q: Tensor, k: Tensor, *bias: Tensor | None, allowed: Tensor | None = None
) -> LayerMap:
    """q and k (B, H, N, D), q scaled; each bias and `allowed` broadcasts to (B, H, N, N)."""
    places = torch.arange(q.shape[2], device=q.device)[None]
    known = trunk.grid is not None and trunk.prefix + prod(trunk.grid) == q.shape[2]  # else patches were left out
    return trunk.layer(
        path, q[:, None], k[:, None], queries=places, keys=places, grid=trunk.grid if known else None,
        biases=tuple(five(trunk, b) for b in bias if b is not None),
        allowed=None if allowed is None else five(trunk, allowed),
    )  # fmt: skip


def five(trunk: Trunk, x: Tensor) -> Tensor:
    """What broadcasts to (B, H, N, N), as what broadcasts to (B, G, H, N, N)."""
    x = x.view((1,) * (4 - x.ndim) + x.shape)
    return (x if x.shape[0] == 1 else trunk.few(x))[:, None]


def masked(attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """A mask as timm's ViTs take it, bool (True: may attend) or added: what is added, and what is allowed."""
    if is_causal:
        raise UserError("is_causal = True: attention maps are for images, in which nothing comes first")
    if attn_mask is None:
        return None, None
    if attn_mask.dtype == torch.bool:
        return minus_infinity(attn_mask), attn_mask
    return attn_mask, attn_mask > -100  # what masks that are added hide with, at least


def minus_infinity(allowed: Tensor) -> Tensor:
    return torch.zeros((), device=allowed.device).where(allowed, float("-inf"))


def by_heads(projected: Tensor, width: int) -> Tensor:
    """(B, N, H * width) -> (B, H, N, width)."""
    return projected.unflatten(-1, (-1, width)).transpose(1, 2)


def queries_and_keys(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of one projection for all, (..., N, C) -> two of (..., H, N, D). Some have its bias apart."""
    projected = attention.qkv(x)
    if getattr(attention, "q_bias", None) is not None:
        projected = projected + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    q, k, _ = projected.unflatten(-1, (3, attention.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
    return q, k


def vit(
    path: str, trunk: Trunk, attention: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> list[LayerMap]:
    q, k = queries_and_keys(attention, trunk.few(x))
    bias, allowed = masked(attn_mask, is_causal)
    return [sequence(path, trunk, attention.q_norm(q) * attention.scale, attention.k_norm(k), bias, allowed=allowed)]


def rotated(
    path: str,
    trunk: Trunk,
    attention: Any,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> list[LayerMap]:
    """EVA's and DINOv3's: rotary positions, for all but the tokens in front; one projection, or three."""
    x = trunk.few(x)
    if attention.qkv is not None:
        q, k = queries_and_keys(attention, x)
    else:
        q = attention.q_proj(x)
        width = q.shape[-1] // attention.num_heads  # queries may share their keys, whose heads are fewer then
        q, k = by_heads(q, width), by_heads(attention.k_proj(x), width)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        rope = trunk.few(rope) if rope.ndim == 4 and len(rope) > 1 else rope
        prefix, half = attention.num_prefix_tokens, attention.rotate_half
        q, k = (
            torch.cat([part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, half=half)], dim=2)
            for part in (q, k)
        )
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    bias, allowed = masked(attn_mask, is_causal)
    return [sequence(path, trunk, q * attention.scale, k, bias, allowed=allowed)]


def beit(
    path: str, trunk: Trunk, attention: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None
) -> list[LayerMap]:
    q, k = queries_and_keys(attention, trunk.few(x))
    own = None if attention.relative_position_bias_table is None else attention._get_rel_pos_bias()
    return [sequence(path, trunk, q * attention.scale, k, own, shared_rel_pos_bias)]


def rel_pos(path: str, trunk: Trunk, attention: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> list[LayerMap]:
    q, k = queries_and_keys(attention, trunk.few(x))
    bias = shared_rel_pos if attention.rel_pos is None else attention.rel_pos.get_bias()
    return [sequence(path, trunk, attention.q_norm(q) * attention.scale, attention.k_norm(k), bias)]


def parallel(
    path: str, trunk: Trunk, block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> list[LayerMap]:
    """Attention and MLP out of one projection: the MLP's part comes first."""
    _, q, k, _ = block.in_proj(block.in_norm(trunk.few(x))).split(block.in_split, dim=-1)
    q, k = block.q_norm(by_heads(q, block.head_dim)), block.k_norm(by_heads(k, block.head_dim))
    bias, allowed = masked(attn_mask, is_causal)
    return [sequence(path, trunk, q * block.scale, k, bias, allowed=allowed)]


# ------------------------------------------------------------------------------------------------ windows, as Swin has


def timm_windows(block: Any, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """How timm's block cuts a map of (B, rows, cols, C) into (B * G, A, C), and its mask, (G, A, A) of 0 and -100."""
    size, shift = block.window_size, block.shift_size

    def cut(y: Tensor) -> Tensor:
        y = torch.roll(y, (-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else y
        y = F.pad(y, (0, 0, 0, -y.shape[2] % size[1], 0, -y.shape[1] % size[0]))
        return window_partition(y, size).flatten(1, 2)

    if not block.dynamic_mask:
        return cut, block.attn_mask
    padded = [-(-n // s) * s for n, s in zip(x.shape[1:3], size, strict=True)]
    return cut, block.get_attn_mask(x.new_empty(1, *padded, 1))


def windows_layer(
    path: str, trunk: Trunk, x: Tensor, q: Tensor, k: Tensor, cut: Callable[[Tensor], Tensor], **pairs: Any
) -> LayerMap:
    """q and k (B * G, H, A, D) of windows that `cut` makes of the map x; padding is what it adds to the places."""
    grid = (x.shape[1], x.shape[2])
    from_one = torch.arange(1, prod(grid) + 1, device=x.device).view(1, *grid, 1)
    numbers = cut(from_one)[..., 0]  # (G, A), 0 where there is no patch
    places = torch.where(numbers > 0, numbers - 1 + trunk.prefix, PADDING)
    images = (x.shape[0], len(places))
    return trunk.layer(
        path, q.unflatten(0, images), k.unflatten(0, images), queries=places, keys=places, grid=trunk.grid, **pairs
    )


def swin(path: str, trunk: Trunk, block: Any, x: Tensor) -> list[LayerMap]:
    x, trunk.grid = trunk.few(x), (x.shape[1], x.shape[2])
    cut, mask = timm_windows(block, x)
    attention = block.attn
    if isinstance(attention, WindowAttentionV2):  # its block normalises after, not before
        q, k, bias = cosine(attention, cut(x))
    else:
        q, k = queries_and_keys(attention, cut(block.norm1(x)))
        q, bias = q * attention.scale, attention._get_rel_pos_bias()
    pairs: dict[str, Any] = {"biases": (bias[None],)}
    if mask is not None:
        mask = mask[None, :, None]  # (1, G, 1, A, A)
        pairs |= {"biases": (bias[None], mask), "allowed": mask == 0}
    return [windows_layer(f"{path}.attn", trunk, x, q, k, cut, **pairs)]


def cosine(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Swin V2's queries, keys and biases (1, H, A, A)."""
    q, k = queries_and_keys(attention, x)
    scale = attention.logit_scale.clamp(max=log(100)).exp()
    area = len(attention.relative_position_index)
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads)
    bias = table[attention.relative_position_index.flatten()].view(area, area, -1).permute(2, 0, 1)
    return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), 16 * bias.sigmoid()[None]


def global_swin(path: str, trunk: Trunk, block: Any, x: Tensor, windows: Any = None) -> list[LayerMap]:
    """Windows cut to the map, and what is left of them when patches are hidden: then the places are not known."""
    if windows is None:
        return swin(path, trunk, block, x)
    all_images, x = len(x), trunk.few(x)
    attention, cut = block.attn, windows.split
    q, k = queries_and_keys(attention, cut(block.norm1(x)))
    q, groups = q * attention.scale, len(q) // len(x)
    if windows.bias_rows.ndim == 2:  # all images are cut alike
        bias = biases(attention, windows, num_groups=groups)[None]
    else:
        bias = biases(attention, windows, num_groups=groups * all_images)[: len(q)].unflatten(0, (-1, groups))
    pairs = {"biases": (bias,), "allowed": None if windows.allowed is None else bias[:, :, :1] > float("-inf")}
    if isinstance(windows, Windows) and windows.bias_rows.ndim == 2:
        trunk.grid = (x.shape[1], x.shape[2])
        return [windows_layer(f"{path}.attn", trunk, x, q, k, cut, **pairs)]
    trunk.grid = None
    numbers = torch.arange(groups * q.shape[2], device=q.device).view(groups, -1) + trunk.prefix
    q, k = q.unflatten(0, (-1, groups)), k.unflatten(0, (-1, groups))
    return [trunk.layer(f"{path}.attn", q, k, queries=numbers, keys=numbers, grid=None, **pairs)]


def global_tokens(path: str, trunk: Trunk, mixer: Any, patches: Tensor, tokens: Tensor) -> list[LayerMap]:
    """Tokens read patches; then, unless they only read, patches read what the tokens are by then."""
    patches, tokens = trunk.few(patches), trunk.few(tokens)
    keys, values, *write_query = mixer.of_patches(mixer.norm_patches(patches)).split(mixer.bottleneck, dim=-1)
    queries = mixer.read_query(mixer.norm_tokens(tokens))
    known = trunk.grid is not None and prod(trunk.grid) == patches.shape[1]
    trunk.prefix = tokens.shape[1]  # not known before, if a stage is looked at by itself
    in_front = torch.arange(trunk.prefix, device=patches.device)[None]
    behind = torch.arange(patches.shape[1], device=patches.device)[None] + trunk.prefix
    grid = trunk.grid if known else None

    def one(name: str, q: Tensor, k: Tensor, **places: Tensor) -> LayerMap:
        q, k = (part.unflatten(-1, (mixer.heads, -1)).transpose(1, 2)[:, None] for part in (q, k))
        return trunk.layer(f"{path}.{name}", q * q.shape[-1] ** -0.5, k, grid=grid, **places)

    read = one("read", queries, keys, queries=in_front, keys=behind)
    if not mixer.writes:
        return [read]
    tokens = tokens + mixer.read_out(mixer.attend(queries, keys, values))
    of_tokens, _ = mixer.of_tokens(mixer.norm_read(tokens)).chunk(2, dim=-1)
    return [read, one("write", write_query[0], of_tokens, queries=behind, keys=in_front)]


# ------------------------------------------------------------------------------------------------------- which is which

Kind = Callable[..., list[LayerMap]]
KINDS: dict[Any, Kind] = {
    ViTAttention.forward: vit,
    AttentionRope.forward: rotated,
    EvaAttention.forward: rotated,
    BeitAttention.forward: beit,
    RelPosAttention.forward: rel_pos,
    ParallelScalingBlock.forward: parallel,
    SwinTransformerBlock.forward: swin,
    SwinTransformerV2Block.forward: swin,
    GlobalBlock.forward: global_swin,
    GlobalTokens.forward: global_tokens,
}
WINDOW_ATTENTIONS = (WindowAttention.forward, WindowAttentionV2.forward)


def kind_of(module: nn.Module) -> Kind | None:
    """None: not an attention that is known here."""
    kind = KINDS.get(forward_of(module))
    if kind in (swin, global_swin) and forward_of(module.get_submodule("attn")) not in WINDOW_ATTENTIONS:
        return None
    return kind


def forward_of(module: Any) -> object:
    return type(module).forward


def passed_over(module: nn.Module) -> bool:
    """Attentions that are none of the backbone's own: attached modules, and heads that pool."""
    return isinstance(module, AttachedAttention) or type(module).__name__.startswith("AttentionPool")


def looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return hasattr(module, "fused_attn") or "attention" in name or "attn" in name


def found_in(model: nn.Module) -> dict[str, tuple[nn.Module, Kind]]:
    """Path: the attention there and its kind. Raises UserError if there is none, or one that is not known."""
    found: dict[str, tuple[nn.Module, Kind]] = {}

    def search(path: str, module: nn.Module) -> None:
        kind = kind_of(module)
        if kind is not None:
            found[path] = module, kind
        elif looks_like_attention(module) and not passed_over(module):
            name = f"{type(module).__module__}.{type(module).__name__}"
            raise UserError(f"{path or 'the model'} is {name}, which cannot be read; what can: {SUPPORTED}")
        elif not passed_over(module):
            for name, child in module.named_children():
                search(f"{path}.{name}" if path else name, child)

    search("", model)
    if not found:
        raise UserError(f"{type(model).__name__} has no attention to look at; models that have: {SUPPORTED}")
    return found
