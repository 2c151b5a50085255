"""Features of many images, computed once: what the k-NN, the linear probe and the health meters look at.

N  images    D  width of the features
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssl_global.data.decode import BadImage, decode
from ssl_global.data.source import Source
from ssl_global.data.statistics import evenly_spread
from ssl_global.data.views import normalise, plain_view
from ssl_global.data.workers import in_order, num_workers, workers
from ssl_global.errors import UserError
from ssl_global.recipe import Data

MOST_CLASSES = 2**20  # that are voted for (ours): a label of two thousand million would take all memory
PIXELS_BASELINE_SIDE = 32  # ours: 3072 numbers of an image, about as many as the widest features


@dataclass(frozen=True)
class Features:
    """What a backbone says of the images of a source, in the source's order."""

    x: Tensor  # (N, D) float32 on the CPU
    labels: Tensor | None  # (N,) int64, or None where the source has none
    bad: list[str]  # keys of the images that could not be read: they have no row


@dataclass(frozen=True)
class Split:
    """Labelled features to learn from, and others to be judged on."""

    bank: Features
    queries: Features
    said: str  # where the two come from, for people
    classes: list[str] | None  # the names behind the labels, if there are any

    @property
    def num_classes(self) -> int:
        _, bank_labels, _, query_labels = self.tensors()
        return int(max(bank_labels.max(), query_labels.max())) + 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """bank (N, D), its labels (N,), queries (M, D), their labels (M,)."""
        assert self.bank.labels is not None
        assert self.queries.labels is not None
        return self.bank.x, self.bank.labels, self.queries.x, self.queries.labels


def extract(
    embed: Callable[[Tensor], Tensor],
    source: Source,
    *,
    data: Data,
    pixels: int,
    batch: int,
    device: torch.device,
    limit: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Features:
    """The features of a source's images, each seen whole (shorter side to pixels / 0.875, centre crop), normalised.

    embed   images (B, C, pixels, pixels), float on `device` -> (B, D); put into eval mode by whoever passes it
    batch   images at once, in each process
    limit   take that many images at most, evenly spread over the source: the same ones every time
    between is called after each batch

    With torch.distributed running, each process does its share and all of them get everything; so all must call it.
    Images that cannot be read are left out and named in `bad`; more than data.max_bad_fraction of them: UserError.
    """
    indices = np.array(evenly_spread(len(source), limit))
    share = share_of_this_process(indices)
    features, readable = [], []
    with torch.no_grad():
        for batch_images, batch_readable in batches(source, share, data=data, pixels=pixels, batch=batch):
            normal = normalise(batch_images.to(device), *data.normalisation)
            features.append(embed(normal).float())
            readable.append(batch_readable)
            between()
    x = of_all_processes(torch.cat(features), len(indices)).cpu()
    good = of_all_processes(torch.cat(readable).to(device), len(indices)).cpu().bool()
    bad = [source.key(int(i)) for i in indices[~good.numpy()]]
    refuse_too_many(bad, of=len(indices), max_bad_fraction=data.max_bad_fraction)
    labels = None if source.labels is None else torch.from_numpy(source.labels[indices])[good]
    return Features(x=x[good], labels=labels, bad=bad)


def pixel_features(
    source: Source,
    *,
    data: Data,
    batch: int,
    device: torch.device,
    limit: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Features:
    """The baseline that needs no backbone: the raw pixels.

    Each image is scaled and cropped to 32 x 32, normalised (data.mean is subtracted from its channels, which are then
    divided by data.std) and flattened: x is (N, channels * 32 * 32). An image's own mean stays: a k-NN does better
    with the brightness than without.
    """
    return extract(
        lambda images: images.flatten(1),
        source,
        data=data,
        pixels=PIXELS_BASELINE_SIDE,
        batch=batch,
        device=device,
        limit=limit,
        between=between,
    )


def split(
    features_of: Callable[..., Features], train: Source | None, val: Source, *, bank_images: int | None = None
) -> Split:
    """The features to learn from and those to judge on: the training source and val, or halves of val.

    features_of   `extract` or `pixel_features` with all but the source and `limit` filled in
    train         learnt from if it has labels, `bank_images` of it at most; else val's even images are, and val's
                  odd ones judge

    Labels are matched by class name where both have names. Raises UserError if val has no labels, or other classes.
    """
    if val.labels is None:
        raise UserError("the k-NN and the probe need labels: give --val class folders, or labelled shards")
    for source in (train, val):
        if source is not None and source.labels is not None and (most := source.labels.max()) >= MOST_CLASSES:
            raise UserError(f"{source.path}: holds the label {most}; classes are numbered from 0, below {MOST_CLASSES}")
    if train is None or train.labels is None:
        return halves(features_of(val, limit=None), val.classes)
    translation = match_classes(train.classes, val.classes)
    bank, queries = features_of(train, limit=bank_images), features_of(val, limit=None)
    if translation is not None:
        assert queries.labels is not None
        queries = Features(x=queries.x, labels=translation[queries.labels], bad=queries.bad)
    said = f"{len(bank.x)} training images, judged on {len(queries.x)} of val"
    return Split(bank=bank, queries=queries, said=said, classes=train.classes or val.classes)


def halves(features: Features, classes: list[str] | None) -> Split:
    assert features.labels is not None
    if len(features.x) < 2:
        raise UserError(f"val has {len(features.x)} readable images: without training labels at least 2 are needed")
    bank, queries = (
        Features(x=features.x[first::2], labels=features.labels[first::2], bad=features.bad) for first in (0, 1)
    )
    said = f"no training labels: {len(bank.x)} images of val (the even ones), judged on its {len(queries.x)} odd ones"
    return Split(bank=bank, queries=queries, said=said, classes=classes)


def match_classes(train: list[str] | None, val: list[str] | None) -> Tensor | None:
    """The training label of each of val's labels; None if names are missing and the numbers have to do."""
    if train is None or val is None:
        return None
    if set(train) != set(val):
        only = [f"only {side}: {', '.join(sorted(names))}" for side, names in
                (("train", set(train) - set(val)), ("val", set(val) - set(train))) if names]  # fmt: skip
        raise UserError(f"the classes of train and val differ: {'; '.join(only)}")
    return torch.tensor([train.index(name) for name in val])


def batches(
    source: Source, indices: np.ndarray, *, data: Data, pixels: int, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images uint8 (B, C, pixels, pixels), readable uint8 (B,)) in the order of `indices`."""

    def plain(index: int) -> tuple[Tensor, bool]:
        """The image as it is evaluated; black where it cannot be read."""
        try:
            image = decode(source.read(index), data.channels, data.max_pixels)
        except (BadImage, UserError):
            return torch.zeros(data.channels, pixels, pixels, dtype=torch.uint8), False
        return plain_view(image, pixels), True

    count = num_workers(data, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with workers(replace(data, worker_kind="threads"), count, plain) as submit:
        served = in_order(submit, indices.tolist(), ahead=2 * batch if count else 0)
        while taken := list(islice(served, batch)):
            images, readable = zip(*taken, strict=True)
            yield torch.stack(images), torch.tensor(readable, dtype=torch.uint8)  # gloo gathers no bool


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_of_this_process(indices: np.ndarray) -> np.ndarray:
    """Every num_processes-th index; the first ones are repeated until all shares are equally long."""
    world = num_processes()
    if world == 1:
        return indices
    return np.resize(indices, math.ceil(len(indices) / world) * world)[dist.get_rank() :: world]


def own_share(count: int) -> int:
    """How many of this process's share of `count` indices are not repeated ones."""
    world = num_processes()
    return count if world == 1 else len(range(dist.get_rank(), count, world))


def of_all_processes(values: Tensor, count: int) -> Tensor:
    """Puts the shares (n, ...) of all processes together again, in the order of the indices: (count, ...)."""
    if num_processes() == 1:
        return values
    if dist.get_backend() == "gloo":
        values = values.cpu()  # it gathers nothing else
    shares = [torch.empty_like(values) for _ in range(num_processes())]
    dist.all_gather(shares, values.contiguous())
    return torch.stack(shares, dim=1).flatten(0, 1)[:count]


def refuse_too_many(bad: list[str], *, of: int, max_bad_fraction: float) -> None:
    if len(bad) > max_bad_fraction * of:
        raise UserError(
            f"{len(bad)} of {of} images cannot be read, more than data.max_bad_fraction = {max_bad_fraction:g}:\n"
            + "\n".join(f"  {key}" for key in bad)
        )
