"""What a segmentation is learnt from: cross-entropy, and how far the answer overlaps each class.

Soft Dice in the form of Milletari et al. 2016, "V-Net", https://arxiv.org/abs/1606.04797, section 3, with squares in
its denominator: of each image, the mean over the classes that are present in it.

Both are taken image by image, and their mean is the loss: so a batch that is shared out over processes, or taken in
parts, has the same loss and the same gradient. (Sums over a whole batch, as some have it, would not.)

    B  images    K  classes    H, W  rows and columns of the image
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    dice: float = 1.0,
) -> Tensor:
    """Cross-entropy in nats plus `dice` times the soft Dice loss, in 0..1.

    logits          (B, K, H, W), at the target's size: `Features.to_image` brings them there
    target          (B, H, W) integers, 0 to K - 1, or ignore_index for pixels that do not count
    class_weights   (K,), each at least 0: of a class's pixels in the cross-entropy; Dice weighs all classes alike

    Returns a float32 scalar at least (float64 of float64). An image of which no pixel counts adds 0, with a gradient of
    0. Slowly, the mean over the images of:

        counted = the image's pixels whose target is not ignore_index
        p[pixel] = softmax(logits[pixel])
        cross_entropy = (sum over counted of w[target] * -log p[pixel][target]) / (sum over counted of w[target])
        for each class k that is the target of a counted pixel:
            both = sum over counted of p[pixel][k] * (target is k)
            overlap = 2 * both / (sum over counted of p[pixel][k]^2 + number of counted pixels whose target is k)
        cross_entropy + dice * (1 - mean over those k of overlap)
    """
    if logits.shape[:1] + logits.shape[2:] != target.shape:
        raise ValueError(f"logits {tuple(logits.shape)} are not of the size of the target {tuple(target.shape)}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    target = target.long()
    loss = cross_entropy(logits, target, ignore_index, class_weights)
    return loss + dice * dice_loss(logits, target, ignore_index) if dice else loss


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, class_weights: Tensor | None) -> Tensor:
    weights = logits.new_ones(logits.shape[1]) if class_weights is None else class_weights.to(logits)
    counted = target != ignore_index
    of_pixels = F.cross_entropy(logits, target, weights, ignore_index=ignore_index, reduction="none")
    weight_B = (weights[target.masked_fill(~counted, 0)] * counted).sum((1, 2))
    # Where the weight is 0, so is the sum.
    return (of_pixels.sum((1, 2)) / weight_B.clamp_min(torch.finfo(weight_B.dtype).tiny)).mean()


def dice_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    counted = (target != ignore_index)[:, None]
    is_class = (target[:, None] == classes) & counted  # (B, K, H, W)
    p = logits.softmax(dim=1) * counted
    both_BK, of_target_BK = (p * is_class).sum((2, 3)), is_class.sum((2, 3))
    overlap_BK = 2 * both_BK / (p.square().sum((2, 3)) + of_target_BK).clamp_min(torch.finfo(p.dtype).tiny)
    present_BK = of_target_BK > 0
    return (((1 - overlap_BK) * present_BK).sum(1) / present_BK.sum(1).clamp_min(1)).mean()
