from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cwcl_jax.data.order import GlobalOrder, permute
from cwcl_jax.data.pipeline import order_of_source
from cwcl_jax.data.sources import Source


@settings(max_examples=60)
@given(size=st.integers(1, 600), key=st.integers(0, 2**63))
def test_permute_hits_every_index_once(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@pytest.mark.parametrize("size", [1000, 100_000])  # kept whole, and computed where it is needed
def test_permute_of_some_positions_equals_the_whole(size):
    whole = permute(np.arange(size), size, 4)
    some = np.array([3, 999, 500, 3])
    np.testing.assert_array_equal(permute(some, size, 4), whole[some])
    assert sorted(whole) == list(range(size))


def test_permutations_of_several_keys_are_unrelated():
    size = 5000
    first, second = permute(np.arange(size), size, 1), permute(np.arange(size), size, 2)
    for values in (first, second):
        assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(size)


def test_every_index_is_equally_likely_at_every_position():
    size, keys = 8, 1000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, key)] += 1
    # Chi-square with 49 degrees of freedom; 100 is beyond the 99.99th percentile.
    assert ((counts - keys / size) ** 2 / (keys / size)).sum() < 100


def _epoch(order: GlobalOrder, epoch: int) -> list[int]:
    return order.indices(epoch, np.arange(order.per_epoch)).tolist()


def test_a_whole_epoch_is_a_new_permutation_each_time():
    order = GlobalOrder((101,), (1.0,), 101, seed=3)
    epochs = [_epoch(order, epoch) for epoch in range(3)]
    for indices in epochs:
        assert sorted(indices) == list(range(101))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == _epoch(GlobalOrder((101,), (1.0,), 101, seed=3), 0)
    assert epochs[0] != _epoch(GlobalOrder((101,), (1.0,), 101, seed=4), 0)


def test_epoch_subsets_are_drawn_without_replacement_and_cover_all_in_time():
    order = GlobalOrder((100,), (1.0,), 30, seed=0)
    seen: Counter[int] = Counter()
    for epoch in range(200):
        indices = _epoch(order, epoch)
        assert len(set(indices)) == 30
        seen.update(indices)
    assert set(seen) == set(range(100))
    # Each index is in 60 subsets on average, with a standard deviation of 6.5.
    assert 30 < min(seen.values()) <= max(seen.values()) < 90


def test_without_shuffle_the_order_is_kept():
    order = GlobalOrder((10,), (1.0,), 6, seed=0, shuffle=False)
    assert _epoch(order, 0) == _epoch(order, 1) == list(range(6))


def test_a_mixture_gives_each_part_its_exact_share():
    order = GlobalOrder((1000, 50), (3.0, 1.0), 160, seed=1)
    indices = _epoch(order, 0)
    first = [index for index in indices if index < 1000]
    second = [index - 1000 for index in indices if index >= 1000]
    assert (len(first), len(second)) == (120, 40)
    assert len(set(first)) == 120
    assert len(set(second)) == 40
    # Parts are shuffled together: neither half of the epoch lacks one of them.
    assert 5 < sum(index >= 1000 for index in indices[:80]) < 35


def test_a_part_that_is_asked_for_more_than_it_has_repeats_evenly():
    order = GlobalOrder((1000, 10), (1.0, 1.0), 50, seed=1)
    counts = Counter(index for index in _epoch(order, 0) if index >= 1000)
    assert sorted(counts.values()) == [2] * 5 + [3] * 5


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    per_epoch=st.integers(1, 120),
    data=st.data(),
)
def test_quotas_add_up_to_the_epoch(lengths, per_epoch, data):
    weights = tuple(data.draw(st.floats(0.1, 10)) for _ in lengths)
    order = GlobalOrder(tuple(lengths), weights, per_epoch, seed=0)
    assert sum(order.quotas) == per_epoch
    exact = per_epoch * np.array(weights) / sum(weights)
    assert np.abs(np.array(order.quotas) - exact).max() < 1 + 1e-6
    starts = np.cumsum([0, *lengths])
    indices = np.array(_epoch(order, 0))
    for part, quota in enumerate(order.quotas):
        inside = (indices >= starts[part]) & (indices < starts[part + 1])
        assert inside.sum() == quota


def test_replacements_come_from_the_same_part_and_outside_a_small_subset():
    order = GlobalOrder((100,), (1.0,), 30, seed=0)
    subset = set(_epoch(order, 5))
    others = order.indices(5, np.arange(30), attempt=1)
    assert not subset & set(others.tolist())
    assert len(set(others.tolist())) == 30
    mixed = GlobalOrder((100, 60), (1.0, 1.0), 40, seed=0)
    positions = np.arange(40)
    first, second = mixed.indices(0, positions), mixed.indices(0, positions, attempt=1)
    np.testing.assert_array_equal(first < 100, second < 100)


def test_successive_replacements_differ():
    order = GlobalOrder((50,), (1.0,), 50, seed=0)
    position = np.array([7])
    tried = [int(order.indices(0, position, attempt)[0]) for attempt in range(6)]
    assert len(set(tried)) == 6


def test_a_million_positions_need_no_list():
    order = GlobalOrder((10**12,), (1.0,), 10**11, seed=0)
    assert order.indices(3, np.array([10**11 - 1]))[0] < 10**12


@pytest.mark.parametrize(("per_epoch", "expected"), [(0, 5), (3, 3)])
def test_zero_examples_per_epoch_means_all(per_epoch, expected):
    order = order_of_source(Source(), 5, per_epoch=per_epoch, seed=0, shuffle=True)
    assert order.per_epoch == expected
