"""What fine-tuning for classes and for pixels have in common: what of a network is trained when, and at which rate.

Modes: `full` trains all; `probe` trains what is new (classifier or head, attention modules, pooling) on a backbone that
stays what it was, norms and all; `gradual` does so for the first `frozen_epochs`, then trains all.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssl_global.errors import wrong
from ssl_global.methods.method import Method
from ssl_global.recipe import MethodConfig, not_longer_than_run
from ssl_global.schedules import Progress

if TYPE_CHECKING:
    from ssl_global.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TunedConfig(MethodConfig):
    classes: tuple[str, ...] = ()  # their names; from the data, if there are none
    mode: Literal["full", "probe", "gradual"] = "full"  # what is trained: all, what is new, or that first and then all
    frozen_epochs: float = 0.0  # of gradual: how long the backbone waits
    layer_decay: float = 0.65  # a layer's rate is the next one's times this; 1: all the same
    gate_lr_times: float = 10.0  # gates of attention modules learn so much faster than the rest (ours)

    def check(self, recipe: "Recipe") -> None:
        if recipe.data.reader == "stream":
            raise wrong("data.reader", "stream", "fine-tuning counts its classes first; indexed would be right")
        views = recipe.views
        if views.globals.count != 1 or views.locals.count:
            raise wrong("views.globals.count", views.globals.count, "1, and no local views: one view is learnt from")
        if not 0 < self.layer_decay <= 1:
            raise wrong("method.layer_decay", self.layer_decay, "above 0, at most 1")
        if self.gate_lr_times <= 0:
            raise wrong("method.gate_lr_times", self.gate_lr_times, "above 0")
        if (self.mode == "gradual") != (self.frozen_epochs > 0):
            raise wrong("method.frozen_epochs", self.frozen_epochs, "above 0 for method.mode gradual, 0 for the others")

    def check_durations(self, epochs: float) -> None:
        not_longer_than_run("method.frozen_epochs", self.frozen_epochs, epochs)


class Tuned(Method):
    """A method that trains `model`, whose `new_parts()` did not come with the weights."""

    config: TunedConfig

    def __init__(self, config: TunedConfig, model: Any) -> None:
        super().__init__()
        self.config, self.model = config, model
        self.frozen = config.mode == "probe"
        if self.frozen:
            model.requires_grad_(False)
            for part in model.new_parts():
                part.requires_grad_(True)

    def begin_step(self, progress: Progress) -> None:
        self.frozen = self.config.mode == "probe" or progress.epoch < self.config.frozen_epochs
        self.model.train(not self.frozen)  # batch norms of a frozen backbone stay what they were
        for part in self.model.new_parts():
            part.train()

    def gradients_done(self, progress: Progress) -> None:
        if self.frozen:
            new = {id(parameter) for part in self.model.new_parts() for parameter in part.parameters()}
            for parameter in self.model.parameters():
                if id(parameter) not in new:
                    parameter.grad = None
