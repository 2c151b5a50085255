"""MAE: rebuild the hidden three quarters of an image from the visible quarter.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", https://arxiv.org/abs/2111.06377.

Letters, in this file only:

    B  images on this process     N  patches of an image      P  numbers in a patch: pixels * pixels * channels
    M  patches that are hidden    W  the decoder's width

The encoder sees the visible patches only. The decoder gets them back in their places, with a learned token in each
hidden place, and foretells the pixels of the hidden patches, each normalised by its own mean and deviation.

Not as in the paper's code: the hidden patches are drawn from the sample's own seed, not from the process's generator;
any H x W that the patch divides and any number of channels work.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_global.encoders.encoder import Encoder, Tokens, visible_index
from ssl_global.encoders.positions import sincos_positions
from ssl_global.errors import wrong
from ssl_global.methods.masking import num_hidden, random_hidden
from ssl_global.methods.method import Batch, Method
from ssl_global.recipe import MethodConfig, Recipe
from ssl_global.schedules import Progress


@dataclass(frozen=True, kw_only=True)
class MaeConfig(MethodConfig):
    mask_ratio: float = 0.75  # share of the patches that the encoder does not see
    decoder_width: int = 512  # of a token
    decoder_depth: int = 8  # blocks
    decoder_heads: int = 16  # of attention, in each block

    def check(self, recipe: Recipe) -> None:
        if not 0 < self.mask_ratio < 1:
            raise wrong(
                "method.mask_ratio", self.mask_ratio, "a share of the patches, above 0 and below 1; the paper's is 0.75"
            )
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

    def build(self, recipe: Recipe) -> "Mae":
        return Mae(self, recipe.encoder.build(recipe))


class Mae(Method):
    def __init__(self, config: MaeConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = Decoder(config, encoder)
        self.encoder.apply(init_weights)
        self.decoder.apply(init_weights)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["views"][0]
        grid = (images.shape[2] // self.encoder.patch, images.shape[3] // self.encoder.patch)
        hidden = random_hidden(batch["seed"], grid, self.config.mask_ratio)
        count = num_hidden(grid[0] * grid[1], self.config.mask_ratio)
        rebuilt_BNP = self.decoder(self.encoder(images, hidden, num_hidden=count), hidden, count)
        return {"loss": mae_loss(rebuilt_BNP, patchify(images, self.encoder.patch), hidden.flatten(1))}

    def backbones(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}


class Decoder(nn.Module):
    """Visible tokens to the pixels of all patches: (B, N, P)."""

    def __init__(self, config: MaeConfig, encoder: Encoder) -> None:
        super().__init__()
        width = config.decoder_width
        self.embed = nn.Linear(encoder.width, width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *[
                Block(width, config.decoder_heads, qkv_bias=True, norm_layer=nn.LayerNorm)
                for _ in range(config.decoder_depth)
            ]
        )
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, encoder.patch**2 * encoder.channels)
        nn.init.normal_(self.hidden_token, std=0.02)

    def forward(self, tokens: Tokens, hidden: Tensor, count: int) -> Tensor:
        visible_BNW = self.embed(tokens.patches)
        rows, cols = tokens.grid
        index = visible_index(hidden, count)[:, :, None].expand(-1, -1, visible_BNW.shape[2])
        places_BNW = self.hidden_token.to(visible_BNW.dtype).expand(len(visible_BNW), rows * cols, -1)
        x = places_BNW.scatter(1, index, visible_BNW)
        x = x + sincos_positions(tokens.grid, x.shape[2]).to(x)
        return self.predict(self.norm(self.blocks(x)))


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, rows * patch, cols * patch) -> (B, rows * cols, patch * patch * C), row by row."""
    return rearrange(images, "b c (r p) (s q) -> b (r s) (p q c)", p=patch, q=patch)


def mae_loss(rebuilt_BNP: Tensor, patches_BNP: Tensor, hidden_BN: Tensor) -> Tensor:
    """Mean squared error of the hidden patches, against pixels normalised within each patch (section 4, "norm pix").

    rebuilt_BNP  what the decoder foretells, any precision
    patches_BNP  the true patches; each is normalised here, with its mean and its unbiased variance + 1e-6
    hidden_BN    bool, True = the encoder did not see it; equally many in each image

    Returns a float32 scalar, 0 or more. Slowly:

        total = 0
        for each image b and each hidden patch n of it:
            want = (patch - patch.mean()) / sqrt(patch.var() + 1e-6)
            total += mean over P of (rebuilt[b, n] - want)^2
        return total / number of hidden patches
    """
    with torch.autocast(rebuilt_BNP.device.type, enabled=False):
        patches_BNP = patches_BNP.float()
        mean = patches_BNP.mean(dim=-1, keepdim=True)
        var = patches_BNP.var(dim=-1, keepdim=True)
        want_BNP = (patches_BNP - mean) / (var + 1e-6).sqrt()
        error_BN = (rebuilt_BNP.float() - want_BNP).square().mean(dim=-1)
        return (error_BN * hidden_BN).sum() / hidden_BN.sum()


def init_weights(module: nn.Module) -> None:
    """Xavier for linear layers, the patch embedding as one of them, as the authors do."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
