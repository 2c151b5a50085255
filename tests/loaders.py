"""Helpers of the tests of the data river: the batches of a run's step as plain values that can be compared."""

import zlib
from dataclasses import replace
from typing import Any

import torch
from recipes_under_test import load_recipe

from ssl_global.data.loader import Indexed, Loader
from ssl_global.data.order import Order, batches
from ssl_global.data.source import Source
from ssl_global.recipe import Data, Recipe

DINO = load_recipe("dino", "demo")


def recipe_of(global_batch: int = 4, **data: Any) -> Recipe:
    """DINO's demo, with these settings of its data."""
    return replace(DINO, data=Data(**{"workers": 0} | data), train=replace(DINO.train, global_batch=global_batch))


def serve(
    source: Source, recipe: Recipe, *,
    start: int = 0, stop: int = 6, process: int = 0, processes: int = 1, parts: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """All micro-batches of one process, `parts` a step, copied out of the ring."""
    global_batch = recipe.train.global_batch
    micro_batch = global_batch // processes // parts
    order = Order.of(source.bounds, recipe)
    images = batches(
        start_step=start, num_steps=stop, global_batch=global_batch, micro_batch=micro_batch, process=process,
        num_processes=processes,
    )  # fmt: skip
    with Loader(Indexed(source), order, recipe, images, micro_batch=micro_batch).serving() as served:
        return [batch | {"crops": [kind.clone() for kind in batch["crops"]]} for batch in served]


def rows(batch: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """Of each image: its key, its seed, and checksums of its pixels and of its colour numbers."""
    return [
        (key, int(seed), checksum([kind[row] for kind in batch["crops"]]), checksum([c[row] for c in batch["colours"]]))
        for row, (key, seed) in enumerate(zip(batch["key"], batch["seed"], strict=True))
    ]


def checksum(tensors: list[torch.Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().numpy(), total)
    return total


def steps(
    source: Source, recipe: Recipe, *, start: int, stop: int, processes: int = 1, parts: int = 1
) -> list[list[tuple[str, int, int, int]]]:
    """The images of each global step, in their order, however many processes and parts share it."""
    shares = [
        serve(source, recipe, start=start, stop=stop, process=process, processes=processes, parts=parts)
        for process in range(processes)
    ]
    return [
        [row for share in shares for batch in share[step * parts : (step + 1) * parts] for row in rows(batch)]
        for step in range(stop - start)
    ]
