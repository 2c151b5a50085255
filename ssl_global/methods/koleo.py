"""KoLeo: features are pushed away from their nearest neighbours, so that they spread over the sphere.

Sablayrolles et al. 2018, "Spreading vectors for similarity search", https://arxiv.org/abs/1806.03198, equation 3; with
the features normalised first, as in DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193, section 4).

The papers look for the neighbour within the images that one GPU has at once, so that what is learnt depends on the
machine. Here it is looked for among a stated number of images that follow each other in the batch: with the authors'
64 that is theirs on their machine, and the same on any other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-8  # added to distances (DINOv2's code): two images alike would be infinitely far from good


def koleo_loss(features_BD: Tensor, *, among: int) -> Tensor:
    """-log of the distance from each image to the nearest of `among` images, in the mean over B. Any real number.

    features_BD  not normalised, of different images: two views of one must not be in it
    among        at least 2; divides B

    Returns a float32 scalar; float64 for float64. Slowly:

        total = 0
        for b in range(B):
            others = the `among` images around b, from b // among * among on, without b
            nearest = the one of them with the largest cosine to b
            total += -log(|features[b] / |features[b]| - nearest / |nearest|| + 1e-8)
        return total / B
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        x_GAD = F.normalize(features_BD.to(torch.promote_types(features_BD.dtype, torch.float32)), dim=-1)
        x_GAD = x_GAD.unflatten(0, (-1, among))
        with torch.no_grad():
            cosine_GAA = x_GAD @ x_GAD.transpose(1, 2)
            cosine_GAA.diagonal(dim1=1, dim2=2).fill_(-2)  # below any cosine
            nearest_GA1 = cosine_GAA.argmax(-1, keepdim=True)
        difference_GAD = x_GAD - x_GAD.gather(1, nearest_GA1.expand_as(x_GAD))
        return -(difference_GAD.norm(dim=-1) + SMALLEST).log().mean()
