"""A Swin with global tokens: its windows see the whole image, and it can be pretrained by MAE and by DINO.

The body is timm's Swin (Liu et al. 2021, https://arxiv.org/abs/2103.14030; S3: Chen et al. 2021,
https://arxiv.org/abs/2111.14725), with all its parameters under their names. After the last block of each stage (or of
chosen stages, or after each pair of blocks) G learned tokens read all patches and all patches read the tokens
(ssl_global/attention/global_tokens.py). The tokens go on to the next stage, made as wide as it is; what they are in the
end is the image's summary.

    import ssl_global, timm
    timm.create_model("global_swin_tiny_patch4_window7_224", num_global_tokens=8, start="identity")

start="identity"   timm's own arithmetic, its padding and unfused attention included, and a write whose gate is 0: with
                   weights of timm's Swin the model computes bitwise what that did, until it is trained
start="scratch"    for pretraining: gates at 1, padding behind a mask, fused attention, windows cut to each map's size

Hidden patches are left out, not masked (attention/windows.py says how). Evidence: tests/encoders/test_global_swin.py,
and the tables in README.md.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    checkpoint_filter_fn,
)
from timm.models.swin_transformer import default_cfgs as swin_cfgs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_global.attention.base import heads_for
from ssl_global.attention.global_tokens import GlobalTokens
from ssl_global.attention.windows import Compact, Groups, Layout, Units, Whole, Windows, attend
from ssl_global.encoders.encoder import Encoder, Tokens, replace_tokens
from ssl_global.encoders.hiding import push_together, take_units
from ssl_global.errors import wrong
from ssl_global.recipe import PretrainableConfig, Recipe, in_range

__all__ = ["GlobalSwin", "GlobalSwinConfig", "GlobalSwinEncoder"]

FIRST_PATCH = 4  # of all named models
NO_SUMMARY = "global_pool = token: the last stage has no global tokens"


class GlobalSwin(SwinTransformer):
    """timm's Swin with global tokens, and the same contract.

    num_global_tokens   G, at least 1
    global_after        "stage": they read and write at the end of a stage; "pair": after each two blocks
    global_stages       the stages that have them, from 0; None: all
    global_bottleneck   the channels divided by this are the width of their attentions
    global_last_write   False: after the last block they only read; for models of which only the summary is learnt from
    start               "identity" or "scratch", see above
    global_pool         timm's ("avg", "max", ...), or "token": the mean of the global tokens, which then stand in front
                        of the patches in forward_features, (B, G + N, C), as prefix tokens do in timm's ViT
    the others          timm's

    Any H and W from 1 pixel; what the patches do not divide is padded with zeros below and to the right. Under
    start="identity" windows and masks are timm's: built for `img_size`.
    """

    def __init__(
        self,
        *,
        num_global_tokens: int = 8,
        global_after: Literal["stage", "pair"] = "stage",
        global_stages: Sequence[int] | None = None,
        global_bottleneck: int = 4,
        global_last_write: bool = True,
        start: Literal["identity", "scratch"] = "scratch",
        global_pool: str = "avg",
        strict_img_size: bool = False,
        **swin: Any,
    ) -> None:
        super().__init__(
            global_pool="avg" if global_pool == "token" else global_pool, strict_img_size=strict_img_size, **swin
        )
        if start not in ("identity", "scratch"):
            raise ValueError(f"start = {start!r}: identity or scratch")
        if global_after not in ("stage", "pair"):
            raise ValueError(f"global_after = {global_after!r}: stage or pair")
        if num_global_tokens < 1:
            raise ValueError(f"num_global_tokens = {num_global_tokens}: at least 1; without any it is timm's Swin")
        last_stage = len(self.layers) - 1
        stages = sorted(range(last_stage + 1) if global_stages is None else set(global_stages))
        if not stages or not set(stages) <= set(range(last_stage + 1)):
            raise ValueError(f"global_stages = {global_stages}: some of 0 to {last_stage}")
        if global_pool == "token" and stages[-1] != last_stage:
            raise ValueError(NO_SUMMARY)
        widths = [info["num_chs"] for info in self.feature_info]
        if not 1 <= global_bottleneck <= min(widths):
            raise ValueError(
                f"global_bottleneck = {global_bottleneck}: 1 to {min(widths)}, the narrowest stage's width"
            )
        self.start, self.num_global_tokens, self.global_pool = start, num_global_tokens, global_pool
        self.has_summary = stages[-1] == last_stage
        weight = self.get_parameter("norm.weight")  # of the device and precision that were asked for
        self.global_tokens = nn.Parameter(weight.new_empty(1, num_global_tokens, widths[stages[0]]))
        nn.init.trunc_normal_(self.global_tokens, std=0.02)
        carried = widths[stages[0]]  # the tokens' width before a stage
        for index, layer in enumerate(self.layers):
            stage = take_over(layer, cuts_windows=start == "scratch")
            if index not in stages:
                continue
            if carried != widths[index]:
                stage.carry = linear(carried, widths[index])
            carried = widths[index]
            last = len(stage.blocks) - 1
            for block in range(last + 1):
                if block == last or (global_after == "pair" and block % 2):
                    stage.mixers[str(block)] = GlobalTokens(
                        carried,
                        bottleneck=carried // global_bottleneck,
                        heads=heads_for(carried // global_bottleneck),
                        gate=float(start == "scratch"),
                        writes=global_last_write or (index, block) != (last_stage, last),
                    )
        self.to(device=weight.device, dtype=weight.dtype)

    @torch.jit.ignore
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if "global_tokens" in self._parameters:  # timm's constructor calls this before they are there
            nn.init.trunc_normal_(self.global_tokens, std=0.02)

    @property
    def num_prefix_tokens(self) -> int:
        return self.num_global_tokens if self.global_pool == "token" else 0

    # ----------------------------------------------------------------------------------------------------- forward

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, rows, cols, channels of the first stage)."""
        rows, cols = to_2tuple(self.patch_embed.patch_size)
        below, right = -images.shape[2] % rows, -images.shape[3] % cols
        if below or right:
            images = F.pad(images, (0, right, 0, below))
        return self.patch_embed(images)

    def stages(self, x: Tensor, layout: Layout, *, num_stages: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """After each stage, the patches and the tokens (B, G, C)."""
        tokens = self.global_tokens.repeat(x.shape[0], 1, 1)
        for stage in list(self.layers)[:num_stages]:
            x, tokens, layout = stage(x, tokens, layout)
            yield x, tokens

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The last stage's patches (B, rows, cols, C) and the global tokens (B, G, C), both normalised."""
        *_, (x, tokens) = self.stages(self.embed(images), Whole())
        return self.norm(x), self.norm_tokens(tokens)

    def norm_tokens(self, tokens: Tensor) -> Tensor:
        """By the patches' own norm, as ViT's class token is."""
        return self.norm(tokens) if tokens.shape[-1] == self.num_features else tokens

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(*self.forward_tokens(x))

    def features(self, x: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([tokens, x.flatten(1, 2)], dim=1) if self.global_pool == "token" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool != "token":
            return super().forward_head(x, pre_logits=pre_logits)
        x = self.head.drop(x[:, : self.num_global_tokens].mean(1))
        return x if pre_logits else self.head.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's, with one choice more: output_fmt "NHWC"."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt = {output_fmt!r}: NCHW or NHWC")
        take, last = feature_take_indices(len(self.layers), indices)
        maps = []
        outputs = self.stages(self.embed(x), Whole(), num_stages=last + 1 if stop_early else None)
        for index, (x, tokens) in enumerate(outputs):  # noqa: B007
            if index in take:
                taken = self.norm(x) if norm and index == len(self.layers) - 1 else x
                maps.append(taken.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else taken)
        if intermediates_only:
            return maps
        if index < len(self.layers) - 1:
            return x, maps
        return self.features(self.norm(x), self.norm_tokens(tokens)), maps

    # ---------------------------------------------------------------------------------------------- timm's contract

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        pool = self.global_pool if global_pool is None else global_pool
        if pool == "token" and not self.has_summary:
            raise ValueError(NO_SUMMARY)
        super().reset_classifier(num_classes, "avg" if pool == "token" else pool)
        self.global_pool = pool

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        own = {name for name, _ in self.named_parameters() if name.endswith(".gate")}
        return super().no_weight_decay() | own | {"global_tokens"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's; a mixer is in the group of the block that it follows, by its name."""
        timms = super().group_matcher(coarse)
        blocks = timms["blocks"] if coarse else [(r"^layers\.(\d+).carry", (0,)), *timms["blocks"]]
        return {"stem": r"^patch_embed|^global_tokens", "blocks": blocks}


def take_over(stage: nn.Module, *, cuts_windows: bool) -> "GlobalStage":
    """timm's stage and blocks stay the objects that they are, with their parameters and methods; only what they compute
    is ours from here on. timm's constructor offers no other place for it."""
    stage.__class__ = GlobalStage
    assert isinstance(stage, GlobalStage)
    stage.mixers, stage.carry, stage.cuts_windows = nn.ModuleDict(), nn.Identity(), cuts_windows
    for block in stage.blocks:
        block.__class__ = GlobalBlock
        if cuts_windows:
            block.attn.fused_attn = True  # type: ignore[union-attr]
    return stage


class GlobalStage(SwinTransformerStage):
    """timm's stage; `mixers` are called after the blocks that they are named for, `carry` makes the tokens as wide."""

    mixers: nn.ModuleDict
    carry: nn.Module
    cuts_windows: bool  # for each map, as attention/windows.py says; else whole maps are timm's affair

    def forward(self, x: Tensor, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Layout]:  # type: ignore[override]
        x, layout = layout.merge(self.downsample, x)
        tokens = self.carry(tokens)
        blocks = cast(list[GlobalBlock], list(self.blocks))
        cuts: list[Windows | Groups | None] = [None, None]
        if self.cuts_windows or not isinstance(layout, Whole):
            cuts = [
                layout.windows(x, blocks[0].window_size, shifted=shifted) for shifted in (False, True)[: len(blocks)]
            ]
        for index, block in enumerate(blocks):
            x = self.run(block, x, cuts[index % 2])
            if str(index) in self.mixers:
                flat, tokens = self.run(self.mixers[str(index)], x.flatten(1, -2), tokens)
                x = flat.view(x.shape)
        return x, tokens, layout

    def run(self, module: nn.Module, *inputs: Any) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


class GlobalBlock(SwinTransformerBlock):
    """timm's block; with `windows` its attention is among those."""

    def forward(self, x: Tensor, windows: Windows | Groups | None = None) -> Tensor:
        if windows is None:
            return super().forward(x)
        normal = self.norm1(x)
        x = x + self.drop_path1(windows.join(attend(self.attn, windows.split(normal), windows), like=normal))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def linear(width_in: int, width_out: int) -> nn.Linear:
    """Initialised as timm's Swin does."""
    layer = nn.Linear(width_in, width_out)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------------------------------- timm's names

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
    "s3_base": {"embed_dim": 96, "depths": (2, 2, 30, 2), "num_heads": (3, 6, 12, 24)},
}
NAMES: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": SIZES["tiny"] | {"window_size": 7},
    "swin_small_patch4_window7_224": SIZES["small"] | {"window_size": 7},
    "swin_base_patch4_window7_224": SIZES["base"] | {"window_size": 7},
    "swin_base_patch4_window12_384": SIZES["base"] | {"window_size": 12, "img_size": 384},
    "swin_large_patch4_window7_224": SIZES["large"] | {"window_size": 7},
    "swin_large_patch4_window12_384": SIZES["large"] | {"window_size": 12, "img_size": 384},
    "swin_s3_tiny_224": SIZES["tiny"] | {"window_size": (7, 7, 14, 7)},
    "swin_s3_small_224": SIZES["small"] | {"window_size": (14, 14, 14, 7)},
    "swin_s3_base_224": SIZES["s3_base"] | {"window_size": (7, 7, 14, 7)},
}
PREFIX = "global_"
# timm's published weights and image sizes, under our names.
default_cfgs = generate_default_cfgs(
    {
        f"{PREFIX}{name}.{tag}": replace(cfg, hf_hub_id=f"timm/{name}.{tag}", fixed_input_size=False)
        for name in NAMES
        for tag, cfg in swin_cfgs[name].cfgs.items()
    }
)


def with_new_parameters(state_dict: dict[str, Any], model: GlobalSwin) -> dict[str, Tensor]:
    """timm's weights for timm's part. A plain Swin's lack the tokens: those stay as they are initialised."""
    tensors = checkpoint_filter_fn(state_dict, model)
    if "global_tokens" in tensors:
        return tensors
    own = model.state_dict()
    return {name: own[name] for name in own if is_new(name)} | tensors


def is_new(name: str) -> bool:
    """Whether a parameter is none of timm's Swin."""
    return name == "global_tokens" or ".mixers." in name or ".carry." in name


def register(name: str) -> None:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        args = {"patch_size": FIRST_PATCH} | NAMES[name] | options
        model: nn.Module = build_model_with_cfg(
            GlobalSwin,
            PREFIX + name,
            pretrained,
            pretrained_filter_fn=with_new_parameters,
            feature_cfg={
                "feature_cls": "getter",  # the tokens pass from stage to stage: no chain of modules
                "output_fmt": "NHWC",  # as timm's Swin
                "out_indices": args.pop("out_indices", tuple(range(len(args["depths"])))),
            },
            **args,
        )
        return model

    create.__name__ = PREFIX + name
    globals()[create.__name__] = register_model(create)  # timm lists it in __all__


for name in NAMES:
    register(name)


# --------------------------------------------------------------------------------------------- as an encoder of ours


@dataclass(frozen=True, kw_only=True)
class GlobalSwinConfig(PretrainableConfig):
    """A timm Swin with global tokens, by name; what is None is as the name says."""

    name: str = "global_swin_tiny_patch4_window7_224"  # any global_swin_*
    patch: int | None = None  # side of a patch of the first stage, in pixels
    width: int | None = None  # of the first stage; each further one is twice as wide
    depths: tuple[int, ...] | None = None  # blocks of each stage
    heads: tuple[int, ...] | None = None  # of attention, in each stage
    window: int | None = None  # side of a window, in tokens
    tokens: int = 8  # global ones
    mix_after: Literal["stage", "pair"] = "stage"  # they read and write after each stage, or after each two blocks
    mix_stages: tuple[int, ...] | None = None  # stages in which they do, from 0; None: all
    pool: Literal["token", "avg"] = "token"  # the image's summary: the mean of the global tokens, or of the patches

    def check(self, recipe: Recipe) -> None:
        self.check_beginning()
        if self.name.removeprefix(PREFIX) not in NAMES or not self.name.startswith(PREFIX):
            nearest = difflib.get_close_matches(self.name, [PREFIX + n for n in NAMES], n=3, cutoff=0.3)
            raise wrong("encoder.name", self.name, f"not a global_swin_*; the nearest are {', '.join(nearest)}")
        for field in ("patch", "width", "window", "tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise wrong(f"encoder.{field}", value, "at least 1")
        in_range("encoder.drop_path", self.drop_path, 0, 0.999)
        depths, heads, width = self.sizes()
        if not depths or min(depths) < 1:
            raise wrong("encoder.depths", depths, "at least 1 block in each stage")
        if len(heads) != len(depths):
            raise wrong("encoder.heads", heads, f"one number for each stage of encoder.depths = {depths}")
        for stage, count in enumerate(heads):
            if count < 1 or width * 2**stage % count:
                raise wrong(
                    "encoder.heads", heads, f"{count} does not divide stage {stage}'s width, {width * 2**stage}"
                )
        windows = NAMES[self.name.removeprefix(PREFIX)]["window_size"]
        if self.window is None and isinstance(windows, tuple) and len(windows) != len(depths):
            raise wrong("encoder.window", None, f"a number: this name's, {windows}, are not for {len(depths)} stages")
        if width < 4:
            raise wrong("encoder.width", width, "at least 4: the global tokens' attention is a quarter as wide")
        if self.mix_stages is not None:
            if not self.mix_stages or not set(self.mix_stages) <= set(range(len(depths))):
                raise wrong("encoder.mix_stages", self.mix_stages, f"some of 0 to {len(depths) - 1}")
            if self.pool == "token" and max(self.mix_stages) != len(depths) - 1:
                raise wrong("encoder.mix_stages", self.mix_stages, f"with pool = token {len(depths) - 1} must be there")

    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Depths, heads and the first stage's width."""
        named = NAMES[self.name.removeprefix(PREFIX)]
        return self.depths or named["depths"], self.heads or named["num_heads"], self.width or named["embed_dim"]

    def hides(self, masking: str) -> int | None:
        """Cells of the last stage; under uniform masking patches of half their side."""
        stride = (self.patch or FIRST_PATCH) * 2 ** (len(self.sizes()[0]) - 1)
        if masking != "uniform":
            return stride
        return stride // 2 if len(self.sizes()[0]) > 1 else None

    def summary_stands_apart(self) -> bool:
        return self.pool == "token"

    def build(self, recipe: Recipe) -> "GlobalSwinEncoder":
        return GlobalSwinEncoder(self, pixels=recipe.views.globals.pixels, channels=recipe.data.channels)


class GlobalSwinEncoder(Encoder):
    """See `Encoder`. Any H and W; windows are as large as at `pixels`, or as the map where that is smaller."""

    def __init__(self, config: GlobalSwinConfig, *, pixels: int, channels: int) -> None:
        super().__init__()
        changed = {
            "patch_size": config.patch,
            "embed_dim": config.width,
            "depths": config.depths,
            "num_heads": config.heads,
            "window_size": config.window,
            "global_stages": config.mix_stages,
        }
        as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
        self.architecture = config.name
        self.model_args: dict[str, Any] = {name: value for name, value in as_json.items() if value is not None} | {
            "img_size": -(-pixels // (config.patch or FIRST_PATCH)) * (config.patch or FIRST_PATCH),  # as it is padded
            "in_chans": channels,
            "global_pool": config.pool,
            "num_global_tokens": config.tokens,
            "global_after": config.mix_after,
            # A write after the last block changes patches that nobody looks at when the tokens are the summary.
            "global_last_write": config.pool != "token",
            "start": "scratch",
        }
        model = timm.create_model(config.name, num_classes=0, drop_path_rate=config.drop_path, **self.model_args)
        assert isinstance(model, GlobalSwin)
        self.model: GlobalSwin = model
        self.pixels, self.channels = pixels, channels
        self.width, self.first_width = model.num_features, model.embed_dim
        self.patch = model.feature_info[-1]["reduction"]
        self.first_patch = config.patch or FIRST_PATCH
        self.num_globals = config.tokens if model.has_summary else 0

    def encode(
        self,
        images: Tensor,
        hidden: Tensor | None = None,
        *,
        num_hidden: int | None = None,
        replaced: Tensor | None = None,
        token: Tensor | None = None,
    ) -> Tokens:
        """As `Encoder.encode`. Hidden patches of half a last stage's cell must leave one of each 2 x 2 visible."""
        layout: Layout
        if hidden is None:
            grid, places = grid_of(images, self.patch), None
            x, layout = self.model.embed(images), Whole()
            tokens_along = self.side_of(images, replaced) // self.first_patch if replaced is not None else 1
        else:
            grid = (hidden.shape[1], hidden.shape[2])
            side = self.side_of(images, hidden)
            tokens_along = side // self.first_patch
            if side < self.patch:
                compact, seen = push_together(images, hidden, side, num_hidden)  # seen: (B, R, S)
                x = self.model.embed(compact)
                whole = (grid[0] * tokens_along, grid[1] * tokens_along)
                layout = Compact(joined(true_places(seen, grid, tokens_along)), tokens_along, whole)
                places = by_fours(seen, beyond=grid[0] * grid[1])
            else:
                units, seen = take_units(images, hidden, side, num_hidden)  # seen: (B, U)
                x = self.model.embed(units.flatten(0, 1)).unflatten(0, units.shape[:2])
                layout = Units(true_places(seen, grid, tokens_along), (grid[0] * tokens_along, grid[1] * tokens_along))
                places = seen[:, :, None]
            replaced = None if replaced is None else replaced.flatten(1).gather(1, seen.flatten(1)).view(seen.shape)
        if replaced is not None:
            assert token is not None
            x = replace_tokens(x, replaced, token, along=tokens_along)
        *_, (x, tokens) = self.model.stages(x, layout)
        x, tokens = self.model.norm(x), self.model.norm_tokens(tokens)
        maps = x.flatten(1, -3)  # units below each other
        summary = tokens.mean(1) if self.model.global_pool == "token" else self.model.head.global_pool(maps)
        return Tokens(summary, maps.flatten(1, 2), grid, places, globals=tokens if self.num_globals else None)

    def side_of(self, images: Tensor, hidden: Tensor) -> int:
        """Of a hidden patch, in pixels: as large as a cell of the last stage, or half as large."""
        sides = [side for side in (self.patch, self.patch // 2) if side >= self.first_patch]
        for side in sides:
            if grid_of(images, side) == hidden.shape[1:]:
                return side
        fit = " or ".join(f"{grid_of(images, side)}, {side} pixels each" for side in sides)
        raise ValueError(f"hidden patches are {tuple(hidden.shape[1:])}, of these images they must be {fit}")

    def may_be_new(self, name: str) -> bool:
        return is_new(name)

    def has_new(self, names: list[str]) -> None:
        """Beside a plain Swin's weights new tokens only read at first: the patches stay what they were."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in names and name.endswith(".gate"):
                    parameter.zero_()

    def recompute_activations(self) -> None:
        self.model.set_grad_checkpointing()


def grid_of(images: Tensor, side: int) -> tuple[int, int]:
    return -(-images.shape[2] // side), -(-images.shape[3] // side)


def true_places(seen: Tensor, grid: tuple[int, int], tokens_along: int) -> Tensor:
    """Rows and columns of the tokens of patches that are `seen`, (...) -> (..., tokens_along, tokens_along, 2)."""
    inside = torch.arange(tokens_along, device=seen.device)
    corner = torch.stack([seen // grid[1], seen % grid[1]], dim=-1) * tokens_along
    return corner[..., None, None, :] + torch.stack(torch.meshgrid(inside, inside, indexing="ij"), dim=-1)


def joined(places: Tensor) -> Tensor:
    """(B, R, S, h, w, 2) -> (B, R * h, S * w, 2)."""
    return places.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def by_fours(seen: Tensor, *, beyond: int) -> Tensor:
    """The four patches that a token of the last stage stands for: (B, R, S) -> (B, R / 2 * S / 2, 4), rounded up."""
    even = F.pad(seen, (0, seen.shape[2] % 2, 0, seen.shape[1] % 2), value=beyond)
    return rearrange(even, "b (r u) (s v) -> b (r s) (u v)", u=2, v=2)
