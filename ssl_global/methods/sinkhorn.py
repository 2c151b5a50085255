"""Sinkhorn-Knopp: the teacher's answers made to use all prototypes equally, over the whole step's batch.

Cuturi 2013, https://arxiv.org/abs/1306.0895; Caron et al. 2020, SwAV, https://arxiv.org/abs/2006.09882, section 3.1, as
DINOv2 uses it (Oquab et al. 2023, https://arxiv.org/abs/2304.07193, section 4): three rounds.

Letters, in this file only:

    N  samples, over all processes and all parts of a step's batch     K  prototypes

With Q[n, k] = exp(logit[n, k] / temp), a round divides each prototype's column by its sum over the samples, then each
sample's row by its sum over the prototypes. So whatever the rounds, a sample's answer is a softmax of its own logits
plus K numbers that are the same for all samples: these are found here, and nothing of the samples' size is kept.

Not as in the papers' code: all sums are of logarithms, so that no temperature overflows (theirs takes exp(logit / temp)
as it stands: beyond float16 at 0.09, beyond float32 at 0.011), and constant factors that cancel are left out.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_global.methods.chunks import chunks


@torch.no_grad()
def sinkhorn_offsets(parts_NK: Sequence[Tensor], *, temp: float, rounds: int) -> Tensor:
    """What to add to logits / temp so that their softmax is the answer after so many rounds: (K,), at least float32.

    parts_NK  this process's logits, part by part: (n, K) each, n may be 0. All processes must call it
    temp      the teacher's, above 0
    rounds    1 or more

    Slowly, of all samples of all processes:

        Q = exp(logits / temp)
        for each round:
            Q = Q / (sum over n of Q)
            Q = Q / (sum over k of Q)
        return Q                                 # softmax(logits / temp + offsets) here
    """
    rows = [part_NK.new_zeros(len(part_NK), dtype=at_least_float32(part_NK)) for part_NK in parts_NK]
    offsets_K = -log_sum_of_all(parts_NK, rows, temp)
    for _ in range(rounds - 1):
        for part_NK, row_N in zip(parts_NK, rows, strict=True):
            for some, z_nK in scaled(part_NK, temp):
                row_N[some] = -z_nK.add_(offsets_K).logsumexp(1)
        offsets_K = -log_sum_of_all(parts_NK, rows, temp)
    return offsets_K


def log_sum_of_all(parts_NK: Sequence[Tensor], rows: Sequence[Tensor], temp: float) -> Tensor:
    """Of each prototype, over all samples: log of the sum of exp(logit / temp + row)."""
    total_K = rows[0].new_full((parts_NK[0].shape[1],), -torch.inf)
    for part_NK, row_N in zip(parts_NK, rows, strict=True):
        for some, z_nK in scaled(part_NK, temp):
            total_K = torch.logaddexp(total_K, z_nK.add_(row_N[some, None]).logsumexp(0))
    if not dist.is_initialized():
        return total_K
    # Where no process has a sample the largest is -inf; the numbers then serve nobody, but must not be NaN.
    largest_K = total_K.clone()
    dist.all_reduce(largest_K, dist.ReduceOp.MAX)
    largest_K.clamp_(min=torch.finfo(largest_K.dtype).min)
    sum_K = (total_K - largest_K).exp_()
    dist.all_reduce(sum_K)
    return sum_K.log_().add_(largest_K)


def scaled(part_NK: Tensor, temp: float) -> Iterator[tuple[slice, Tensor]]:
    """A few samples at a time: which, and a new tensor of their logits / temp."""
    for some in chunks(part_NK):
        yield some, part_NK[some].to(at_least_float32(part_NK)) / temp


def at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
