"""What every encoder offers, whatever it is made of."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """What an encoder says of images. B images, D the encoder's width, N patches that were looked at."""

    summary: Tensor  # (B, D): the whole image
    patches: Tensor  # (B, N, D): the patches that were not hidden, row by row
    grid: tuple[int, int]  # rows and columns of all patches, hidden ones too


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
    patch: int  # side of a patch, in pixels

    def encode(self, images: Tensor, hidden: Tensor | None = None, *, num_hidden: int | None = None) -> Tokens:
        """The tokens of `images`, looking at none of their hidden patches.

        images      (B, C, H, W), normalised; H and W that the patch does not divide are padded below and to the right
        hidden      bool (B, rows, cols), True = the encoder does not see that patch; each image hides equally many
        num_hidden  how many that is, if the caller knows: it saves a wait for the device
        """
        raise NotImplementedError

    def forward(self, images: Tensor, hidden: Tensor | None = None, *, num_hidden: int | None = None) -> Tokens:
        return self.encode(images, hidden, num_hidden=num_hidden)

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
