"""The weighted k-NN as published: Caron et al. 2021, https://arxiv.org/abs/2104.14294, after Wu et al. 2018.

A hundred chunks of queries; a topk of each over the whole bank; neighbours' labels as one-hot rows in a scatter, times
exp(similarity / temperature), summed; all classes sorted, the first is the answer. Features are normalised already.
"""

import torch
from torch import Tensor

CHUNKS = 100


@torch.no_grad()
def predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, neighbours: int, temp: float, num_classes: int
) -> Tensor:
    """bank (N, D), bank_labels (N,), queries (M, D) -> classes (M,)."""
    bank_columns = bank.t()
    answers = []
    for chunk in queries.split(max(len(queries) // CHUNKS, 1)):
        similarity, places = torch.mm(chunk, bank_columns).topk(neighbours, largest=True, sorted=True)
        labels = bank_labels.view(1, -1).expand(len(chunk), -1).gather(1, places)
        one_hot = torch.zeros(len(chunk) * neighbours, num_classes, device=bank.device)
        one_hot.scatter_(1, labels.view(-1, 1), 1)
        weights = (similarity / temp).exp()
        votes = (one_hot.view(len(chunk), neighbours, num_classes) * weights.unsqueeze(2)).sum(1)
        answers.append(votes.sort(dim=1, descending=True).indices[:, 0])
    return torch.cat(answers)
