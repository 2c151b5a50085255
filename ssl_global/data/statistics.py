"""Mean and deviation of the data's channels, for recipes that say `auto` instead of ImageNet's.

They are in 0..1, and each image weighs the same: the mean of the images' means; the deviation around it of all pixels.
Shards that `ssl-global pack` wrote have them in a file beside them; else a part of the images is looked at.
"""

from dataclasses import replace

import numpy as np
import torch

from ssl_global.data.decode import BadImage, decode
from ssl_global.data.source import ShardSource, Source
from ssl_global.data.summary import read_summary
from ssl_global.data.workers import in_order, num_workers, workers
from ssl_global.errors import UserError
from ssl_global.recipe import Data

IMAGES = 2048  # that are looked at, evenly spread: the mean is then good to 0.005 (ours)


def with_statistics(data: Data, source: Source, *, processes_here: int = 1) -> Data:
    """`data` with the source's own mean and deviation in the place of "auto"."""
    if "auto" not in (data.mean, data.std):
        return data
    summary = read_summary(source.shards) if isinstance(source, ShardSource) and data.channels == 3 else None
    mean, std = (summary["mean"], summary["std"]) if summary else measure(data, source, processes_here)
    if min(std) <= 0:
        raise UserError(f"{source.path}: a channel has the same value everywhere; give data.std, not auto")
    rounded = [tuple(round(number, 4) for number in numbers) for numbers in (mean, std)]
    return replace(
        data,
        mean=rounded[0] if data.mean == "auto" else data.mean,
        std=rounded[1] if data.std == "auto" else data.std,
    )


def measure(data: Data, source: Source, processes_here: int = 1) -> tuple[list[float], list[float]]:
    """Of up to IMAGES images that can be read, evenly spread over the source: the same ones every time."""

    def moments(index: int) -> np.ndarray | None:
        try:
            pixels = decode(source.read(index), data.channels, data.max_pixels)
        except (BadImage, UserError):
            return None
        values = pixels.flatten(1).to(torch.float32) / 255
        return np.stack([values.mean(1).double().numpy(), values.square().mean(1).double().numpy()])

    count = num_workers(data, processes_here)
    with workers(replace(data, worker_kind="threads"), count, moments) as submit:
        found = [m for m in in_order(submit, evenly_spread(len(source), IMAGES), ahead=2 * count) if m is not None]
    if not found:
        raise UserError(f"{source.path}: data.mean auto: none of the images looked at can be read")
    mean, square = np.mean(found, axis=0)
    return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()


def evenly_spread(count: int, limit: int | None) -> list[int]:
    """Indices into `count` things, `limit` of them at most; shards and folders are often sorted by class."""
    return list(range(count)) if limit is None or limit >= count else [n * count // limit for n in range(limit)]
