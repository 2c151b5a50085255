"""ResNet-18 for images of 32 pixels: a first convolution of 3 x 3 at stride 1, no pooling behind it (He et al. 2015,
https://arxiv.org/abs/1512.03385, section 4.2, as everyone has it for CIFAR since; 11.17 M parameters with ten classes).

timm knows it as `resnet18_small` once ssl_global is imported. All else is timm's ResNet, whose
block_args={"attn_layer": "se"} puts a module into each block before its addition.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

STRIDE = 4  # of the stem that is left out


class SmallResNet(ResNet):
    feature_info: list[dict[str, Any]]
    conv1: Any
    maxpool: Any

    def __init__(self, block: type[BasicBlock], layers: tuple[int, ...], in_chans: int = 3, **options: Any) -> None:
        super().__init__(block, layers, in_chans=in_chans, **options)  # type: ignore[arg-type]  # an instance, it says
        first = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
        self.conv1, self.maxpool = first, nn.Identity()
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // STRIDE)


# By this name timm looks for it in the file of a model.
default_cfgs = generate_default_cfgs(
    {
        "resnet18_small.untrained": {
            "input_size": (3, 32, 32), "pool_size": (4, 4), "num_classes": 10, "first_conv": "conv1",
            "classifier": "fc", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0,
            "interpolation": "bicubic",
        }
    }
)  # fmt: skip


@register_model
def resnet18_small(pretrained: bool = False, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"block": BasicBlock, "layers": (2, 2, 2, 2)} | options
    model: nn.Module = build_model_with_cfg(SmallResNet, "resnet18_small", pretrained, **settings)
    return model
