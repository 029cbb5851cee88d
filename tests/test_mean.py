"""The weighted mean: its laws, and that folding keeps to O(d) memory."""

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedge.core import state as plain
from fedge.strategies.aggregators import build
from fedge.strategies.aggregators.mean import Mean, MeanState
from fedge.strategies.blocks import BLOCK

WEIGHTS = st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=8)


def rows_for(weights, size=17):
    return np.random.default_rng(len(weights)).standard_normal((len(weights), size)).astype(np.float32)


def folded(rows, weights):
    mean = Mean()
    state = mean.init(rows.shape[1])
    for row, weight in zip(rows, weights):
        state = mean.fold(state, row, weight)
    return state


def finished(state):
    return Mean().finish(state, [], None, 0).vector


def close(found, wanted):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-5)


@given(WEIGHTS)
def test_equals_the_literal_formula(weights):
    rows = rows_for(weights)
    close(
        finished(folded(rows, weights)),
        np.average(rows.astype(np.float64), axis=0, weights=weights),
    )


@given(WEIGHTS, st.randoms())
def test_the_order_of_rows_does_not_matter(weights, shuffler):
    rows, order = rows_for(weights), list(range(len(weights)))
    shuffler.shuffle(order)
    again = folded(rows[order], [weights[index] for index in order])
    close(finished(again), finished(folded(rows, weights)))


@given(WEIGHTS, st.integers(0, 8))
def test_merging_equals_folding_all(weights, cut):
    rows = rows_for(weights)
    merged = Mean().merge(folded(rows[:cut], weights[:cut]), folded(rows[cut:], weights[cut:]))
    close(finished(merged), finished(folded(rows, weights)))


@given(WEIGHTS, st.floats(1e-3, 1e3))
def test_scaling_all_weights_changes_nothing(weights, scale):
    rows = rows_for(weights)
    scaled = folded(rows, [weight * scale for weight in weights])
    close(finished(scaled), finished(folded(rows, weights)))


def test_equal_rows_of_weight_one_come_back_to_the_bit():
    row = rows_for([1.0])[0]
    assert np.array_equal(finished(folded(np.stack([row, row]), [1.0, 1.0])), row)


def test_no_weight_gives_zeros_and_a_row_without_weight_leaves_no_trace():
    rows = rows_for([1.0, 1.0])
    assert np.array_equal(finished(Mean().init(5)), np.zeros(5, np.float32))
    assert np.array_equal(finished(folded(rows, [0.0, 0.0])), np.zeros(17, np.float32))
    assert np.array_equal(finished(folded(rows, [0.0, 1.0])), rows[1])


def test_rows_longer_than_a_block_and_not_a_multiple_of_it():
    rows = rows_for([1.0, 1.0], size=2 * BLOCK + 3)
    close(finished(folded(rows, [1.0, 3.0])), (rows[0] + 3.0 * rows[1]) / 4.0)


def test_fold_neither_changes_nor_keeps_the_row_and_makes_no_copy_of_it():
    rows = rows_for([1.0, 1.0], size=16 * BLOCK)
    before, mean = rows.copy(), Mean()
    state = mean.init(rows.shape[1])
    tracemalloc.start()
    state = mean.fold(mean.fold(state, rows[0], 2.5), rows[1], 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * BLOCK * 4
    assert np.array_equal(rows, before)
    assert not np.shares_memory(state.total, rows)
    assert finished(state) is state.total


def test_the_state_survives_a_snapshot():
    state = folded(rows_for([1.0, 2.0]), [1.0, 2.0])
    again = plain.convert(plain.decode(plain.encode(state)), MeanState)
    assert np.array_equal(finished(again), finished(state))


def test_the_registry_builds_it():
    mean = build({"kind": "mean"})
    assert mean.associative
    assert mean.honours_weights
    assert mean.min_rows() == 1
