"""What windows may know of the image around them: one pass over the whole image at low resolution.

A model that can use it has one more method, and is given what that gave (`WithContext`):

    class Segmenter(nn.Module):
        def global_context(self, images: Tensor) -> Tensor:
            return self.encoder(images)

        def forward(self, windows: Tensor, context: Tensor) -> Tensor:
            return self.head(torch.cat([self.encoder(windows), context], dim=1))

    infer = SlidingWindow(Segmenter().eval(), window=512, overlap=128, context="aligned")

`global_context` sees whole images, shrunk until they fit into one window: their aspect is kept but for the sides, which
are multiples of a stride, and they are never enlarged but to that.

    aligned   it gives a map, (B, D, rows, cols). A window is given the part that lies under it, enlarged to as many
              cells as the same encoder would make of a window. Bilinear, at exact coordinates: of a map of coordinates
              each window gets its own. Beyond the centres of its outer cells a map goes on as it ends
    tokens    it gives (B, G, D). A window is given its image's

The idea is GLNet's (Chen et al. 2019, https://arxiv.org/abs/1905.06368), where the two passes share more than this. Not
as in the source: it squeezes any image to a square, gives all windows the same, and takes whatever the model gives for
an image as its context. Evidence: tests/inference/test_context.py.
"""

import inspect
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_global.inference.resize import at_least_float32, multiple_of, resize

Context = Literal["aligned", "tokens"]
Size = tuple[int, int]  # rows and columns

SHAPES = {"aligned": "(B, D, rows, cols)", "tokens": "(B, G, D)"}


class WithContext(Protocol):
    def global_context(self, images: Tensor) -> Tensor:
        """(B, C, h', w'), whole images at low resolution -> (B, D, rows, cols) if aligned, (B, G, D) if tokens."""

    def __call__(self, windows: Tensor, context: Tensor) -> Tensor:
        """(n, C, h, w) and the n contexts, (n, D, rows', cols') or (n, G, D) -> logits."""


class GlobalContext:
    """The contexts of some images, made once.

    kind     aligned or tokens
    window   (rows, columns) in pixels
    stride   of the sides of low-resolution images
    batch    images that the model is given at once
    device   where the model is
    """

    def __init__(
        self,
        model: WithContext,
        images: Tensor,
        kind: Context,
        *,
        window: Size,
        stride: int,
        batch: int,
        device: torch.device,
    ) -> None:
        self.kind, self.window, self.size = kind, window, (images.shape[2], images.shape[3])
        self.small = low_resolution(self.size, window, stride)
        contexts = []
        for some in images.split(batch):
            context = model.global_context(resize(some, self.small).to(device))
            refuse_other_than_context(context, kind, len(some))
            contexts.append(context)
        self.contexts = torch.cat(contexts)

    def of(self, images: Sequence[int], corners: Sequence[Size]) -> Tensor:
        """For windows of the images with these numbers, by their upper left pixels."""
        contexts = self.contexts[torch.tensor(images, device=self.contexts.device)]
        return contexts if self.kind == "tokens" else self.under(contexts, corners)

    def under(self, maps: Tensor, corners: Sequence[Size]) -> Tensor:
        """(n, D, rows, cols) -> (n, D, rows', cols')."""
        rows, cols = (
            self.coordinates([corner[axis] for corner in corners], maps.shape[2 + axis], axis) for axis in (0, 1)
        )
        down, right = torch.broadcast_tensors(rows[:, :, None], cols[:, None, :])
        wide = at_least_float32(maps)  # bfloat16 knows too few coordinates
        grid = torch.stack([right, down], dim=-1).to(wide)
        cut = F.grid_sample(wide, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return cut.to(maps.dtype)

    def coordinates(self, starts: Sequence[int], cells: int, axis: int) -> Tensor:
        """Of the centres of the windows' cells, -1 and 1 being the image's edges: float64 (n, cells of a window).

        cells   of the whole map
        """
        window, length = self.window[axis], self.size[axis]
        of_window = max(1, round(window * cells / self.small[axis]))
        centres = (torch.arange(of_window, dtype=torch.float64) + 0.5) * (window / of_window)
        return (torch.tensor(starts, dtype=torch.float64)[:, None] + centres) * (2 / length) - 1


def low_resolution(size: Size, window: Size, stride: int) -> Size:
    """Of an image of `size`, shrunk so that it fits into the window."""
    scale = min(1.0, window[0] / size[0], window[1] / size[1])
    rows, cols = (
        min(multiple_of(stride, length * scale), limit // stride * stride)
        for length, limit in zip(size, window, strict=True)
    )
    return rows, cols


def refuse_what_cannot_be(model: object, kind: str, stride: int, window: Size) -> None:
    if kind not in get_args(Context):
        raise ValueError(f"context = {kind!r}: aligned, tokens or None")
    if not 1 <= stride <= min(window):
        raise ValueError(f"context_stride = {stride}: from 1 to {min(window)}, the window's shorter side")
    if not takes_context(model):
        wanted = "needs a model with global_context(images) and forward(windows, context)"
        raise ValueError(f"context = {kind!r}: {wanted}, and {type(model).__name__} is none (WithContext)")


def refuse_other_than_context(context: object, kind: Context, count: int) -> None:
    right = f"{SHAPES[kind]} would be right for context={kind!r} and B = {count}"
    if not isinstance(context, Tensor):
        raise ValueError(f"global_context gave {type(context).__name__}: {right}")
    if context.ndim != SHAPES[kind].count(",") + 1 or len(context) != count:
        raise ValueError(f"global_context gave {tuple(context.shape)}: {right}")


def takes_context(model: object) -> bool:
    if not callable(getattr(model, "global_context", None)):
        return False
    try:
        inspect.signature(getattr(model, "forward", model)).bind("windows", "context")  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
