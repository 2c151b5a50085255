"""What was packed, in figures: of a shard while it is written, of all of them at the end, and for people."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from ssl_global.data.examine import Examined
from ssl_global.data.files import read_json
from ssl_global.data.source import Source, counted

SHARD_NUMBER = r"-\d{6,}\.tar"
FEW = 3  # broken images and duplicates that are named to people (ours)


@dataclass
class Figures:
    """A shard's share of the summary: sums over its images, in their order."""

    images: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    measured: int = 0  # images that have colours
    moments: list[list[float]] = field(default_factory=lambda: [[0.0] * 3, [0.0] * 3])
    digests: list[str] = field(default_factory=list)  # of the source's bytes, of each image that is not broken
    broken: list[tuple[int, str]] = field(default_factory=list)  # (number, reason)

    def add(self, image: Examined, digest: str, labels: Sequence[int]) -> None:
        self.images += 1
        self.formats[image.format] += 1
        self.modes[image.mode] += 1
        self.widths[image.width] += 1
        self.heights[image.height] += 1
        self.labels.update(labels)
        if image.moments is not None:
            self.measured += 1
            self.moments = (np.array(self.moments) + image.moments).tolist()
        self.digests.append(digest)

    def join(self, later: "Figures") -> None:
        """Adds another shard's, read from its file, where a Counter's numbers have become words; no digests."""
        self.images += later.images
        self.measured += later.measured
        self.moments = (np.array(self.moments) + later.moments).tolist()
        self.formats.update(later.formats)
        self.modes.update(later.modes)
        for name in ("widths", "heights", "labels"):
            getattr(self, name).update({int(value): count for value, count in getattr(later, name).items()})
        self.broken += later.broken


def duplicates(images: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """int64 (M, 2): each image, int64 (N,), whose digest, uint64 (N, 2), an earlier one has, and the first of these."""
    order = np.lexsort(digests.T)  # stable: equal ones stay in the order of their images
    ordered = digests[order]
    again = np.append([False], (ordered[1:] == ordered[:-1]).all(axis=1))[: len(order)]
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    pairs = images[np.stack([order, order[first]], axis=1)[again]]
    return pairs[np.argsort(pairs[:, 0])]


def spread(counts: Counter[int]) -> dict[str, float] | None:
    if not counts:
        return None
    values = np.array(sorted(counts))
    median = float(np.median(np.repeat(values, [counts[value] for value in values.tolist()])))
    return {"min": int(values[0]), "median": median, "max": int(values[-1])}


def by_class(source: Source, labels: Counter[int]) -> dict[str, int] | None:
    if source.labels is None and source.sets is None:
        return None
    if source.classes is None:
        return {str(label): labels[label] for label in sorted(labels)}
    return {name: labels[label] for label, name in enumerate(source.classes)}


def read_summary(shards: Sequence[str]) -> dict[str, Any] | None:
    """Number of images, mean and deviation of these shards, as `pack` wrote them down.

    None if one of them has no summary beside it, or if they are not all that it is of.
    """
    packs: dict[tuple[Path, str], set[Path]] = {}
    for shard in map(Path, map(os.path.abspath, shards)):
        if not (parts := re.fullmatch("(.+)" + SHARD_NUMBER, shard.name)):
            return None
        packs.setdefault((shard.parent, parts[1]), set()).add(shard)
    found = [summary_of(folder, name, members) for (folder, name), members in sorted(packs.items())]
    summaries = [summary for summary in found if summary is not None]
    if not summaries or len(summaries) < len(found):
        return None
    images = np.array([summary["images"] for summary in summaries])
    means, stds = (np.array([summary[name] for summary in summaries]) for name in ("mean", "std"))
    mean = images @ means / images.sum()
    # Each pack's deviation is around its own mean.
    std = np.sqrt(images @ (stds**2 + (means - mean) ** 2) / images.sum())
    return {"images": int(images.sum()), "mean": mean.tolist(), "std": std.tolist()}


def summary_of(folder: Path, name: str, shards: set[Path]) -> dict[str, Any] | None:
    """If it has colours, and is of just these shards and of their present sizes."""
    summary = read_json(folder / f"{name}-summary.json")
    try:
        if not summary or summary["mean"] is None or shards != set(shards_named(folder, name)):
            return None
        now = (len(shards), sum(shard.stat().st_size for shard in shards))
        if now != (summary["shards"], summary["bytes"]) or not 0 < summary["images"] < 2**53:
            return None
        colours = np.array([summary["mean"], summary["std"]], dtype=np.float64)
        return summary if colours.shape == (2, 3) and ((colours >= 0) & (colours <= 1)).all() else None
    except (KeyError, OSError, TypeError, ValueError, OverflowError):  # a stranger's may hold anything
        return None


def describe(summary: dict[str, Any]) -> str:
    """For people, in a few lines."""
    formats, modes = (", ".join(f"{n} {kind}" for kind, n in summary[name].items()) for name in ("formats", "modes"))
    sides = [
        f"{name} {s['min']} to {s['max']}, median {s['median']:g}"
        for name in ("width", "height")
        if (s := summary[name])
    ]
    lines = [
        f"{counted(summary['images'], 'image')} in {counted(summary['shards'], 'shard')}, {decimal(summary['bytes'])}",
        f"formats: {formats}; modes: {modes}",
        "; ".join(sides),
    ]
    if summary["mean"]:
        mean, std = (" ".join(f"{value:.4f}" for value in summary[name]) for name in ("mean", "std"))
        lines.append(f"mean {mean}, std {std}")
    if summary["classes"]:
        sizes = summary["classes"].values()
        lines.append(f"{counted(len(sizes), 'class', 'classes')} of {min(sizes)} to {max(sizes)} images")
    broken = [f"{bad['image']} ({bad['reason']})" for bad in summary["broken"]]
    same = [f"{pair['image']} = {pair['same_as']}" for pair in summary["duplicates"]]
    if broken:
        lines.append(f"left out, broken: {first_few(broken, summary['num_broken'])}")
    if same:
        lines.append(f"there twice, kept: {first_few(same, summary['num_duplicates'])}")
    return "\n".join(lines)


def first_few(named: list[str], total: int) -> str:
    more = f", and {total - FEW} more" if total > FEW else ""
    return f"{total}: " + ", ".join(map(printable, named[:FEW])) + more


def printable(name: str) -> str:
    """A file's name may hold anything, also what no terminal takes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def shards_named(folder: Path, name: str) -> list[Path]:
    pattern = re.compile(re.escape(name) + SHARD_NUMBER)
    return sorted(folder / file for file in os.listdir(folder) if pattern.fullmatch(file))
