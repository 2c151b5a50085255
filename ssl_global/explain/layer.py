"""One attention as it was called: who looked at whom, in any of the shapes that attention has.

The weights themselves, N x N of them, are not kept. What is kept is what they are made of, queries, keys and biases,
which is linear in N; the weights of a few queries, or of all in turn, are a softmax away.

Letters, in this file only:

    B  images     G  groups of tokens that attend to each other: 1 in a ViT, the windows in a Swin
    H  heads      Q  queries and K keys of a group      D  a head's channels

A token's place is its number in the layer's sequence: tokens without a place in the image first (class token,
registers, global tokens; `prefix` of them), then the patches, row by row. -1 is padding, which is no token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from ssl_global.errors import UserError, wrong

Query = int | str | tuple[int, int] | None
PADDING = -1
AT_ONCE = 2**22  # weights in memory at a time: 16 MB of float32 (ours)


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """The attention of one layer for a batch of images.

    path         of the module, in the model that was looked at; a global-token mixer has two, .read and .write
    query        (B, G, H, Q, D), multiplied by the layer's scale
    key          (B, G, H, K, D)
    biases       each is added to query . key; broadcasts to (B, G, H, Q, K)
    allowed      bool, broadcasts like the biases: which pairs the mask lets attend; None: all
    queries      int64 (G, Q): place of each query
    keys         int64 (G, K): place of each key
    grid         rows and columns of the patches; None: not known, as when hidden patches were left out
    prefix       tokens before the patches
    class_token  whether the first of these is one
    stride       height and width of a patch, in pixels
    """

    path: str
    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)
    biases: tuple[Tensor, ...] = field(default=(), repr=False)
    allowed: Tensor | None = field(default=None, repr=False)
    queries: Tensor = field(repr=False)
    keys: Tensor = field(repr=False)
    grid: tuple[int, int] | None
    prefix: int
    class_token: bool
    stride: tuple[float, float]

    # ------------------------------------------------------------------------------------------------------- weights

    def weights(self) -> Tensor:
        """(B, G, H, Q, K), float32 or wider: what each query gives to each key, in 0..1; each row sums to 1.

        A ViT has one group: `layer.weights()[:, 0]` is the (B, H, N, N) of the books. Takes that much memory; for
        large maps see `chunks`.
        """
        wide = torch.promote_types(self.query.dtype, torch.float32)
        with torch.autocast(self.query.device.type, enabled=False):
            logits = self.query.to(wide) @ self.key.to(wide).transpose(-2, -1)
        for bias in self.biases:
            logits = logits + bias.to(wide)
        return logits.softmax(-1)

    def chunks(self) -> Iterator[tuple["LayerMap", Tensor]]:
        """All queries in turn, as many at once as AT_ONCE allows: the layer cut down to them, and their weights."""
        images, groups, heads, queries, _ = self.query.shape
        row = images * heads * self.key.shape[3]
        queries_at_once = min(queries, max(1, AT_ONCE // row))
        groups_at_once = max(1, AT_ONCE // (row * queries))
        for some_groups in spans(groups, groups_at_once):
            for some_queries in spans(queries, queries_at_once):
                part = self.part(some_groups, some_queries)
                yield part, part.weights()

    def part(self, groups: Tensor | None, queries: Tensor | None) -> "LayerMap":
        """Some groups and, in each, some queries, with all their keys; int64 in 0..G-1 and 0..Q-1, None: all."""

        def pairs(x: Tensor) -> Tensor:  # of what broadcasts to (B, G, H, Q, K)
            return chosen(chosen(x, 1, groups, shared=True), 3, queries, shared=True)

        return replace(
            self,
            query=chosen(chosen(self.query, 1, groups), 3, queries),
            key=chosen(self.key, 1, groups),
            biases=tuple(pairs(bias) for bias in self.biases),
            allowed=None if self.allowed is None else pairs(self.allowed),
            queries=chosen(chosen(self.queries, 0, groups), 1, queries),
            keys=chosen(self.keys, 0, groups),
        )

    def num_allowed(self) -> Tensor:
        """How many keys each query may attend to: broadcasts to (B, G, H, Q)."""
        if self.allowed is None:
            return torch.tensor(self.key.shape[3], device=self.key.device)
        return self.allowed.sum(-1)

    # ------------------------------------------------------------------------------------------------------ pictures

    def picture(self, query: Query = None) -> Tensor:
        """What the query looks at: (B, H, rows, cols), in 0..1. What is missing from a sum of 1 went to tokens
        without a place, or into the padding of timm's windows.

        query  None: the class token where there is one, else "mean"
               "mean": the mean over all patches; over the global tokens where only those ask
               a number: that token before the patches; 0 is the class token, registers and global tokens follow
               (row, col): that patch of `grid`

        Raises UserError for a query that this layer does not have.
        """
        rows, cols = self.known_grid()
        if not (self.keys >= self.prefix).any():
            raise UserError(
                f"{self.path}: here patches look at global tokens, not at patches; `looking_at(token)` shows who does"
            )
        asked = self.asked(query)
        received = self.empty_row()
        for part, weights in self.only(asked).chunks():
            counts = torch.isin(part.queries, asked.to(part.queries.device))
            given = (weights * counts[None, :, None, :, None]).sum(3)  # (B, G, H, K)
            received = add_at(received, part.keys, given)
        return received[:, :, self.prefix : -1].unflatten(2, (rows, cols)) / len(asked)

    def looking_at(self, token: int = 0) -> Tensor:
        """How much each patch looks at a token before the patches (class token, register, global token):
        (B, H, rows, cols), in 0..1."""
        rows, cols = self.known_grid()
        if not (self.queries >= self.prefix).any():
            raise UserError(f"{self.path}: here global tokens look at patches; `picture(token)` shows at which")
        if type(token) is not int or not 0 <= token < self.prefix:
            raise wrong("token", token, f"{self.path} has {self.prefix} tokens before the patches to look at, from 0")
        given = self.empty_row()
        for part, weights in self.chunks():
            here = (part.keys == token)[None, :, None, None, :]
            given = add_at(given, part.queries, (weights * here).sum(4))
        return given[:, :, self.prefix : -1].unflatten(2, (rows, cols))

    def known_grid(self) -> tuple[int, int]:
        if self.grid is None:
            raise UserError(f"{self.path}: the patches' places are not known, so there is no picture of them")
        return self.grid

    def asked(self, query: Query) -> Tensor:
        """The places that `query` means, int64 (number of them,)."""
        places = self.queries.unique()
        if query is None:
            query = 0 if self.class_token else "mean"
        if query == "mean":
            patches = places[places >= self.prefix]
            return patches if len(patches) else places[places != PADDING]
        place = place_of(query, self.grid, self.prefix, at=self.path)
        if place not in places:
            asking = "patches" if (places >= self.prefix).any() else "global tokens"
            raise wrong("query", query, f"in {self.path} only {asking} ask")
        return torch.tensor([place], device=places.device)

    def only(self, asked: Tensor) -> "LayerMap":
        """Cut down to the groups and queries that hold what is asked for."""
        here = torch.isin(self.queries, asked)
        return self.part(here.any(1).nonzero()[:, 0], here.any(0).nonzero()[:, 0])

    def empty_row(self) -> Tensor:
        """(B, H, tokens + 1) of zeros: something for every token of the sequence, and for padding, the last."""
        images, _, heads = self.query.shape[:3]
        wide = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.new_zeros(images, heads, self.prefix + prod(self.known_grid()) + 1, dtype=wide)


def place_of(query: Query, grid: tuple[int, int] | None, prefix: int, *, at: str) -> int:
    """The place of one token. Raises UserError if there is none."""
    if isinstance(query, int) and not isinstance(query, bool):
        if not 0 <= query < prefix:
            tokens = f"tokens 0 to {prefix - 1} stand" if prefix else "no tokens stand"
            raise wrong("query", query, f"in {at} {tokens} before the patches")
        return query
    if not isinstance(query, tuple | list) or len(query) != 2 or not all(isinstance(n, int) for n in query):
        raise wrong("query", repr(query), 'None, "mean", the number of a token, or (row, col) of a patch')
    if grid is None:
        raise wrong("query", query, f"in {at} the patches' places are not known")
    (row, col), (rows, cols) = query, grid
    if not (0 <= row < rows and 0 <= col < cols):
        raise wrong("query", query, f"outside of the grid of {at}: rows 0 to {rows - 1}, columns 0 to {cols - 1}")
    return prefix + row * cols + col


def add_at(row: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Adds to (B, ..., tokens + 1), at places (G, M), the values (B, G, ..., M)."""
    values = values.movedim(1, -2).flatten(-2)  # (B, ..., G * M)
    return row.index_add(-1, places.flatten() % row.shape[-1], values)  # -1 becomes the last


def chosen(x: Tensor, dim: int, index: Tensor | None, *, shared: bool = False) -> Tensor:
    """shared: along a dimension that broadcasts, the one value is everybody's."""
    if index is None or (shared and x.shape[dim] == 1):
        return x
    return x.index_select(dim, index.to(x.device))


def spans(total: int, at_once: int) -> list[Tensor | None]:
    """0..total-1 in pieces; None: all at once."""
    return [None] if at_once >= total else list(torch.arange(total).split(at_once))
