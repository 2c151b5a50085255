"""Dense prediction on images of any size, window by window.

    model.eval()
    infer = SlidingWindow(model, window=512, overlap=128)
    logits = infer(images)                         # (B, C, H, W) -> (B, K, H, W), any H and W

The model is any callable. It is given (n, C, h, w), always whole windows, and gives logits: (n, K, h, w), or
(n, K, h / s, w / s) for a whole stride s, which are enlarged to the window, bilinearly. With `context` it is given what
it made of the whole image, too (context.py).

Where windows lie   every window - overlap pixels from the top and the left, the last one shifted back inside. If that
                    step is a multiple of the model's stride, all windows but the last see the whole image's grid.
What pixels weigh   at an edge that cuts the image a model sees its padding where the image goes on. There a margin has
                    no say, and the neighbour, which sees further, speaks alone. At the edges of the image itself
                    nothing is cut off. Elsewhere the blend is MONAI's Gaussian (sigma is an eighth of the window) or
                    the mean. At each pixel the weights of all windows sum to 1.
The margin          just under half the overlap, if none is given: a model that looks less far than half the overlap
                    then gives what it gives for the whole image (of its context, if it has one). No wider blend could:
                    of the pixels that two neighbours share only the middle one or two are right in both. margin=0
                    blends over all of them, as MONAI does, and is exact for no reach but 0; with a model that sees all
                    of its window anyway seams are softer so.
Small images        are filled up below and to the right with their last row and column: it works from one pixel on,
                    leaves the model's grid in its place, and draws no edge where the image has none. A model that pads
                    with something else differs there from the whole image's answer, as far as it reaches.
Memory              the output in float32, `batch` windows with what the model makes of them, and O(H + W): the sum of
                    all windows' weights is a factor of the row times one of the column, so each window's weights are
                    divided by it beforehand, and no map of weights is kept. No gradients.

Cutting margins is U-Net's overlap-tile (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597). Not as in the
source: it leaves the right and the bottom of most images empty, and its mean is over edges too. Not as in MONAI:
weights below 1e-3 are not raised to that, as it would leave them no factors. Evidence:
tests/inference/test_sliding_window.py.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_global.inference.context import Context, GlobalContext, Size, WithContext
from ssl_global.inference.context import refuse_what_cannot_be as refuse_context
from ssl_global.inference.resize import at_least_float32, refuse_other_than_images, resize

Blend = Literal["gaussian", "mean"]

SIGMA = 1 / 8  # of the window; MONAI's default


class SlidingWindow(nn.Module):
    """(B, C, H, W) -> logits (B, K, H, W), float32 (float64 if the model's are), on the images' device.

    window          pixels; this and the next two are a number or (rows, columns)
    overlap         pixels that neighbours share at least; less than the window
    margin          pixels without a say along edges that cut the image, at most half the overlap; None: (overlap - 1)
                    // 2, see above
    batch           windows that the model is given at once, of one image or of several
    context_stride  what the sides of low-resolution images are multiples of

    Windows go to the device of the model's first parameter, so a large image may stay in the computer's own memory.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor] | WithContext,
        window: int | Size,
        overlap: int | Size,
        *,
        blend: Blend = "gaussian",
        margin: int | Size | None = None,
        batch: int = 4,
        context: Context | None = None,
        context_stride: int = 32,
    ) -> None:
        super().__init__()
        self.window, self.overlap = pair("window", window), pair("overlap", overlap)
        rows, cols = (max(0, overlap - 1) // 2 for overlap in self.overlap)
        self.margin = (rows, cols) if margin is None else pair("margin", margin)
        self.model: Callable[..., Tensor] = model
        self.blend, self.batch, self.context, self.context_stride = blend, batch, context, context_stride
        self.refuse_what_cannot_be()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        refuse_other_than_images(images)
        device = self.device_for(images)
        context = self.context_of(images, device)
        rows, cols = self.along(images, 0), self.along(images, 1)
        total: Tensor | None = None
        for places in in_batches(product(range(len(images)), rows, cols), self.batch):
            total = self.add(total, self.logits_of(images, places, context, device), images, places)
        assert total is not None  # no size of images is 0
        return total

    def logits_of(
        self, images: Tensor, places: "list[Place]", context: GlobalContext | None, device: torch.device
    ) -> Tensor:
        """Of these windows: (n, K, h, w), where the images are and in a precision to sum in."""
        windows = torch.stack([self.cut(images[b], row.start, col.start) for b, row, col in places]).to(device)
        if context is None:
            logits = self.model(windows)
        else:
            numbers, corners = [b for b, _, _ in places], [(row.start, col.start) for _, row, col in places]
            logits = self.model(windows, context.of(numbers, corners))
        self.refuse_no_logits(logits, len(places))
        return resize(at_least_float32(logits), self.window).to(images.device)

    def add(self, total: Tensor | None, logits: Tensor, images: Tensor, places: "list[Place]") -> Tensor:
        """What the windows say, weighed, to the sum."""
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[2:])
        for (b, row, col), of_window in zip(places, logits, strict=True):
            weighed = of_window[:, row.inside, col.inside] * row.weight[:, None] * col.weight
            total[b, :, row.there, col.there] += weighed
        return total

    def cut(self, image: Tensor, top: int, left: int) -> Tensor:
        """(C, H, W) -> (C, h, w)."""
        part = image[:, top : top + self.window[0], left : left + self.window[1]]
        missing = (0, self.window[1] - part.shape[2], 0, self.window[0] - part.shape[1])
        return F.pad(part[None], missing, mode="replicate")[0] if any(missing) else part

    def along(self, images: Tensor, axis: int) -> "list[Span]":
        window, overlap, margin = self.window[axis], self.overlap[axis], self.margin[axis]
        return spans(images.shape[2 + axis], window, overlap, margin, self.blend, images.device)

    def context_of(self, images: Tensor, device: torch.device) -> GlobalContext | None:
        if self.context is None:
            return None
        return GlobalContext(
            cast(WithContext, self.model),
            images,
            self.context,
            window=self.window,
            stride=self.context_stride,
            batch=self.batch,
            device=device,
        )

    def device_for(self, images: Tensor) -> torch.device:
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next(parameters, images).device

    def refuse_what_cannot_be(self) -> None:
        for window, overlap, margin in zip(self.window, self.overlap, self.margin, strict=True):
            if window < 1:
                raise ValueError(f"window = {window}: at least 1 pixel")
            if not 0 <= overlap < window:
                raise ValueError(f"overlap = {overlap}: from 0 to {window - 1}, less than the window of {window}")
            if not 0 <= margin <= overlap / 2:
                raise ValueError(f"margin = {margin}: from 0 to {overlap // 2}, half the overlap of {overlap}")
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}: at least 1 window")
        if self.blend not in get_args(Blend):
            raise ValueError(f"blend = {self.blend!r}: gaussian or mean")
        if self.context is not None:
            refuse_context(self.model, self.context, self.context_stride, self.window)

    def refuse_no_logits(self, logits: object, count: int) -> None:
        if not isinstance(logits, Tensor) or logits.ndim != 4 or not logits.is_floating_point():
            given = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model gave {given}: a tensor of logits (n, K, h, w) would be right")
        h, w = self.window
        stride = h // max(1, logits.shape[2])
        if len(logits) != count or (stride * logits.shape[2], stride * logits.shape[3]) != (h, w):
            right = f"({count}, K, {h}, {w}) would be right, or with both sides divided by the same whole stride"
            raise ValueError(f"model gave {tuple(logits.shape)}: {right}")


@dataclass(frozen=True)
class Span:
    """A window along one axis.

    start    its first pixel in the image
    there    the pixels of the image that it has a say in
    inside   the same ones within the window
    weight   of each of them, float32: over all windows they sum to 1
    """

    start: int
    there: slice
    inside: slice
    weight: Tensor


def spans(length: int, window: int, overlap: int, margin: int, blend: str, device: torch.device) -> list[Span]:
    """All windows along an axis of `length` pixels; one that reaches beyond it if it is the shorter."""
    last = max(0, length - window)
    starts = [*range(0, last, window - overlap), last]
    # A window's say begins margin pixels in, and ends as many before its end, but at the ends of the image. No pixel is
    # left out: the next say begins window - overlap + margin pixels on at most, and 2 margin <= overlap.
    begins = [start + margin if start > 0 else 0 for start in starts]
    ends = [start + window - margin if start < last else length for start in starts]
    bell = profile(window, blend)
    weights = [bell[begin - start : end - start] for start, begin, end in zip(starts, begins, ends, strict=True)]
    total = torch.zeros(length, dtype=torch.float64)
    for begin, end, weight in zip(begins, ends, weights, strict=True):
        total[begin:end] += weight
    return [
        Span(
            start,
            there=slice(begin, end),
            inside=slice(begin - start, end - start),
            weight=(weight / total[begin:end]).to(device, torch.float32),
        )
        for start, begin, end, weight in zip(starts, begins, ends, weights, strict=True)
    ]


def profile(window: int, blend: str) -> Tensor:
    """What a window's pixels weigh along one axis, never 0: float64 (window,)."""
    if blend == "mean":
        return torch.ones(window, dtype=torch.float64)
    from_centre = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    return torch.exp(-0.5 * (from_centre / (SIGMA * window)).square())


Place = tuple[int, Span, Span]  # number of the image, and the window's rows and columns


def in_batches(places: Iterable[Place], size: int) -> Iterator[list[Place]]:
    places = iter(places)
    while batch := list(islice(places, size)):
        yield batch


def pair(name: str, value: int | Size) -> Size:
    both = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
    if len(both) != 2 or not all(isinstance(one, int) for one in both):
        raise ValueError(f"{name} = {value!r}: a whole number of pixels or (rows, columns)")
    return both[0], both[1]
