"""How good the shuffle is, against a true permutation, where it is hardest: shards sorted by class."""

import numpy as np
import pytest

from benchmarks.shuffle import figures
from ssl_global.data.order import Order
from ssl_global.recipe import Data

SHARDS, PER_SHARD = 60, 1000  # seven windows, a thousand classes of sixty


@pytest.mark.parametrize("seed", range(3))
def test_class_sorted_shards_come_nearly_as_a_true_permutation(seed: int) -> None:
    total, data = SHARDS * PER_SHARD, Data()
    order = Order(np.arange(SHARDS + 1) * PER_SHARD, seed, block=data.shuffle_block, window=data.shuffle_window)
    ours = np.array([order[place][1] for place in range(total // 512 * 512)])
    true = figures(np.random.default_rng(seed).permutation(total)[: len(ours)], total, PER_SHARD)
    found = figures(ours, total, PER_SHARD)
    assert abs(found["rank correlation of the order with the data's"]) < 0.02
    assert found["share of neighbours that are of one shard"] < 1.1 * true["share of neighbours that are of one shard"]
    assert found["share of neighbours that were neighbours"] < 0.001
    assert found["classes in a batch"] > 0.8 * true["classes in a batch"]
    assert found["images of a batch's most frequent class"] < 2 * true["images of a batch's most frequent class"]


def test_the_figures_tell_a_bad_shuffle() -> None:
    """Samples as they lie have every fault that is measured."""
    found = figures(np.arange(51200), 51200, 1000)
    assert found["rank correlation of the order with the data's"] > 0.99
    assert found["share of neighbours that are of one shard"] > 0.99
    assert found["share of neighbours that were neighbours"] == 1
    assert found["classes in a batch"] < 13
