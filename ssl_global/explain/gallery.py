"""What a run looks at while it learns: always the same few images, their pictures, and how attention is doing.

It draws no random number, and leaves no hook and no mode behind: a run that is looked at learns bit for bit what it
would (tests/training/test_looking.py). Only the main process looks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image

from ssl_global.data.source import Source
from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import UserError
from ssl_global.explain.maps import in_evaluation
from ssl_global.explain.monitor import AttentionMonitor
from ssl_global.explain.pictures import unnormalised
from ssl_global.explain.reconstruction import reconstruction_sheet
from ssl_global.explain.sheets import Shown, attention_sheet, colours_sheet, evenly, likeness_sheet, squares
from ssl_global.methods.mae import Mae
from ssl_global.methods.method import Method
from ssl_global.recipe import Recipe


@dataclass
class Looked:
    """figures for trackers, pictures by name, what is wrong in words, and the seconds that it took."""

    figures: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Gallery:
    """
    source  of the images: those to judge with, or to learn from
    """

    def __init__(self, recipe: Recipe, source: Source, device: torch.device) -> None:
        self.recipe, self.source, self.device = recipe, source, device
        self.shown: list[Shown] = []
        self.without: set[str] = set()  # pictures that there are not of this backbone
        self.said: set[str] = set()  # what was warned of at the last look: it is not said again

    def due(self, step: int, *, end: bool) -> bool:
        """Whether step is one after which something is looked at; all processes say the same."""
        return self.pictures_due(step, end=end) or self.attention_due(step, end=end)

    def pictures_due(self, step: int, *, end: bool) -> bool:
        every = self.recipe.explain.every
        return every is not None and (end or step % every == 0)

    def attention_due(self, step: int, *, end: bool) -> bool:
        every = self.recipe.explain.attention_every
        return every is not None and (end or step % every == 0)

    def look(self, encoder: Encoder, method: Method | None, step: int, *, end: bool, trained: bool) -> Looked:
        """
        encoder  whole, on the device, to be called by itself
        method   for what only it can draw; None where it is sharded: one process alone cannot call it
        trained  whether warnings make sense: an untrained model attends uniformly
        """
        began, looked = time.perf_counter(), Looked()
        if not self.shown:
            self.tried("image", lambda: self.read(encoder.pixels), looked)
        shown = self.shown
        if shown and self.attention_due(step, end=end):
            self.tried("attention figures", lambda: self.watch(encoder, shown, looked, trained), looked)
        if shown and self.pictures_due(step, end=end):
            for name, draw in self.sheets(encoder, method, shown).items():
                self.tried(name, partial(hang, looked, name, draw), looked)
        looked.seconds = time.perf_counter() - began
        looked.figures["explain_seconds"] = looked.seconds
        return looked

    def read(self, pixels: int) -> None:
        numbers = evenly(len(self.source), self.recipe.explain.images)
        self.shown = squares(self.source, numbers, data=self.recipe.data, pixels=pixels, device=self.device)

    def sheets(
        self, encoder: Encoder, method: Method | None, shown: list[Shown]
    ) -> dict[str, Callable[[], Image.Image]]:
        of_method: dict[str, Callable[[], Image.Image]]
        of_method = {"rebuilt": partial(self.rebuilt, method, shown)} if isinstance(method, Mae) else {}
        return {
            "attention": partial(attention_sheet, encoder.model, shown),
            "colours": partial(colours_sheet, encoder.model, shown),
            "likeness": partial(likeness_sheet, encoder.model, shown),
        } | of_method

    def tried(self, name: str, look: Callable[[], object], looked: Looked) -> None:
        """What cannot be looked at is said once, and the run goes on."""
        if name in self.without:
            return
        try:
            look()
        except Exception as error:  # of any kind: weeks of training do not end for a picture
            self.without.add(name)
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            looked.warnings.append(f"no {name} is shown: {kind}{error}")

    def watch(self, encoder: Encoder, shown: list[Shown], looked: Looked, trained: bool) -> None:
        monitor = AttentionMonitor(encoder.model, images=len(shown))
        with in_evaluation(encoder), torch.no_grad(), monitor.watching():
            encoder.model(torch.cat([one.x for one in shown]))
        looked.figures |= monitor.figures(heads=True)
        if trained:
            found = {line.partition(":")[0]: line for line in monitor.warnings()}
            looked.warnings += [line for what, line in found.items() if what not in self.said]
            self.said = set(found)

    def rebuilt(self, method: Mae, shown: list[Shown]) -> Image.Image:
        mean, std = self.recipe.data.normalisation
        images = unnormalised(torch.cat([one.x for one in shown]), mean, std).clamp(0, 1)
        return reconstruction_sheet(method, images, mean=mean, std=std, side=128)


def hang(looked: Looked, name: str, draw: Callable[[], Image.Image]) -> None:
    looked.pictures[name] = draw()
