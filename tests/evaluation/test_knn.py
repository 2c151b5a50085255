import math
from collections import defaultdict

import pytest
import torch

from ssl_global.evaluation.knn import GROUP, confusion_matrix, knn_accuracy, knn_predict, most_similar


def random_problem(*, images: int = 60, queries: int = 23, width: int = 5, classes: int = 4):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(images, width, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    return bank, labels, torch.randn(queries, width, generator=generator)


def slow_knn(bank, labels, queries, *, neighbours, temp):
    answers = []
    for query in queries.tolist():
        similarities = []
        for image, label in zip(bank.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, image, strict=True))
            similarities.append((dot / (math.hypot(*query) * math.hypot(*image)), label))
        votes = defaultdict(float)
        for similarity, label in sorted(similarities, reverse=True)[:neighbours]:
            votes[label] += math.exp(similarity / temp)
        answers.append(max(votes, key=votes.get))
    return torch.tensor(answers)


@pytest.mark.parametrize("neighbours", [1, 7, 20, 60, 1000])
@pytest.mark.parametrize("temp", [0.07, 1.0])
def test_predictions_equal_the_slow_loop(neighbours, temp):
    bank, labels, queries = random_problem()
    expected = slow_knn(bank, labels, queries, neighbours=neighbours, temp=temp)
    assert torch.equal(knn_predict(bank, labels, queries, neighbours=neighbours, temp=temp), expected)
    accuracy = knn_accuracy(bank, labels, queries, expected, neighbours=neighbours, temp=temp)
    assert accuracy == 1.0


@pytest.mark.parametrize("images", [1, 63, 64, 65, 700])
@pytest.mark.parametrize("neighbours", [1, 4, 20])
def test_groups_have_the_nearest(images, neighbours):
    bank, labels, queries = random_problem(images=images)
    expected = slow_knn(bank, labels, queries, neighbours=neighbours, temp=0.07)
    assert torch.equal(knn_predict(bank, labels, queries, neighbours=neighbours), expected)


@pytest.mark.parametrize("num", [1, 3, 9])
def test_most_similar_is_topk(num):
    similarity = torch.randn(11, 9 * GROUP, generator=torch.Generator().manual_seed(0))
    values, places = most_similar(similarity, num)
    assert torch.equal(values, similarity.topk(num, dim=1).values)
    assert torch.equal(similarity.gather(1, places), values)


def test_working_in_parts_changes_nothing():
    bank, labels, queries = random_problem()
    whole = knn_predict(bank, labels, queries)
    for at_once in (1, 60, 5 * 60 + 1):
        assert torch.equal(knn_predict(bank, labels, queries, at_once=at_once), whole)


def test_length_of_features_does_not_count():
    bank, labels, queries = random_problem()
    assert torch.equal(knn_predict(100 * bank, labels, queries), knn_predict(bank, labels, 0.01 * queries))


def test_a_tiny_temperature_is_the_nearest_neighbour():
    bank, labels, queries = random_problem()
    nearest = knn_predict(bank, labels, queries, neighbours=1)
    assert torch.equal(knn_predict(bank, labels, queries, temp=1e-4), nearest)


def test_accuracy_is_a_share():
    bank, labels, _ = random_problem()
    wrong = labels.clone()
    wrong[:15] = (wrong[:15] + 1) % 4
    assert knn_accuracy(bank, labels, bank, wrong, neighbours=1) == pytest.approx(0.75)


def test_an_empty_bank_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        knn_predict(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), torch.ones(1, 3))


def test_confusion_matrix_counts_true_rows_and_answered_columns():
    matrix = confusion_matrix(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 2]]
