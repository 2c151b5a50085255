"""How attention is doing while a model learns: spread out or stuck, near or far, for each layer and head.

    monitor = AttentionMonitor(model, every=100)
    ...
    with monitor.watching():        # around the forward of each training step; 99 of 100 cost nothing
        model(images)
    ...
    tracker.log(monitor.figures())
    for line in monitor.warnings(): ...
    monitor.reset()

The figures, each a mean over queries, images and steps since the last reset:

    entropy    of a query's weights, divided by the log of the number of keys it may attend to: 1 is uniform, 0 is one
               key. It is the figure of Zhai et al. 2023, https://arxiv.org/abs/2303.06296, whose collapse precedes
               that of the training
    max        a query's largest weight
    distance   in pixels, from patch to patch, in the mean over all weight that goes from patches to patches
               (as in Raghu et al. 2021, https://arxiv.org/abs/2108.08810); absent where hidden patches were left out
    near_zero  share of weights below a hundredth of an even share
    near_one   share of queries with a weight above 0.99

Only running sums are kept, of samples: at most so many images of a batch, so many queries of each. The model computes
bit for bit what it would, and no random number of its own is drawn. An untrained model does attend uniformly: warnings
are for later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor, nn

from ssl_global.errors import wrong
from ssl_global.explain.layer import LayerMap
from ssl_global.explain.record import Event, Looker, watch

# All ours.
UNIFORM = 0.99  # entropy above which a head is said to attend uniformly
SATURATED = 0.9  # mean of the largest weight above which a head is said to be saturated
NEAR_ZERO = 0.01  # of an even share
NEAR_ONE = 0.99

FIGURES = ("entropy", "max", "distance", "near_zero", "near_one")


class AttentionMonitor:
    """See above.

    model    as for `maps.record`: a backbone, an encoder, or what holds one
    every    of so many times that `watching` is entered, one is looked at: the first
    images   looked at, of each batch: the first ones
    queries  looked at, of each image and layer; drawn anew each time. Windows are drawn whole

    Raises UserError as `maps.record` does.
    """

    def __init__(self, model: nn.Module, *, every: int = 1, images: int = 8, queries: int = 64) -> None:
        for name, value in (("every", every), ("images", images), ("queries", queries)):
            if value < 1:
                raise wrong(name, value, "at least 1")
        self.looker, self.every, self.queries = Looker(model, images=images), every, queries
        self.generator = torch.Generator().manual_seed(0)
        self.entered = 0
        self.reset()

    def reset(self) -> None:
        """Begins all figures anew."""
        self.sums: dict[str, Sums] = {}
        self.looker.seconds = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The model's calls within it are looked at, one time in `every`. No hook is left, after an error neither."""
        self.entered += 1
        if (self.entered - 1) % self.every:
            yield
            return
        with watch(self.looker, self.see):
            yield

    def see(self, event: Event) -> None:
        if isinstance(event, LayerMap):
            sums = sums_of(self.sample(event))
            seen = self.sums.get(event.path)
            self.sums[event.path] = sums if seen is None else Sums(seen.of + sums.of, seen.over + sums.over)

    def sample(self, layer: LayerMap) -> LayerMap:
        """Some windows with all their queries, or some of the queries of the only group."""
        groups, queries = layer.queries.shape
        if groups == 1:
            return layer.part(None, self.drawn(queries, self.queries))
        return layer.part(self.drawn(groups, max(1, self.queries // queries)), None)

    def drawn(self, total: int, wanted: int) -> Tensor | None:
        """None: all."""
        return torch.randperm(total, generator=self.generator)[:wanted] if wanted < total else None

    def heads(self) -> dict[str, dict[str, Tensor]]:
        """Path: figure: (heads,) on the CPU, for the layers that were seen, in their order. What a layer has not (a
        distance, where there are none) is left out."""
        tables = {path: (sums.of / sums.over).cpu() for path, sums in self.sums.items()}
        return {
            path: {name: values for name, values in zip(FIGURES, table, strict=True) if not values.isnan().any()}
            for path, table in tables.items()
        }

    def figures(self, *, heads: bool = False) -> dict[str, float]:
        """Flat, for a tracker: "attention/blocks.3.attn/entropy", the mean over the heads; with `heads` also
        "attention/blocks.3.attn/head_2/entropy". And what watching has cost, "attention/seconds", since the reset."""
        flat = {"attention/seconds": self.looker.seconds}
        for path, table in self.heads().items():
            for name, values in table.items():
                flat[f"attention/{path}/{name}"] = values.mean().item()
                if heads:
                    flat |= {f"attention/{path}/head_{head}/{name}": v for head, v in enumerate(values.tolist())}
        return flat

    def warnings(self) -> list[str]:
        """What is wrong with a trained model, in plain words; layers are counted from 0, in their order."""
        lines = []
        for number, (path, table) in enumerate(self.heads().items()):
            if "entropy" not in table:
                continue
            where, entropy, largest = f"layer {number} ({path})", table["entropy"], table["max"]
            if (entropy > UNIFORM).all():
                lines.append(f"{where} attends uniformly: its entropy is {entropy.mean():.3f} of the largest possible")
            for head in range(len(entropy)):
                if (entropy <= UNIFORM).any() and entropy[head] > UNIFORM:
                    lines.append(
                        f"{where}, head {head} attends uniformly: its entropy is {entropy[head]:.3f} of the largest"
                    )
                if largest[head] > SATURATED:
                    lines.append(f"{where}, head {head} is saturated: {largest[head]:.2f} of its weight on one token")
        return lines


@dataclass(frozen=True)
class Sums:
    """Of each figure, in the order of FIGURES, (5, heads): sum and what to divide it by."""

    of: Tensor
    over: Tensor


def sums_of(layer: LayerMap) -> Sums:
    heads = layer.query.shape[2]
    # Apple's GPUs have no float64.
    wide = torch.float32 if layer.query.device.type == "mps" else torch.float64
    of = torch.zeros(len(FIGURES), heads, dtype=wide, device=layer.query.device)
    over = torch.zeros_like(of)
    for part, weights in layer.chunks():
        one_of, one_over = sums_of_chunk(part, weights)
        of += one_of
        over += one_over
    return Sums(of, over)


def sums_of_chunk(part: LayerMap, weights_BGHQK: Tensor) -> tuple[Tensor, Tensor]:
    """(5, heads) each. Padding asks nothing, and a query with a single key has no choice: neither counts."""
    num_keys = part.num_allowed().expand(weights_BGHQK.shape[:-1])  # (B, G, H, Q)
    counts = (num_keys > 1) & (part.queries >= 0)[:, None]
    largest = weights_BGHQK.amax(-1)
    entropy = torch.special.entr(weights_BGHQK).sum(-1) / num_keys.to(largest.dtype).log()
    may = True if part.allowed is None else part.allowed
    small = (weights_BGHQK * num_keys[..., None] < NEAR_ZERO) & may
    weight_times_pixels, weight = distance(part, weights_BGHQK)
    num_queries = by_head(counts)
    sums = [
        by_head(entropy.where(counts, 0)),
        by_head(largest.where(counts, 0)),
        weight_times_pixels,
        by_head(small.sum(-1).where(counts, 0)),
        by_head((largest > NEAR_ONE) & counts),
    ]
    return torch.stack(sums), torch.stack(
        [num_queries, num_queries, weight, by_head(num_keys.where(counts, 0)), num_queries]
    )


def distance(part: LayerMap, weights_BGHQK: Tensor) -> tuple[Tensor, Tensor]:
    """(heads,) each: weight times the pixels that it goes over, and weight, from patches to patches."""
    if part.grid is None:
        missing = weights_BGHQK.new_full((weights_BGHQK.shape[2],), nan)
        return missing, missing
    between = (pixels(part, part.queries)[:, :, None] - pixels(part, part.keys)[:, None]).norm(dim=-1)  # (G, Q, K)
    both = (part.queries >= part.prefix)[:, :, None] & (part.keys >= part.prefix)[:, None]
    weights_GHQK = weights_BGHQK.sum(0) * both[:, None]
    return (weights_GHQK * between[:, None]).sum((0, 2, 3)), weights_GHQK.sum((0, 2, 3))


def pixels(part: LayerMap, places: Tensor) -> Tensor:
    """Of patches, (...) -> (..., 2): down and to the right."""
    _, cols = part.known_grid()
    patch = places - part.prefix
    rows_cols = torch.stack([patch.div(cols, rounding_mode="floor"), patch % cols], dim=-1)
    wide = torch.promote_types(part.query.dtype, torch.float32)
    return rows_cols * torch.tensor(part.stride, device=places.device, dtype=wide)


def by_head(values_BGHQ: Tensor) -> Tensor:
    return values_BGHQ.sum((0, 1, 3))
