"""What every encoder offers, whatever it is made of."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """What an encoder says of images. B images, D the encoder's width, N patches that were looked at."""

    summary: Tensor  # (B, D): the whole image
    patches: Tensor  # (B, N, D): the patches that were not hidden, row by row; a pyramid's last stage
    grid: tuple[int, int]  # rows and columns of all patches, hidden ones too
    places: Tensor | None = None  # int64 (B, N, K): where in the grid, row by row, the K patches lie that each of
    #                               `patches` stands for; rows * cols is beyond the edge; None: nothing was hidden
    globals: Tensor | None = None  # (B, G, D): tokens without a place, of encoders whose patches read them


class Encoder(nn.Module):
    """Images to tokens. Wraps a timm model, so that what is learnt is timm's to load.

    model       the timm model: its state_dict() is what an export holds
    model_args  what `timm.create_model(architecture, **model_args)` needs to build it again, as JSON can hold it
    """

    model: nn.Module
    architecture: str  # timm's name
    model_args: dict[str, Any]
    pixels: int  # side of the images that it is built for; other sizes work too
    channels: int
    width: int  # D
    first_width: int  # of what a patch is embedded in; a pyramid's first stage
    patch: int  # side, in pixels, of what one of `Tokens.patches` stands for
    num_globals: int = 0  # of Tokens.globals
    classes: tuple[str, ...] = ()  # that `model` itself tells apart, when it was fine-tuned

    multi_label: bool = False  # whether an image may have any number of them

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def patch_width(self) -> int:
        """Of Tokens.patches."""
        return self.width

    def encode(
        self,
        images: Tensor,
        hidden: Tensor | None = None,
        *,
        num_hidden: int | None = None,
        replaced: Tensor | None = None,
        token: Tensor | None = None,
    ) -> Tokens:
        """The tokens of `images`, looking at none of their hidden patches.

        images      (B, C, H, W), normalised; H and W that the patch does not divide are padded below and to the right
        hidden      bool (B, rows, cols), True = the encoder does not see that patch, which costs nothing; each image
                    hides equally many; which patches can be hidden `EncoderConfig.hides` says
        num_hidden  how many that is, if the caller knows: it saves a wait for the device
        replaced    bool (B, rows, cols), True = the encoder sees `token` there, at the cost of a patch
        token       (first_width,)
        """
        raise NotImplementedError

    def forward(
        self,
        images: Tensor,
        hidden: Tensor | None = None,
        *,
        num_hidden: int | None = None,
        replaced: Tensor | None = None,
        token: Tensor | None = None,
    ) -> Tokens:
        return self.encode(images, hidden, num_hidden=num_hidden, replaced=replaced, token=token)

    def may_be_new(self, name: str) -> bool:
        """Whether weights from elsewhere may lack the model's tensor of that name, which then stays as it is."""
        return False

    def has_new(self, names: list[str]) -> None:
        """Weights were loaded that lacked these: the place to keep them from disturbing the others."""

    def recompute_activations(self) -> None:
        """Keep no activations of the blocks for the backward pass: compute them again there."""
        raise NotImplementedError


def visible_index(hidden: Tensor, num_hidden: int | None = None) -> Tensor:
    """The places of the patches that are not hidden, in their order: (B, N - num_hidden) of int64.

    hidden  bool (B, rows, cols) or (B, N); each row hides equally many

    Raises ValueError if they do not (only when `num_hidden` is not given: a check costs a wait for the device).
    """
    hidden_BN = hidden.flatten(1)
    if num_hidden is None:
        counts = hidden_BN.sum(1)
        num_hidden = int(counts[0])
        if not torch.all(counts == num_hidden):
            raise ValueError(f"each image must hide equally many patches, got {counts.tolist()}")
    return hidden_BN.to(torch.uint8).argsort(dim=1, stable=True)[:, : hidden_BN.shape[1] - num_hidden]


def replace_tokens(x: Tensor, replaced: Tensor, token: Tensor, *, along: int = 1) -> Tensor:
    """`token` in the place of what is replaced.

    x         (B, rows, cols, D), or (B, U, along, along, D): patches by themselves
    replaced  bool (B, R, S), each for `along` x `along` of x, the last ones for what is left; or (B, U)
    token     (D,)
    """
    if x.ndim == 4:
        fine = replaced.repeat_interleave(along, 1).repeat_interleave(along, 2)[:, : x.shape[1], : x.shape[2]]
    else:
        fine = replaced[:, :, None, None]
    return torch.where(fine[..., None], token.to(x.dtype), x)
