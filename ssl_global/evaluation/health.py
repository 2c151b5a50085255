"""Is the backbone collapsing? Meters that need no labels, and what they say in plain words.

    N  images    D  width of the features    K  the head's outputs (DINO's prototypes)

The thresholds are ours: they are set to speak of a run that is lost, not of one that is slow.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RANKME_EPS = 1e-7  # Garrido et al. 2023, for float32

FEATURE_STD_COLLAPSED = 0.05  # ours: isotropic features have 1; below a twentieth the images can hardly be told apart
RANKME_SHARE_LOW = 0.02  # ours: fewer than one direction in fifty of the width, 4 of 192
TEACHER_UNIFORM = 0.98  # ours: of log K; sharpened targets lie far below, unsharpened ones within a hundredth of 1
TEACHER_ONE_HOT = 0.02  # ours: of log K; the teacher bets all on one output
TEACHER_KL_NOTHING_LEFT = 1e-3  # ours, nats: different views of an image always differ by more


def rankme(features_ND: Tensor) -> float:
    """How many directions the features really use: 1 (a line) to D. NaN if a feature is not finite.

    Garrido et al. 2023, "RankMe", https://arxiv.org/abs/2210.02885: exp of the entropy of the singular values, each
    divided by their sum. It cannot exceed N: give it more images than D.
    """
    if not features_ND.isfinite().all():
        return math.nan
    singular = torch.linalg.svdvals(features_ND.float())
    share = singular / singular.sum().clamp_min(RANKME_EPS) + RANKME_EPS
    return (-(share * share.log()).sum()).exp().item()


def feature_std(features_ND: Tensor) -> float:
    """How far features spread on the sphere: 1 = in all directions alike, 0 = all images get the same.

    The standard deviation over the images of each of the D numbers of the L2-normalised features, averaged, times
    sqrt(D) (Chen & He 2021, "SimSiam", https://arxiv.org/abs/2011.10566, figure 2, there without the sqrt(D)).
    """
    z_ND = F.normalize(features_ND.float(), dim=1)
    return (z_ND.std(dim=0, correction=0).mean() * math.sqrt(z_ND.shape[1])).item()


def verdicts(metrics: dict[str, float]) -> list[str]:
    """Warnings, one sentence each, for what is among the metrics; none if all is well or nothing is known.

    feature_std             see above
    rankme, width           see above, and D
    teacher_entropy_share   entropy of the teacher's outputs divided by log K: 0 = certain, 1 = uniform
    teacher_kl              nats, of the student's outputs from the teacher's
    """
    nan = math.nan
    spread, rank, width = (metrics.get(name, nan) for name in ("feature_std", "rankme", "width"))
    entropy, kl = (metrics.get(name, nan) for name in ("teacher_entropy_share", "teacher_kl"))
    # Comparisons with NaN are false, so an unknown metric warns of nothing.
    found = []
    if any(name in metrics and not math.isfinite(metrics[name]) for name in ("feature_std", "rankme")):
        found.append("features are not finite: lower optim.lr_per_256_images, or train in fp32 or bf16")
    if spread < FEATURE_STD_COLLAPSED:
        found.append(f"all images get the same output (feature std {spread:.2f}): lower method.teacher_temp")
    elif rank < RANKME_SHARE_LOW * width:
        found.append(
            f"the features use {rank:.1f} of {width:.0f} directions: they are collapsing; lower optim.lr_per_256_images"
        )
    if entropy > TEACHER_UNIFORM:
        found.append(
            f"the teacher answers nearly uniformly (entropy {entropy:.2f} of log K): lower method.teacher_temp"
        )
    elif entropy < TEACHER_ONE_HOT and kl < TEACHER_KL_NOTHING_LEFT:
        found.append(
            f"the teacher gives every image the same one prototype (entropy {entropy:.2f} of log K, "
            f"student's KL {kl:.1g}): raise method.teacher_temp"
        )
    return found
