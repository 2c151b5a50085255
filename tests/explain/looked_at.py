"""Small models whose attention is far from uniform, and what their own forward says of it: nothing here is read through
ssl_global.explain. Weights come out of timm's unfused arithmetic, or out of what is handed to torch's fused kernel;
where a window lies is counted out place by place."""

from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import ssl_global.encoders.global_swin  # noqa: F401  registers its names

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 0}


NAMED = {"img_size": (48, 64), "patch_size": 8}
SEQUENCES = {  # name: (timm's name, options, tokens before the patches, class token)
    "no token": ("vit_tiny_patch16_224", NAMED | {"class_token": False, "global_pool": "avg"}, 0, False),
    "class token": ("vit_tiny_patch16_224", NAMED, 1, True),
    "registers": ("vit_tiny_patch16_224", NAMED | {"reg_tokens": 4}, 5, True),
    "registers alone": (
        "vit_tiny_patch16_224",
        NAMED | {"reg_tokens": 4, "class_token": False, "global_pool": "avg"},
        4,
        False,
    ),
    "norms": ("vit_tiny_patch16_224", NAMED | {"qk_norm": True, "scale_attn_norm": True}, 1, True),
    "parallel": ("vit_tiny_patch16_224", NAMED | {"block_fn": ParallelScalingBlock, "qk_norm": True}, 1, True),
    "eva02": ("eva02_tiny_patch14_224", NAMED, 1, True),
    "dinov3": ("vit_small_patch16_dinov3", NAMED, 5, True),
    "three projections": ("eva02_tiny_patch14_224", NAMED | {"qkv_fused": False, "attn_type": "rope"}, 1, True),
    "shared keys": (
        "eva02_tiny_patch14_224",
        NAMED | {"qkv_fused": False, "attn_type": "rope", "num_kv_heads": 2},
        1,
        True,
    ),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", NAMED, 1, True),
    "beit": ("beit_base_patch16_224", NAMED, 1, True),
    "beit, shared bias": (
        "beit_base_patch16_224",
        NAMED | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        1,
        True,
    ),
    "relpos": ("vit_relpos_small_patch16_224", NAMED | {"qk_norm": True}, 0, False),
    "relpos, shared": ("vit_srelpos_small_patch16_224", NAMED, 0, False),
}

SWINS = {  # name: (timm's name, options, images' size, grids of the stages)
    "padded": ("swin_tiny_patch4_window7_224", {"img_size": (44, 52)}, (44, 52), ((11, 13), (6, 7))),
    "dynamic": ("swin_tiny_patch4_window7_224", {"dynamic_img_size": True}, (44, 52), ((11, 13), (6, 7))),
    "even": ("swin_tiny_patch4_window7_224", {"img_size": (32, 64)}, (32, 64), ((8, 16), (4, 8))),
    "v2": ("swinv2_tiny_window8_256", {"img_size": (44, 52)}, (44, 52), ((11, 13), (6, 7))),
}


def made(name, *, std=0.3, dtype=torch.float64, **options):
    return drawn_anew(timm.create_model(name, **options), std).to(dtype).eval()


def drawn_anew(model, std=0.3):
    """So that no bias or table is 0, and no attention nearly uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = float("norm" in name and name.endswith("weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + scale)
    return model


def fused(model):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return model


def timm_swin(name):
    architecture, options, size, grids = SWINS[name]
    return fused(made(architecture, **SWIN | options)), images_of(2, 3, *size), grids


def global_swin(start, **options):
    own = {"img_size": 32, "num_global_tokens": 3, "start": start}
    return made("global_swin_tiny_patch4_window7_224", **SWIN | own | options)


def images_of(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def unfused_weights(model, images):
    """What each attention's dropout is given, in the order of the calls: (B, heads, N, N), windows as images."""
    model, weights = deepcopy(model), []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "attn_drop"):
            module.attn_drop.register_forward_pre_hook(lambda _, inputs: weights.append(inputs[0]))
    with torch.no_grad():
        model(images)
    return weights


@contextmanager
def kernel_weights(monkeypatch):
    """The softmax of all that is handed to torch's fused kernel, in the order of the calls."""
    weights, kernel = [], nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, **rest):
        logits = q.double() @ k.double().transpose(-2, -1) / q.shape[-1] ** 0.5
        weights.append((logits if attn_mask is None else logits + attn_mask.double()).softmax(-1))
        return kernel(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", spy)
        yield weights


def place_in_window(i, j, window, padded_cols):
    """Row i and column j of the padded and rolled map -> number of the window, place in it."""
    (h, w) = window
    return i // h * (padded_cols // w) + j // w, i % h * w + j % w


def dense(weights, grid, window, shift, *, pads_first):
    """Weights of windows (B * n, heads, A, A) as the whole matrix (B, heads, N, N), N = rows * cols.

    pads_first  our Swin pads and then rolls, timm's rolls and then pads. What goes to padding is left out.
    """
    (rows, cols), (h, w) = grid, window
    padded = -(-rows // h) * h, -(-cols // w) * w
    around = padded if pads_first else grid
    where = {}  # patch: (window, place)
    for i in range(padded[0] if pads_first else rows):
        for j in range(padded[1] if pads_first else cols):
            source = (i + shift[0]) % around[0], (j + shift[1]) % around[1]
            if source[0] < rows and source[1] < cols:
                where[source[0] * cols + source[1]] = place_in_window(i, j, window, padded[1])
    num_windows = padded[0] // h * (padded[1] // w)
    split = weights.double().numpy().reshape(-1, num_windows, *weights.shape[1:])
    whole = np.zeros((split.shape[0], split.shape[2], rows * cols, rows * cols))
    for query, (n, a) in where.items():
        for key, (m, b) in where.items():
            if n == m:
                whole[:, :, query, key] = split[:, n, :, a, b]
    assert len(where) == rows * cols
    return whole


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks")
        for hook in getattr(module, kind).values()
    ]
