"""What an MAE rebuilds of what it does not see (He et al. 2021, https://arxiv.org/abs/2111.06377, figures 2 to 4).

Four pictures of each image: the original; what the encoder sees, the rest grey; what the decoder foretells of the
rest; and the two pasted together. Of patches that were seen it says something too, but that was never asked of it.

Under `random` and `uniform` masking the decoder foretells each patch normalised by its own mean and deviation. Those
are put back from the true patch, as is usual for pictures of such models: the brightness and contrast of a rebuilt
patch are the original's, only its structure and hue are foretold. Under `dense` masking the pixels are as foretold.

    B  images     N  patches     P  numbers of a patch
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ssl_global.data.views import normalise
from ssl_global.errors import UserError
from ssl_global.explain.pictures import HIDDEN, as_picture, faded, sheet, unnormalised
from ssl_global.methods.mae import Mae, MaeConfig, Mask, draw, patchify
from ssl_global.methods.masking import num_hidden
from ssl_global.methods.method import Method


@dataclass(frozen=True)
class Rebuilt:
    """All float (B, C, H, W), in 0..1 where the original is; `rebuilt` and `pasted` may be outside of it.

    original  as it was given
    visible   grey where nothing was seen
    rebuilt   what the decoder foretells, of patches that were seen too
    pasted    the original's patches where they were seen, bit for bit, and rebuilt ones elsewhere
    unseen    bool (B, rows, cols): hidden, or replaced by a learned token
    """

    original: Tensor
    visible: Tensor
    rebuilt: Tensor
    pasted: Tensor
    unseen: Tensor

    @property
    def ratio(self) -> float:
        """Share of the patches that are unseen."""
        return self.unseen.float().mean().item()

    def rows(self, names: Sequence[str] = ()) -> list[list[tuple[Image.Image, str]]]:
        """For `pictures.sheet`, under `HEAD`: a row for each image. What was seen is grey in what is rebuilt."""
        rows = []
        for i, original in enumerate(self.original):
            name = names[i] if i < len(names) else ""
            rebuilt = faded(as_picture(self.rebuilt[i]), self.unseen[i])
            cells = [as_picture(original), as_picture(self.visible[i]), rebuilt, as_picture(self.pasted[i])]
            rows.append(list(zip(cells, [name, f"{self.ratio:.0%} hidden", "", ""], strict=True)))
        return rows


HEAD = ("original", "seen", "rebuilt", "pasted")


def reconstruct(
    method: Method,
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    ratio: float | None = None,
    seed: int = 0,
) -> Rebuilt:
    """What the method makes of images of which it sees a part.

    method  of an MAE run (`training.checkpoint.load_method`), any of its maskings, any encoder
    images  (B, C, H, W), float in 0..1 or uint8; H and W multiples of the hidden patches' side
    mean    of each channel, in 0..1, as it was trained
    std     likewise
    ratio   share of the patches to hide; None: the recipe's. Under uniform masking 0.75, or more for a run that was
            trained with a secondary ratio
    seed    the same one hides the same patches; each image has its own

    Without gradient, in evaluation; the method is left in the mode that it was in. Raises UserError for a method that
    is no MAE, a ratio that cannot be, or images of another size.
    """
    if not isinstance(method, Mae):
        raise UserError(f"a {type(method).__name__} run: only MAE rebuilds images")
    grid = grid_of(images, method.patch)
    config = method.config if ratio is None else with_ratio(method, ratio, grid)
    original = images.float() / 255 if images.dtype == torch.uint8 else images
    normal = normalise(original, tuple(mean), tuple(std))
    mask = draw(config, seed + torch.arange(len(images), device=images.device), grid)
    foretold_BNP = foretell(method, normal, mask)
    if config.masking != "dense":
        foretold_BNP = with_own_statistics(foretold_BNP, patchify(normal, method.patch))
    rebuilt = unnormalised(unpatchify(foretold_BNP, grid, method.patch), mean, std)
    unseen = mask.unseen.repeat_interleave(method.patch, 1).repeat_interleave(method.patch, 2)[:, None]
    return Rebuilt(
        original=original,
        visible=torch.where(unseen, original.new_tensor(HIDDEN), original),
        rebuilt=rebuilt,
        pasted=torch.where(unseen, rebuilt, original),
        unseen=mask.unseen,
    )


def foretell(method: Mae, normal: Tensor, mask: Mask) -> Tensor:
    training = {module: module.training for module in method.modules()}
    try:
        with torch.no_grad():
            method.eval()
            tokens = method.encoder(
                normal, mask.hidden, num_hidden=mask.num_hidden, replaced=mask.replaced, token=method.token
            )
            foretold: Tensor = method.decoder(tokens)
            return foretold.float()
    finally:
        for module, was in training.items():
            module.training = was


def grid_of(images: Tensor, patch: int) -> tuple[int, int]:
    if images.ndim != 4:
        raise UserError(f"images of shape {tuple(images.shape)}: (B, C, H, W) would be right")
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise UserError(f"images of {width} x {height} pixels: multiples of the hidden patches' {patch} would be right")
    return height // patch, width // patch


def with_ratio(method: Mae, ratio: float, grid: tuple[int, int]) -> MaeConfig:
    config, num_patches = method.config, grid[0] * grid[1]
    if not 0 < ratio < 1:
        raise UserError(f"ratio = {ratio:g}: a share of the patches, above 0 and below 1")
    if config.masking != "uniform":
        if num_hidden(num_patches, ratio) in (0, num_patches):
            raise UserError(f"ratio = {ratio:g}: none of {num_patches} patches would be hidden, or all of them")
        return replace(config, mask_ratio=ratio)
    if ratio == 0.75:
        return replace(config, secondary_ratio=0.0)
    if ratio < 0.75 or method.token is None:
        more = "0.75 or more" if method.token is not None else "0.75, as it was trained without a secondary ratio"
        raise UserError(f"ratio = {ratio:g}: uniform masking leaves one patch of four; {more}")
    return replace(config, secondary_ratio=1 - (1 - ratio) / 0.25)


def with_own_statistics(foretold_BNP: Tensor, patches_BNP: Tensor) -> Tensor:
    """The other way round what `mae_loss` does to its target: times each true patch's deviation, plus its mean."""
    deviation = (patches_BNP.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return foretold_BNP * deviation + patches_BNP.mean(dim=-1, keepdim=True)


def unpatchify(patches_BNP: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """`patchify` the other way round: (B, N, P) -> (B, C, rows * patch, cols * patch)."""
    return rearrange(patches_BNP, "b (r s) (p q c) -> b c (r p) (s q)", r=grid[0], s=grid[1], p=patch, q=patch)


def reconstruction_sheet(
    method: Method,
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    ratios: Sequence[float | None] = (None,),
    names: Sequence[str] = (),
    seed: int = 0,
    side: int = 160,
) -> Image.Image:
    """A row for each image, with three pictures for each ratio: what is seen, rebuilt, pasted. As `reconstruct`."""
    made = [reconstruct(method, images, mean=mean, std=std, ratio=ratio, seed=seed).rows(names) for ratio in ratios]
    rows = [[of_image[0][0], *(cell for row in of_image for cell in row[1:])] for of_image in zip(*made, strict=True)]
    return sheet(rows, side=side, head=[HEAD[0], *HEAD[1:] * len(made)])
