"""Test-time augmentation: what a model says of an image at several sizes, and of its mirror image, averaged.

    classify = TTA(model)                                                    # (B, C, H, W) -> probabilities (B, K)
    segment = TTA(model, scales=(0.5, 1.0, 1.5))                             # (B, C, H, W) -> (B, K, H, W)
    large = TTA(SlidingWindow(model, window=512, overlap=128), stride=1)     # which takes any size

Which of the two a model does is seen from what it gives. Maps of pixels, at whatever stride, are brought to the size of
the images before anything else is done with them, and those of mirror images are turned back.

merge="mean_prob" (the default) averages probabilities and returns probabilities, as PSPNet's evaluation does (Zhao et
al. 2017, https://arxiv.org/abs/1612.01105); merge="mean_logit" averages logits and returns logits, where one confident
view can outvote the others. Views are looked at one after the other: memory is that of the model on the largest of
them, and a few outputs.

Not as in the source: sides are multiples of a stride, which three quarters of 224 are not; pixels are interpolated, and
none skipped, where it takes the nearest; probabilities are averaged; classifiers work. Evidence:
tests/inference/test_tta.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ssl_global.inference.resize import at_least_float32, multiple_of, refuse_other_than_images, resize

Merge = Literal["mean_prob", "mean_logit"]
Activation = Literal["softmax", "sigmoid"]


class TTA(nn.Module):
    """(B, C, H, W) -> (B, K) or (B, K, H, W), float32 (float64 if the model's are).

    scales       of the images' sides, each then rounded to the nearest multiple of `stride`, at least one
    hflip        each view mirrored, too
    activation   softmax: one class; sigmoid: several labels, or K = 1. Not used by mean_logit
    stride       1 for a model that takes any size. An image whose sides it divides is left as it is at scale 1
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        *,
        scales: Sequence[float] = (0.75, 1.0, 1.25),
        hflip: bool = True,
        merge: Merge = "mean_prob",
        activation: Activation = "softmax",
        stride: int = 32,
    ) -> None:
        super().__init__()
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"scales = {scales}: at least one, each above 0")
        if merge not in get_args(Merge):
            raise ValueError(f"merge = {merge!r}: mean_prob or mean_logit")
        if activation not in get_args(Activation):
            raise ValueError(f"activation = {activation!r}: softmax or sigmoid")
        if stride < 1:
            raise ValueError(f"stride = {stride}: at least 1 pixel")
        self.model: Callable[[Tensor], Tensor] = model
        self.scales, self.hflip, self.stride = tuple(scales), hflip, stride
        self.merge, self.activation = merge, activation

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        refuse_other_than_images(images)
        flips = (False, True) if self.hflip else (False,)
        total: Tensor | None = None
        for scale in self.scales:
            view = resize(images, self.size_at(scale, images))
            for flip in flips:
                said = self.said_of(view.flip(-1) if flip else view, images, flip)
                total = said if total is None else total.add_(said)
        assert total is not None  # there is a scale
        return total.div_(len(self.scales) * len(flips))

    def size_at(self, scale: float, images: Tensor) -> tuple[int, int]:
        rows, cols = (multiple_of(self.stride, side * scale) for side in images.shape[2:])
        return rows, cols

    def said_of(self, view: Tensor, images: Tensor, flipped: bool) -> Tensor:
        """What is averaged: (B, K), or (B, K, H, W) as the images lie. A tensor of its own."""
        logits = self.model(view)
        self.refuse_no_logits(logits, len(view))
        logits = at_least_float32(logits)
        if logits.ndim == 4:
            logits = resize(logits, (images.shape[2], images.shape[3]))
            logits = logits.flip(-1) if flipped else logits
        if self.merge == "mean_logit":
            return logits.clone()  # the model may keep what it gave
        return logits.softmax(dim=1) if self.activation == "softmax" else logits.sigmoid()

    def refuse_no_logits(self, logits: object, count: int) -> None:
        right = f"logits ({count}, K) or ({count}, K, h, w) would be right"
        if not isinstance(logits, Tensor):
            raise ValueError(f"model gave {type(logits).__name__}: {right}")
        if logits.ndim not in (2, 4) or len(logits) != count or not logits.is_floating_point():
            raise ValueError(f"model gave {logits.dtype} {tuple(logits.shape)}: {right}")
        if self.merge == "mean_prob" and self.activation == "softmax" and logits.shape[1] == 1:
            raise ValueError("activation = 'softmax': of one class it is always 1; sigmoid would be right")
