"""The order of samples is a pure function of the seed, and of nothing that a machine decides."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ssl_global.data.order import Order, batches


@given(num_samples=st.integers(1, 200), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 50))
def test_every_sample_once_an_epoch(num_samples, seed, epoch):
    order = Order(num_samples, seed)
    taken = [order[epoch * num_samples + place] for place in range(num_samples)]
    assert {e for e, _ in taken} == {epoch}
    assert sorted(sample for _, sample in taken) == list(range(num_samples))
    assert taken == [Order(num_samples, seed)[epoch * num_samples + place] for place in range(num_samples)]


def test_epochs_and_seeds_differ_and_shuffle_well():
    first, second = ([Order(1000, 0)[e * 1000 + i][1] for i in range(1000)] for e in (0, 1))
    other = [Order(1000, 1)[i][1] for i in range(1000)]
    for a, b in ((first, second), (first, other), (first, range(1000))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


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
