"""The order of samples is a pure function of seed and data, and of nothing that a machine decides."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_global.data.order import Order, batches


def order_of(shards, seed=0, block=8, window=1024, **more):
    return Order(np.cumsum([0, *shards]), seed, block=block, window=window, **more)


@given(
    shards=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    block=st.integers(1, 20),
    window=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 50),
)
def test_every_sample_once_an_epoch(shards, block, window, seed, epoch):
    order, total = order_of(shards, seed, block, window), sum(shards)
    taken = [order[epoch * total + place] for place in range(total)]
    assert {e for e, _ in taken} == {epoch}
    assert sorted(sample for _, sample in taken) == list(range(total))
    again = order_of(shards, seed, block, window)  # asked in another order: nothing is remembered that matters
    places = np.random.default_rng(0).permutation(total)
    assert [again[epoch * total + place] for place in places] == [taken[place] for place in places]


@given(shards=st.lists(st.integers(1, 60), min_size=1, max_size=8), batch=st.integers(1, 30), epoch=st.integers(0, 9))
def test_the_rest_of_an_epoch_may_be_left_out(shards, batch, epoch):
    total = sum(shards)
    if batch > total:
        return
    order = order_of(shards, block=5, window=3, whole_steps=batch)
    length = total // batch * batch
    taken = [order[epoch * length + place] for place in range(length)]
    assert {e for e, _ in taken} == {epoch}
    assert len({sample for _, sample in taken}) == length


@pytest.mark.parametrize(("block", "window"), [(8, 1024), (4, 10)])
def test_epochs_and_seeds_differ_and_shuffle_well(block, window):
    first, second = ([order_of([1000], 0, block, window)[e * 1000 + i][1] for i in range(1000)] for e in (0, 1))
    other = [order_of([1000], 1, block, window)[i][1] for i in range(1000)]
    for a, b in ((first, second), (first, other), (first, range(1000))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_reads_stay_near_each_other():
    """A window of 6 blocks of 8 touches 6 places of the disk, each 8 samples long, however it is shuffled."""
    order = order_of([400, 304], block=8, window=6)
    for window in range(0, 704 - 48, 48):
        samples = sorted(order[place][1] for place in range(window, window + 48))
        runs = 1 + sum(b != a + 1 for a, b in pairwise(samples))
        assert runs <= 6


def test_blocks_do_not_cross_shards():
    order = order_of([10, 10], block=8, window=1)
    starts = {order[place][1] // 10 for place in range(8)}
    assert len(starts) == 1


def test_small_data_is_one_true_permutation():
    """Each sample is as likely at each place as at any other: chi-squared over 3000 epochs of 12 samples."""
    order = order_of([12], block=8, window=1024)
    counts = np.zeros((12, 12))
    for place in range(3000 * 12):
        counts[place % 12, order[place][1]] += 1
    assert ((counts - 250) ** 2 / 250).sum() < 121 + 5 * np.sqrt(2 * 121)


@given(
    processes=st.integers(1, 6),
    micro=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    start=st.integers(0, 5),
    steps=st.integers(0, 5),
)
def test_the_global_batch_is_the_same_however_it_is_shared(processes, micro, accumulate, start, steps):
    global_batch = processes * micro * accumulate
    shares = [
        list(
            batches(
                start_step=start,
                num_steps=start + steps,
                global_batch=global_batch,
                micro_batch=micro,
                process=process,
                num_processes=processes,
            )
        )
        for process in range(processes)
    ]
    for step in range(steps):
        parts = [p for share in shares for m in share[step * accumulate : (step + 1) * accumulate] for p in m]
        first = (start + step) * global_batch
        assert parts == list(range(first, first + global_batch))
    assert all(len(share) == steps * accumulate for share in shares)
