"""What the loop asks of every method, and nothing more: the loop knows no teacher, no mask and no label."""

from typing import TYPE_CHECKING, NotRequired, TypedDict

from torch import Tensor, nn

from ssl_global.encoders import weights as from_weights
from ssl_global.encoders.encoder import Encoder
from ssl_global.schedules import Progress

if TYPE_CHECKING:
    from ssl_global.recipe import Recipe


class Batch(TypedDict):
    """What a method is given: the images of one process, or a part of them."""

    views: list[Tensor]  # float (B, C, H, W), normalised, global views first
    seed: Tensor  # int64 (B,): a function of the run's seed, the epoch and the sample, on the device
    seeds: list[int]  # the same on the CPU
    key: list[str]  # names of the samples
    label: Tensor  # int64 (B,); -1 where there is none
    mask: Tensor | None  # int64 (B, H, W), a class for each pixel of the first view, 255: does not count
    student_views: NotRequired[range]  # of a piece of a batch: those of `views` that the student looks at


class ParameterGroup(TypedDict):
    """Parameters that learn alike."""

    params: list[nn.Parameter]
    decays: bool  # whether weight decay is for them
    lr_scale: float  # their learning rate is the step's times this


class Method(nn.Module):
    """Owns all that is learnt or averaged: encoders, heads, centre. One module, since Accelerate prepares one.

    In a step the loop calls begin_step, then forward (once, or once for each piece of each part of the batch) with
    backward, gradients_done, and after the optimizer after_step. A step whose loss or gradient is not finite ends
    before after_step: whatever forward has kept of it must be dropped by the next begin_step.
    """

    def looks_ahead(self) -> bool:
        """Whether forward must know all parts of a step's batch: where there are several, the loop then calls
        forward(batch, progress, ahead=True) with each of them, without gradient, before the first one's turn."""
        return False

    def speaks_in_forward(self) -> bool:
        """Whether forward waits for the other processes."""
        return self.looks_ahead()

    def fetch(self, recipe: "Recipe") -> None:
        """At every start of a run, also of one that goes on: reads what lies elsewhere and is in no checkpoint."""

    def begin_step(self, progress: Progress) -> None:
        """Before the first forward of an optimizer step."""

    def pieces(self, batch: Batch) -> list[Batch]:
        """The batch in pieces that go through forward and backward one by one, for less memory: losses and figures of
        the pieces add up to the batch's."""
        return [batch]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """{"loss": 0-d float32, the mean over the batch; ...}: other entries are 0-d figures to show."""
        raise NotImplementedError

    def gradients_done(self, progress: Progress) -> None:
        """After the last backward, before clipping: the place to withhold a gradient."""

    def after_step(self, progress: Progress) -> None:
        """After the optimizer: the place of moving averages."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """All that learns: matrices decay, biases, norms and other 1-D parameters do not."""
        learning = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in learning if p.ndim > 1], "decays": True, "lr_scale": 1.0},
            {"params": [p for p in learning if p.ndim <= 1], "decays": False, "lr_scale": 1.0},
        ]

    def new_backbone(self, recipe: "Recipe", what: str | None = None) -> Encoder:
        """One more of those that `backbones` has, with the same tensors, untrained: the one of that name, or the first
        (None)."""
        return recipe.encoder.build(recipe)

    def recipe_encoders(self) -> list[Encoder]:
        """Those that are what the recipe's encoder.* says: encoder.weights are for them, and they wait afterwards."""
        return list(self.backbones().values())

    def begin_with(self, weights: from_weights.Weights) -> list[str]:
        """Before the first step: the recipe's encoders begin with these. Returns what became of them, in lines.

        Raises UserError if they are another architecture's.
        """
        reports = [from_weights.begin(encoder, weights) for encoder in self.recipe_encoders()]
        return reports[0]

    def backbones(self) -> dict[str, Encoder]:
        """The encoders by name, the one to judge and to export first."""
        raise NotImplementedError
