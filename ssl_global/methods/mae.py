"""MAE: rebuild the hidden three quarters of an image from the visible quarter.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", https://arxiv.org/abs/2111.06377.

Letters, in this file only:

    B  images on this process     N  patches of an image      P  numbers in a patch: pixels * pixels * channels
    M  patches that are hidden    W  the decoder's width

The encoder sees the visible patches only. The decoder gets them back in their places, with a learned token in each
hidden place, and foretells the pixels of the hidden patches, each normalised by its own mean and deviation. Of visible
patches nothing is foretold: their pixels count for nothing, and leaving them out changes no result.

Three maskings, for a ViT and for a pyramid (what a pyramid's windows then are: attention/windows.py):

    random    any patches are dropped; on a pyramid cells of its last stage, as Hiera does (Ryali et al. 2023,
              https://arxiv.org/abs/2306.00989)
    uniform   all but one patch of every 2 x 2 are dropped, and a learned token replaces a share of what is left
              (Li et al. 2022, "Uniform Masking", https://arxiv.org/abs/2205.10063); the loss counts these too (ours),
              and the token stands where the embedding's norm has been (theirs goes through it)
    dense     nothing is dropped, a learned token replaces patches, one linear layer foretells the pixels as they are
              (Xie et al. 2021, "SimMIM", https://arxiv.org/abs/2111.09886): for comparison, and for any encoder

Not as in the papers' code: what is hidden is drawn from the sample's own seed, not from the process's generator; any
H x W that the patch divides and any number of channels work.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder, Tokens, visible_index
from ssl_global.encoders.positions import sincos_positions
from ssl_global.errors import wrong
from ssl_global.methods.masking import num_hidden, random_hidden, some_of, uniform_hidden
from ssl_global.methods.method import Batch, Method
from ssl_global.recipe import MethodConfig, Recipe
from ssl_global.schedules import Progress

NORM: Any = partial(nn.LayerNorm, eps=1e-6)  # the authors'


@dataclass(frozen=True, kw_only=True)
class MaeConfig(MethodConfig):
    masking: Literal["random", "uniform", "dense"] = "random"  # uniform: all but one of 2 x 2; dense: nothing dropped
    mask_ratio: float = 0.75  # share of the patches that the encoder does not see
    secondary_ratio: float = 0.0  # share of the visible patches that a learned token replaces, under uniform masking
    decoder_width: int = 512  # of a token; dense masking has a single linear layer instead of a decoder
    decoder_depth: int = 8  # blocks
    decoder_heads: int = 16  # of attention, in each block

    def check(self, recipe: Recipe) -> None:
        if not 0 < self.mask_ratio < 1:
            raise wrong(
                "method.mask_ratio", self.mask_ratio, "a share of the patches, above 0 and below 1; the paper's is 0.75"
            )
        if self.masking == "uniform" and self.mask_ratio != 0.75:
            raise wrong("method.mask_ratio", self.mask_ratio, "0.75: uniform masking leaves one of four")
        if self.secondary_ratio and self.masking != "uniform":
            raise wrong("method.secondary_ratio", self.secondary_ratio, "0, or method.masking = uniform")
        if not 0 <= self.secondary_ratio < 1:
            raise wrong("method.secondary_ratio", self.secondary_ratio, "a share of what is visible, below 1")
        if self.decoder_depth < 1:
            raise wrong("method.decoder_depth", self.decoder_depth, "at least 1 block")
        if self.decoder_width < 4 or self.decoder_width % 4:
            raise wrong("method.decoder_width", self.decoder_width, "sine-cosine positions need a multiple of 4")
        if self.decoder_heads < 1 or self.decoder_width % self.decoder_heads:
            raise wrong(
                "method.decoder_heads", self.decoder_heads, f"must divide method.decoder_width = {self.decoder_width}"
            )
        if recipe.views.globals.count != 1 or recipe.views.locals.count:
            counts = f"{recipe.views.globals.count} global and {recipe.views.locals.count} local"
            raise wrong("views", counts, "MAE looks at 1 global view of each image and no local one")
        self.check_encoder(recipe)

    def check_encoder(self, recipe: Recipe) -> None:
        side, pixels = recipe.encoder.hides(self.masking), recipe.views.globals.pixels
        if side is None:
            raise wrong("method.masking", self.masking, "this encoder cannot; random and dense it can")
        if pixels % side:
            right = " or ".join(str(n) for n in (pixels // side * side, pixels // side * side + side) if n)
            raise wrong(
                "views.globals.pixels", pixels, f"not a multiple of the hidden patches' {side}; {right} would be"
            )
        num_patches = (pixels // side) ** 2
        if num_patches == 1:
            raise wrong("views.globals.pixels", pixels, f"a single patch of {side} pixels: at least {2 * side}")
        if self.masking != "uniform" and (hidden := num_hidden(num_patches, self.mask_ratio)) in (0, num_patches):
            which = "all" if hidden else "none"
            raise wrong("method.mask_ratio", self.mask_ratio, f"{which} of {num_patches} patches would be hidden")
        if self.masking == "dense" and recipe.encoder.summary_stands_apart():
            raise wrong(
                "encoder.pool", "token", "use avg: dense masking rebuilds from patches, which see no tokens last"
            )

    def build(self, recipe: Recipe) -> "Mae":
        side = recipe.encoder.hides(self.masking)
        assert side is not None
        return Mae(self, recipe.encoder.build(recipe), patch=side)


@dataclass(frozen=True)
class Mask:
    """What the encoder does not see of a batch."""

    hidden: Tensor | None  # bool (B, rows, cols): dropped
    num_hidden: int
    replaced: Tensor | None  # bool (B, rows, cols): a learned token stands there
    unseen: Tensor  # bool (B, rows, cols): either
    num_unseen: int  # of them in each image


class Mae(Method):
    def __init__(self, config: MaeConfig, encoder: Encoder, *, patch: int) -> None:
        super().__init__()
        self.config = config
        self.patch = patch  # side of what is hidden as one, in pixels
        self.encoder = encoder
        self.token: nn.Parameter | None = None
        if config.masking == "dense" or config.secondary_ratio:
            self.token = nn.Parameter(torch.empty(encoder.first_width))
            nn.init.normal_(self.token, std=0.02)
        if config.masking == "dense":
            self.decoder: nn.Module = LinearDecoder(encoder, patch)
        else:
            self.decoder = Decoder(config, encoder, patch)
        self.encoder.apply(init_weights)
        self.decoder.apply(init_weights)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["views"][0]
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        mask = draw(self.config, batch["seed"], grid)
        tokens = self.encoder(images, mask.hidden, num_hidden=mask.num_hidden, replaced=mask.replaced, token=self.token)
        patches_BNP = patchify(images, self.patch)
        unseen_BM = visible_index(~mask.unseen, patches_BNP.shape[1] - mask.num_unseen)
        true_BMP = patches_BNP.gather(1, unseen_BM[:, :, None].expand(-1, -1, patches_BNP.shape[2]))
        loss = l1_loss if self.config.masking == "dense" else mae_loss
        return {"loss": loss(self.decoder(tokens, of=unseen_BM), true_BMP)}

    def backbones(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}


def draw(config: MaeConfig, seeds_B: Tensor, grid: tuple[int, int]) -> Mask:
    num_patches = grid[0] * grid[1]
    if config.masking == "uniform":
        hidden = uniform_hidden(seeds_B, grid)
        num_visible = -(-grid[0] // 2) * -(-grid[1] // 2)
        num_dropped, num_replaced = num_patches - num_visible, int(num_visible * config.secondary_ratio)
        if not config.secondary_ratio:
            return Mask(hidden, num_dropped, None, hidden, num_dropped)
        replaced = some_of(~hidden.flatten(1), seeds_B, num_replaced).view(hidden.shape)
        return Mask(hidden, num_dropped, replaced, hidden | replaced, num_dropped + num_replaced)
    unseen, num_unseen = random_hidden(seeds_B, grid, config.mask_ratio), num_hidden(num_patches, config.mask_ratio)
    if config.masking == "dense":
        return Mask(None, 0, unseen, unseen, num_unseen)
    return Mask(unseen, num_unseen, None, unseen, num_unseen)


class Decoder(nn.Module):
    """Visible tokens to the pixels of the patches at the places `of`, int64 (B, M), or of all: (B, M, P).

    A token of a pyramid's last stage stands for K patches, a ViT's for one: it is made into K tokens of the decoder,
    which then go where those patches lie. An encoder's tokens without a place (class token, registers, global tokens)
    take part in the attention, embedded as patches are where K is 1, as in the paper.
    """

    def __init__(self, config: MaeConfig, encoder: Encoder, patch: int) -> None:
        super().__init__()
        width = config.decoder_width
        self.patches_each = (encoder.patch // patch) ** 2  # K
        self.embed = nn.Linear(encoder.width, self.patches_each * width)
        self.embed_globals: nn.Linear | None = None
        if encoder.num_globals and self.patches_each > 1:
            self.embed_globals = nn.Linear(encoder.width, width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *[Block(width, config.decoder_heads, qkv_bias=True, norm_layer=NORM) for _ in range(config.decoder_depth)]
        )
        self.norm = NORM(width)
        self.predict = nn.Linear(width, patch**2 * encoder.channels)
        nn.init.normal_(self.hidden_token, std=0.02)
        self.made: dict[Any, Tensor] = {}  # positions of the grids that were met

    def forward(self, tokens: Tokens, of: Tensor | None = None) -> Tensor:
        assert tokens.places is not None
        rows, cols = tokens.grid
        visible_BNW = rearrange(self.embed(tokens.patches), "b n (k w) -> b (n k) w", k=self.patches_each)
        index = tokens.places.flatten(1)[:, :, None].expand(-1, -1, visible_BNW.shape[2])
        # One place more, for what lies beyond the edge.
        places_BNW = self.hidden_token.to(visible_BNW.dtype).expand(len(visible_BNW), rows * cols + 1, -1)
        x = places_BNW.scatter(1, index, visible_BNW)[:, :-1]
        x = x + self.positions(tokens.grid, x)
        if tokens.globals is not None:
            embed = self.embed_globals or self.embed
            x = torch.cat([embed(tokens.globals), x], dim=1)
        x = self.blocks(x)[:, -rows * cols :]
        if of is not None:
            x = x.gather(1, of[:, :, None].expand(-1, -1, x.shape[2]))
        return self.predict(self.norm(x))

    def positions(self, grid: tuple[int, int], x: Tensor) -> Tensor:
        """float32 (rows * cols, W), made once for each grid: a copy to the device in every step would wait for it."""
        key = (*grid, x.device)
        if key not in self.made:
            self.made[key] = sincos_positions(grid, x.shape[2]).to(x.device)
        return self.made[key]


class LinearDecoder(nn.Module):
    """One layer from a token of the whole image to its pixels (Xie et al. 2021, section 3.3): (B, M, P)."""

    def __init__(self, encoder: Encoder, patch: int) -> None:
        super().__init__()
        self.predict = nn.Linear(encoder.width, patch**2 * encoder.channels)

    def forward(self, tokens: Tokens, of: Tensor | None = None) -> Tensor:
        x = tokens.patches
        return self.predict(x if of is None else x.gather(1, of[:, :, None].expand(-1, -1, x.shape[2])))


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, rows * patch, cols * patch) -> (B, rows * cols, patch * patch * C), row by row."""
    return rearrange(images, "b c (r p) (s q) -> b (r s) (p q c)", p=patch, q=patch)


def mae_loss(rebuilt_BMP: Tensor, patches_BMP: Tensor) -> Tensor:
    """Mean squared error of the hidden patches, against pixels normalised within each patch (section 4, "norm pix").

    rebuilt_BMP  what the decoder foretells of them, any precision
    patches_BMP  the true ones; each is normalised here, with its mean and its unbiased variance + 1e-6

    Returns a float32 scalar, 0 or more. Slowly:

        total = 0
        for each image b and each hidden patch m of it:
            want = (patch - patch.mean()) / sqrt(patch.var() + 1e-6)
            total += mean over P of (rebuilt[b, m] - want)^2
        return total / number of hidden patches
    """
    with torch.autocast(rebuilt_BMP.device.type, enabled=False):
        var, mean = torch.var_mean(patches_BMP.float(), dim=-1, keepdim=True)
        want_BMP = (patches_BMP.float() - mean) / (var + 1e-6).sqrt()
        return F.mse_loss(rebuilt_BMP.float(), want_BMP)


def l1_loss(rebuilt_BMP: Tensor, patches_BMP: Tensor) -> Tensor:
    """Mean absolute error of the hidden patches' pixels, as they are (Xie et al. 2021, section 3.4).

    As `mae_loss`, but for its target. Slowly:

        total = 0
        for each image b and each hidden patch m of it:
            total += mean over P of |rebuilt[b, m] - patch|
        return total / number of hidden patches
    """
    with torch.autocast(rebuilt_BMP.device.type, enabled=False):
        return F.l1_loss(rebuilt_BMP.float(), patches_BMP.float())


def init_weights(module: nn.Module) -> None:
    """Xavier for linear layers, the patch embedding as one of them, as the authors do."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
