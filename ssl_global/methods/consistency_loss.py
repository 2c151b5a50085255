"""InfoNCE between the global and the local views of images: each must find its image's other views among all images'.

The loss of the sources (row "global-local consistency" of the attention survey), made right. InfoNCE: van den Oord et
al. 2018, https://arxiv.org/abs/1807.03748; both directions and the temperature as in SimCLR (Chen et al. 2020,
https://arxiv.org/abs/2002.05709); several positives, each with a term of its own outside of the logarithm, as in
Khosla et al. 2020 (https://arxiv.org/abs/2004.11362, equation 2).

Not as in Khosla et al.: a positive's term does not have the image's other views in its denominator. They are positives
too, and would be pushed away there.

Letters, in this file only:

    B  images of this process     N  images of all processes     G  global views     L  local views     D  width

With several processes each takes its own views as anchors, and all processes' views as what they are compared with; a
gradient goes back to the process whose view it is. So the mean over processes of what is returned, and of its
gradients, which DDP and FSDP2 take, is what one process with all N images would have (tested over gloo).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssl_global.errors import wrong
from ssl_global.recipe import Recipe


def consistency_loss(global_GBD: Tensor, local_LBD: Tensor, *, temp: float) -> Tensor:
    """Mean over all pairs (global view, local view) of an image, in both directions, of InfoNCE in nats.

    global_GBD  projected global views, of any length: they are normalised here
    local_LBD   the same of local views
    temp        divides the cosines; above 0

    Returns a float32 scalar, 0 or more, whatever the inputs' precision; gradients go to both. Raises ValueError for
    fewer than two images over all processes, or no view of a kind. With one view of each kind it is the symmetric
    cross-entropy of the N x N cosines over temp. Slowly, in one process:

        total = 0
        for anchors, others in ((globals, locals), (locals, globals)):
            for each image i, each of its anchors a, and each view p of the same image in `others`:
                alike = exp(cosine(a, p) / temp)
                unlike = sum over images j != i and their views q in `others` of exp(cosine(a, q) / temp)
                total += -log(alike / (alike + unlike))
        return total / (2 * G * L * N)
    """
    if min(len(global_GBD), len(local_LBD)) < 1:
        raise ValueError(f"compares global with local views; got {len(global_GBD)} and {len(local_LBD)}")
    with torch.autocast(global_GBD.device.type, enabled=False):
        globals_, locals_ = (F.normalize(views.float(), dim=-1) for views in (global_GBD, local_LBD))
        all_globals, all_locals = of_all_processes(globals_), of_all_processes(locals_)
        if all_globals.shape[1] < 2:
            raise ValueError("consistency needs the views of at least 2 images at once: one has no negatives")
        return (info_nce(globals_, all_locals, temp) + info_nce(locals_, all_globals, temp)) / 2


def info_nce(anchor_ABD: Tensor, other_PND: Tensor, temp: float) -> Tensor:
    """Mean over A, B and P; A views of this process's images are compared with P views of all images, all of length 1.

    -log(e^s / (e^s + e^u)) = softplus(u - s), where e^u is the sum over all views of other images.
    """
    num_images = anchor_ABD.shape[1]
    first = rank() * num_images
    cosine_ABPN = torch.einsum("abd,pnd->abpn", anchor_ABD, other_PND) / temp
    own_BN = torch.eye(num_images, other_PND.shape[1], dtype=torch.bool, device=anchor_ABD.device).roll(first, 1)
    alike_ABP = cosine_ABPN[..., first : first + num_images].diagonal(dim1=1, dim2=3).transpose(1, 2)
    unlike_AB = cosine_ABPN.masked_fill(own_BN[:, None], float("-inf")).flatten(2).logsumexp(-1)
    return F.softplus(unlike_AB[..., None] - alike_ABP).mean()


def of_all_processes(views_VBD: Tensor) -> Tensor:
    """(V, N, D), the first process's images first."""
    if not several():
        return views_VBD
    gathered: Tensor = Gather.apply(views_VBD)
    return gathered


class Gather(torch.autograd.Function):
    """Each process's views to all of them; backward, the sum of what all processes say of them to whose they are.

    torch 2.15 has one of its own (distributed.nn.functional.all_gather): over gloo its gradient was another here.
    """

    @staticmethod
    def forward(ctx: Any, views_VBD: Tensor) -> Tensor:
        views_VBD = views_VBD.contiguous()
        parts = [torch.empty_like(views_VBD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, views_VBD)
        ctx.num_images = views_VBD.shape[1]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient_VND: Tensor) -> Tensor:
        total_VND = gradient_VND.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total_VND)
        first = rank() * ctx.num_images
        return total_VND[:, first : first + ctx.num_images]


def refuse_auto(recipe: Recipe) -> None:
    """Raises UserError where the machine's memory would choose the negatives, and so what is learnt."""
    if recipe.train.micro_batch == "auto":
        right = "a number, or None: the images at once are each other's negatives, the method learns another thing"
        raise wrong("train.micro_batch", "auto", right)


def several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if several() else 0
