"""Global-local consistency: a global view of an image must find the image's local views among those of all images, and
a local view the global ones (methods/consistency_loss.py).

The loss is the sources' (there with one direction, without the other processes, and with an image's own crops among
the negatives), on the road of SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709): encoder, projector that is
thrown away, cosines over a temperature. There is no teacher: both views are seen by the one encoder that learns.

Negatives are the images that all processes look at at once. Where a batch is accumulated in parts, those are the
images of a part: unlike DINO, the loss of `train.micro_batch` 64 is not that of 256. (The processes' parts of one
moment do count together, so more processes with smaller parts change nothing.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_global.encoders.encoder import Encoder
from ssl_global.errors import wrong
from ssl_global.methods.consistency_loss import consistency_loss, refuse_auto
from ssl_global.methods.heads import Projector
from ssl_global.methods.method import Batch, Method
from ssl_global.methods.multi_crop import tokens_of
from ssl_global.recipe import MethodConfig, Recipe
from ssl_global.schedules import Progress


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(MethodConfig):
    temp: float = 0.1  # divides the cosines of views
    projector_hidden: int = 2048  # width of the projector's hidden layer
    projector_width: int = 128  # width that views are compared in

    def check(self, recipe: Recipe) -> None:
        if self.temp <= 0:
            raise wrong("method.temp", self.temp, "above 0; the sources' is 0.1")
        for name in ("projector_hidden", "projector_width"):
            if getattr(self, name) < 1:
                raise wrong(f"method.{name}", getattr(self, name), "at least 1")
        if recipe.views.locals.count < 1:
            raise wrong("views.locals.count", recipe.views.locals.count, "at least 1: global views find local ones")
        if recipe.train.global_batch < 2:
            raise wrong("train.global_batch", recipe.train.global_batch, "at least 2: other images are the negatives")
        refuse_auto(recipe)

    def images_together(self) -> int:
        return 2  # an image alone has no negatives

    def build(self, recipe: Recipe) -> "Consistency":
        return Consistency(self, recipe.encoder.build(recipe), num_global_views=recipe.views.globals.count)


class Consistency(Method):
    def __init__(self, config: ConsistencyConfig, encoder: Encoder, *, num_global_views: int) -> None:
        super().__init__()
        self.config = config
        self.num_global_views = num_global_views
        self.encoder = encoder
        self.projector = Projector(encoder.width, hidden=config.projector_hidden, out=config.projector_width)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        views = batch["views"]
        summary = torch.cat([tokens.summary for tokens in tokens_of(self.encoder, views)])
        projected_VBD = self.projector(summary).unflatten(0, (len(views), -1))
        num_global = self.num_global_views
        return {"loss": consistency_loss(projected_VBD[:num_global], projected_VBD[num_global:], temp=self.config.temp)}

    def speaks_in_forward(self) -> bool:
        return True

    def backbones(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}
