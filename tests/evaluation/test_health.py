import math

import pytest
import torch

from ssl_global.evaluation.health import feature_std, rankme, verdicts


def features(images: int = 2000, width: int = 32) -> torch.Tensor:
    return torch.randn(images, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [1, 3, 16, 32])
def test_rankme_counts_directions_of_equal_strength(rank):
    orthogonal = torch.linalg.qr(features()).Q[:, :rank]
    mixed = orthogonal @ torch.linalg.qr(features(32, 32)).Q[:rank]
    assert rankme(mixed) == pytest.approx(rank, rel=0.001)


def test_rankme_of_a_low_rank_product_is_about_its_rank():
    product = features(2000, 5) @ features(5, 64)
    assert 3.5 < rankme(product) <= 5.01


def test_rankme_of_what_is_not_finite():
    broken = features()
    broken[3, 3] = math.inf
    assert math.isnan(rankme(broken))


def test_rankme_of_zeros_is_finite():
    assert math.isfinite(rankme(torch.zeros(10, 4)))


def test_feature_std_is_1_in_all_directions_and_0_in_one():
    assert feature_std(features()) == pytest.approx(1.0, abs=0.02)
    assert feature_std(features(1, 32).expand(100, 32)) == pytest.approx(0.0, abs=1e-4)


def test_collapsed_features_are_called_so():
    nearly_one_point = torch.ones(500, 32) + 0.001 * features(500)
    warnings = verdicts({"feature_std": feature_std(nearly_one_point), "rankme": rankme(nearly_one_point), "width": 32})
    assert warnings == ["all images get the same output (feature std 0.00): lower method.teacher_temp"]


def test_healthy_features_are_not():
    assert verdicts({"feature_std": feature_std(features()), "rankme": rankme(features()), "width": 32}) == []


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"teacher_entropy_share": 0.99, "teacher_kl": 0.01}, "nearly uniformly (entropy 0.99 of log K)"),
        ({"teacher_entropy_share": 0.01, "teacher_kl": 1e-5}, "the same one prototype"),
        ({"feature_std": 0.6, "rankme": 3.0, "width": 384}, "use 3.0 of 384 directions"),
        ({"feature_std": math.nan}, "not finite"),
    ],
)
def test_each_trouble_has_its_sentence(metrics, words):
    (sentence,) = verdicts(metrics)
    assert words in sentence


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"loss": 3.0},
        {"teacher_entropy_share": 0.7, "teacher_kl": 1.2},
        {"teacher_entropy_share": 0.01, "teacher_kl": 2.0},  # certain, but of something else for each image
        {"feature_std": 0.8, "rankme": 100.0, "width": 384},
    ],
)
def test_no_sentence_without_trouble(metrics):
    assert verdicts(metrics) == []
