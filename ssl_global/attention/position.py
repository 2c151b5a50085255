"""DANet's position attention: each place gathers from those that are like it (Fu et al. 2019, https://arxiv.org/abs/1809.02983).

As the authors' code: logits are not scaled. Their N x N map is not kept: torch's fused attention computes the same.
"""

from torch import Tensor, nn

from ssl_global.attention.base import Residual, Start, fused_attention


class PositionAttention(Residual):
    """reduction: channels of query and key are all divided by this, at least one."""

    def __init__(self, channels: int, *, reduction: int = 8, start: Start = "identity") -> None:
        super().__init__(channels, start, paper_gamma=0.0)
        if reduction < 1:
            raise ValueError(f"position: reduction = {reduction}: at least 1; the paper's is 8")
        narrow = max(1, channels // reduction)
        self.query, self.key = nn.Conv2d(channels, narrow, 1), nn.Conv2d(channels, narrow, 1)
        self.value = nn.Conv2d(channels, channels, 1)

    def branch(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).flatten(2).transpose(1, 2)[:, None] for part in (self.query, self.key, self.value))
        gathered = fused_attention(query, key, value, scale=1.0)  # (B, 1, N, C)
        return gathered[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
