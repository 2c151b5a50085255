"""How well the nearest neighbours of an image tell its class: a backbone judged without training anything.

DINO's weighted k-NN (Caron et al. 2021, https://arxiv.org/abs/2104.14294, section 4.1, after Wu et al. 2018).

    N  images in the bank    M  queries    D  width    K  neighbours    C  classes
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_global.evaluation.features import Split

SIMILARITIES_AT_ONCE = 2**26  # ours: 256 MB of float32
# Images of the bank (ours): about the root of 100 000 / 20, where both steps of `most_similar` cost the same.
GROUP = 64


def knn_predict(
    bank_ND: Tensor,
    bank_labels: Tensor,
    query_MD: Tensor,
    *,
    neighbours: int = 20,
    temp: float = 0.07,
    at_once: int = SIMILARITIES_AT_ONCE,
) -> Tensor:
    """The class (M,), int64, that the most similar images of the bank vote for. Slowly:

        for each query:
            similarity = cosine of the query and each image of the bank
            votes = 0 for each class
            for the `neighbours` images with the highest similarity (all images, if the bank has fewer):
                votes[that image's label] += exp(similarity / temp)
            answer the class with the most votes

    bank_labels   (N,) int64, 0 or more
    at_once       similarities that are in memory at a time: M is worked through in parts
    """
    if len(bank_ND) == 0:
        raise ValueError("a k-NN needs at least one image in its bank")
    num_images = len(bank_ND)
    bank_ND, query_MD = F.normalize(bank_ND.float(), dim=1), F.normalize(query_MD.float(), dim=1)
    bank_ND = F.pad(bank_ND, (0, 0, 0, -num_images % GROUP))  # whole groups
    num_classes = int(bank_labels.max()) + 1
    answers = [torch.empty(0, dtype=torch.int64, device=query_MD.device)]
    for part_BD in query_MD.split(max(at_once // len(bank_ND), 1)):
        similarity_BN = part_BD @ bank_ND.T
        similarity_BN[:, num_images:] = -torch.inf
        similarity_BK, rows_BK = most_similar(similarity_BN, min(neighbours, num_images))
        # Measured from the nearest, which changes no winner and keeps exp() finite at any temperature.
        votes_BK = ((similarity_BK - similarity_BK[:, :1]) / temp).exp()
        votes_BC = votes_BK.new_zeros(len(part_BD), num_classes).scatter_add_(1, bank_labels[rows_BK], votes_BK)
        answers.append(votes_BC.argmax(dim=1))
    return torch.cat(answers)


def most_similar(similarity_BN: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """As topk along the bank, values and places, whose size is a multiple of GROUP.

    The largest K lie in the K groups with the largest maxima: those are looked for first, then in them.
    """
    num_groups = similarity_BN.shape[1] // GROUP
    if num_groups <= num:
        return similarity_BN.topk(num, dim=1)
    grouped = similarity_BN.unflatten(1, (num_groups, GROUP))
    groups_BK = grouped.amax(2).topk(num, dim=1).indices
    candidates = grouped.gather(1, groups_BK[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    values_BK, places_BK = candidates.topk(num, dim=1)
    return values_BK, groups_BK.gather(1, places_BK // GROUP) * GROUP + places_BK % GROUP


def knn_accuracy(
    bank_ND: Tensor,
    bank_labels: Tensor,
    query_MD: Tensor,
    query_labels: Tensor,
    *,
    neighbours: int = 20,
    temp: float = 0.07,
    at_once: int = SIMILARITIES_AT_ONCE,
) -> float:
    """Share of the queries, 0 to 1, whose class `knn_predict` tells; NaN if there are none."""
    answers = knn_predict(bank_ND, bank_labels, query_MD, neighbours=neighbours, temp=temp, at_once=at_once)
    return (answers == query_labels).float().mean().item()


def knn(split: Split, *, neighbours: int = 20, temp: float = 0.07, device: torch.device | None = None) -> float:
    """`knn_accuracy` of features that `ssl_global.evaluation.features.split` put side by side, computed on `device`."""
    return knn_accuracy(*(tensor.to(device) for tensor in split.tensors()), neighbours=neighbours, temp=temp)


def knn_confusion(split: Split, *, device: torch.device | None = None) -> Tensor:
    """int64 (C, C) on the CPU, see `confusion_matrix`."""
    bank_ND, bank_labels, query_MD, query_labels = (tensor.to(device) for tensor in split.tensors())
    answers = knn_predict(bank_ND, bank_labels, query_MD)
    return confusion_matrix(query_labels, answers, split.num_classes).cpu()


def confusion_matrix(labels: Tensor, answers: Tensor, num_classes: int) -> Tensor:
    """int64 (C, C): how many images of the row's class were taken for the column's."""
    pairs = labels * num_classes + answers
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
