"""MAE's step as published, written from He et al. 2021, https://arxiv.org/abs/2111.06377, section 3 and appendix A.1.

All patches are embedded, then those are gathered whose noise is smallest (two argsorts); the decoder has the class
token too and foretells all patches, and the loss of the visible ones is multiplied by zero. Noise is given, so that
both sides hide the same patches; tensors have the names that ours have.
"""

import torch
from torch import Tensor, nn

from benchmarks.reference.vit import Block, Vit


class Decoder(nn.Module):
    def __init__(self, encoder_width: int, *, width: int, depth: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, outputs)

    def forward(self, x: Tensor, restore_BN: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(x)
        images, visible, width = x.shape
        hidden = self.hidden_token.repeat(images, restore_BN.shape[1] + 1 - visible, 1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = torch.gather(patches, 1, restore_BN[:, :, None].repeat(1, 1, width))
        x = torch.cat([x[:, :1], patches], dim=1) + positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.predict(self.norm(x))[:, 1:]
        return out


class Mae(nn.Module):
    def __init__(self, encoder: Vit, decoder: Decoder, decoder_positions: Tensor) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.encoder.pos_embed.requires_grad_(False)
        self.register_buffer("decoder_positions", decoder_positions)  # (1, 1 + N, W), zeros for the class token

    def forward(self, images: Tensor, noise_BN: Tensor, ratio: float) -> Tensor:
        encoder = self.encoder
        x = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        shuffle_BN = noise_BN.argsort(dim=1)
        restore_BN = shuffle_BN.argsort(dim=1)
        kept = int(x.shape[1] * (1 - ratio))
        x = torch.gather(x, 1, shuffle_BN[:, :kept, None].repeat(1, 1, x.shape[2]))
        mask_BN = torch.ones(restore_BN.shape, device=x.device)
        mask_BN[:, :kept] = 0
        mask_BN = torch.gather(mask_BN, 1, restore_BN)
        token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1)
        foretold = self.decoder(encoder.run(torch.cat([token, x], dim=1)), restore_BN, self.decoder_positions)
        return self.loss(images, foretold, mask_BN)

    def loss(self, images: Tensor, foretold: Tensor, mask_BN: Tensor) -> Tensor:
        target = self.patches(images)
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
        error_BN = ((foretold - target) ** 2).mean(dim=-1)
        return (error_BN * mask_BN).sum() / mask_BN.sum()

    def patches(self, images: Tensor) -> Tensor:
        p = self.encoder.patch
        count, channels, height, width = images.shape
        x = images.reshape(count, channels, height // p, p, width // p, p)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(count, -1, p * p * channels)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """As the authors log it: a norm of each tensor, and the norm of those."""
    return torch.norm(torch.stack([torch.norm(p.grad.detach(), 2) for p in parameters if p.grad is not None]), 2)
