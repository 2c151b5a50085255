"""Attention pooling where timm has none: a learned query looks at all places of a feature map (Zhai et al. 2022,
https://arxiv.org/abs/2106.04560, appendix: the MAP head; Lee et al. 2019, https://arxiv.org/abs/1810.00825).

timm's ViTs have it as global_pool = "map". Here the same module of timm's takes the place of the average in any model
that averages a map with timm's own layer: ResNet, ConvNeXt, Swin, EfficientNet, global_swin_* and most others. What
stands behind the average (norm, dropout, classifier) stands behind it as before.

Ours: a LayerNorm before it, since a convolutional network's map comes in any scale.
"""

import torch
from timm.layers import AttentionPoolLatent, SelectAdaptivePool2d
from torch import Tensor, nn

from ssl_global.attention.base import heads_for


class AttentionPool(nn.Module):
    """(B, C, H, W), or (B, H, W, C) if `channels_last`, to (B, C), or to a map of one place unless `flat`.

    replaced  timm's name of the pooling in whose place it stands, which timm asks for
    """

    def __init__(self, channels: int, *, channels_last: bool, flat: bool, replaced: str) -> None:
        super().__init__()
        self.channels_last, self.flat, self.pool_type = channels_last, flat, replaced
        self.norm = nn.LayerNorm(channels)
        self.attention = AttentionPoolLatent(channels, num_heads=heads_for(channels), norm_layer=nn.LayerNorm)

    # timm's heads ask their pooling for these two.

    def feat_mult(self) -> int:
        """How many times as wide as the map the answer is."""
        return 1

    def is_identity(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(1, 2) if self.channels_last else x.flatten(2).mT
        pooled: Tensor = self.attention(self.norm(places))
        if self.flat:
            return pooled
        return pooled[:, None, None] if self.channels_last else pooled[:, :, None, None]


def attention_pool(model: nn.Module) -> AttentionPool | None:
    """The one that is in the model."""
    return next((part for part in model.modules() if isinstance(part, AttentionPool)), None)


def pool_by_attention(model: nn.Module) -> AttentionPool:
    """Puts one into timm's model in the place of its average, and returns it. Raises ValueError if there is none."""
    found = [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, SelectAdaptivePool2d) and name.rpartition(".")[2] == "global_pool" and part.pool_type
    ]
    if len(found) != 1 or getattr(model, "global_pool", None) == "token":
        raise ValueError(f"{type(model).__name__} has no average of a map that attention could take the place of")
    name, average = found[0]
    left = average(torch.zeros(1, 2, 3, 5, device="cpu")).shape  # it does not say which are its channels
    channels: int = model.num_features  # type: ignore[assignment]
    pool = AttentionPool(channels, channels_last=left[-1] == 5, flat=len(left) == 2, replaced=average.pool_type)
    model.set_submodule(name, pool)
    return pool
