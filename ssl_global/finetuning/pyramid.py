"""A backbone's features as maps (B, C, H, W), fine to coarse, whatever its family.

    backbone = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, strict_img_size=False)
    features = Features(backbone)                               # features.channels, features.strides
    maps = features(images)                                     # of an image padded to a multiple of features.multiple
    logits = features.to_image(head(maps).main, images.shape[-2:])  # enlarged, and the padding cut off

Hierarchical backbones give their last four maps. Those of one resolution (ViT) give ViTDet's simple pyramid of their
last map (Li et al. 2022, https://arxiv.org/abs/2203.16527, section 3): at a quarter of the stride, half of it, the same
and twice, by transposed convolutions, nothing, and max pooling; then as in the authors' code 1 x 1 and 3 x 3
convolutions with norms. A head that looks at one map is better served by the ViT's own (pyramid=False), and of a
convolutional backbone wants a finer last map than one of stride 32: timm's output_stride=8, as PSPNet and its kin have.

Transformers and ConvNeXt normalise what goes into a block and not what comes out, so their maps grow with the depth.
Each is normalised over its channels, as Swin's and ConvNeXt's authors do for segmentation. Not as there: without a
weight and a bias, which the convolution behind it can learn, so that maps no head looks at leave no parameter without a
gradient.
"""

import math

import torch.nn.functional as F
from timm.layers import LayerNorm2d, RmsNorm
from torch import Tensor, nn

MAPS = 4  # hierarchical backbones have one at stride 2 before these, or none


class Features(nn.Module):
    """
    backbone    a timm model made with features_only=True, for images of any size that `multiple` divides: Swin with
                strict_img_size=False, ViT with dynamic_img_size=True
    pyramid     False: a backbone of one resolution gives the maps that it has
    norm        whether maps are normalised; None: where the backbone's own norms are layer norms
    width       channels of the simple pyramid's maps, the paper's

    channels, strides   of the maps; a stride is in pixels
    multiple            of which the height and the width of images are made, see `forward`
    """

    def __init__(
        self, backbone: nn.Module, *, pyramid: bool = True, norm: bool | None = None, width: int = 256
    ) -> None:
        super().__init__()
        if not hasattr(backbone, "feature_info"):
            raise ValueError(f"{type(backbone).__name__}: gives no maps; make it with features_only=True")
        self.backbone = backbone
        self.norm = has_layer_norms(backbone) if norm is None else norm
        self.channels_last = str(getattr(getattr(backbone, "output_fmt", None), "value", "NCHW")) == "NHWC"
        self.own_channels: list[int] = backbone.feature_info.channels()[-MAPS:]  # type: ignore[operator, union-attr]
        own_strides: list[int] = backbone.feature_info.reduction()[-MAPS:]  # type: ignore[operator, union-attr]
        self.simple: SimplePyramid | None = None
        self.channels, self.strides = list(self.own_channels), [float(stride) for stride in own_strides]
        if pyramid and len(set(own_strides)) == 1:
            self.simple = SimplePyramid(self.own_channels[-1], width)
            self.channels, self.strides = [width] * MAPS, [own_strides[-1] * scale for scale in SCALES]
        self.multiple = math.lcm(*own_strides, math.ceil(self.strides[-1]))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, channels, height, width), any -> maps of the image with zeros, which after standardising is the mean
        colour, below and to the right of it: nothing of it is cut off, and a map's place is `stride` pixels."""
        height, width = self.padded_size(*images.shape[-2:])
        images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        maps = [self.as_map(x, channels) for x, channels in zip(self.own_maps(images), self.own_channels, strict=True)]
        return maps if self.simple is None else self.simple(maps[-1])

    def to_image(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, K, h, w) of the padded image -> (B, K, *size) of the image: enlarged, bilinear, and cut."""
        enlarged = F.interpolate(logits, size=self.padded_size(*size), mode="bilinear", align_corners=False)
        return enlarged[..., : size[0], : size[1]]

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        return tuple(math.ceil(n / self.multiple) * self.multiple for n in (height, width))  # type: ignore[return-value]

    def own_maps(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.backbone(images)
        return maps[-MAPS:]

    def as_map(self, x: Tensor, channels: int) -> Tensor:
        last = x if self.channels_last else x.permute(0, 2, 3, 1)
        if last.shape[-1] != channels:
            raise ValueError(
                f"{type(self.backbone).__name__}: gives {tuple(x.shape)} where it says {channels} channels"
            )
        if self.norm:
            last = F.layer_norm(last, (channels,)).to(x.dtype)
        return last.permute(0, 3, 1, 2)


SCALES = (0.25, 0.5, 1, 2)


class SimplePyramid(nn.Module):
    """(B, channels, H, W) -> four maps of `width` channels: of 4 H, 2 H, H and H // 2 rows."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half, quarter = max(1, channels // 2), max(1, channels // 4)
        self.levels = nn.ModuleList(
            nn.Sequential(*scale, *rejoin(channels_then, width))
            for channels_then, scale in (
                (quarter, (doubled(channels, half), LayerNorm2d(half), nn.GELU(), doubled(half, quarter))),
                (half, (doubled(channels, half),)),
                (channels, ()),
                (channels, (nn.MaxPool2d(2),)),
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(x) for level in self.levels]


def doubled(channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, out_channels, 2, stride=2)


def rejoin(channels: int, width: int) -> list[nn.Module]:
    point, near = nn.Conv2d(channels, width, 1, bias=False), nn.Conv2d(width, width, 3, padding=1, bias=False)
    return [point, LayerNorm2d(width), near, LayerNorm2d(width)]


def has_layer_norms(backbone: nn.Module) -> bool:
    return any(isinstance(part, nn.LayerNorm | RmsNorm) for part in backbone.modules())
