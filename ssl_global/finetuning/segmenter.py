"""A backbone's maps, attention modules if they are wanted, and a head: images to a class for each pixel."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ssl_global.attention.attach import Attachment, attach
from ssl_global.encoders.encoder import Encoder
from ssl_global.encoders.pretrained import create
from ssl_global.errors import UserError
from ssl_global.finetuning import heads
from ssl_global.finetuning.heads.auxiliary import AuxiliaryHead
from ssl_global.finetuning.pyramid import Features


@dataclass(frozen=True, kw_only=True)
class SegmenterSpec:
    """All that it takes to build one again, as JSON can hold it."""

    architecture: str
    model_args: dict[str, Any]
    classes: tuple[str, ...]
    channels: int
    pixels: int  # side of the images that it is trained on
    head: str
    auxiliary: bool
    width: int | None = None  # channels of head and pyramid; None: their own
    drop_path: float = 0.0
    attention: dict[str, Any] = field(default_factory=dict)  # by place, as attach takes it


class Network(nn.Module):
    """(B, C, H, W), any H and W -> logits (B, K, H, W)."""

    def __init__(self, spec: SegmenterSpec) -> None:
        super().__init__()
        try:
            backbone = create(spec.architecture, spec.drop_path, features_only=True, **spec.model_args)
        except (TypeError, AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"encoder.name = {spec.architecture}: gives no maps: {error}") from error
        try:
            if spec.attention:
                attach(backbone, spec.attention, input_size=(spec.channels, spec.pixels, spec.pixels))
            kind = heads.head_class(spec.head)
            width: dict[str, Any] = {} if spec.width is None else {"width": spec.width}
            self.features = Features(backbone, pyramid=kind.joins_scales, **width)
            sizes = self.features.channels, self.features.strides, len(spec.classes)
            self.head = heads.build(spec.head, *sizes, **(width if kind.has_width else {}))
            self.auxiliary = AuxiliaryHead(*sizes, **width) if spec.auxiliary else None
        except ValueError as error:
            raise UserError(str(error)) from error

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return self.features.to_image(self.head(self.features(images)).main, (height, width))

    def all_logits(self, images: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The main ones, the head's auxiliary ones, and the auxiliary head's, all at the images' size."""
        height, width = images.shape[-2:]
        maps, size = self.features(images), (height, width)
        said = self.head(maps)
        beside = [] if self.auxiliary is None else [self.auxiliary(maps)]
        main, *others = (self.features.to_image(x, size) for x in (said.main, *said.auxiliary, *beside))
        return main, others[: len(said.auxiliary)], others[len(said.auxiliary) :]


class Segmenter(Encoder):
    """See `Encoder`, of which it is the part that has a model with classes: it says nothing of a whole image."""

    model: Network

    def __init__(self, spec: SegmenterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Network(spec)
        self.architecture, self.model_args, self.classes = spec.architecture, spec.model_args, spec.classes
        self.pixels, self.channels = spec.pixels, spec.channels
        self.width = self.first_width = self.model.features.channels[-1]
        self.patch = 0

    @property
    def backbone(self) -> Any:
        return self.model.features.backbone

    @property
    def attachment(self) -> Attachment:
        return Attachment(self.backbone)

    def new_parts(self) -> list[nn.Module]:
        parts = [self.model.head, self.model.auxiliary, self.model.features.simple]
        return [part for part in parts if part is not None] + list(self.attachment.places.values())

    def recompute_activations(self) -> None:
        self.backbone.set_grad_checkpointing(True)
