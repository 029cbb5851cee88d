"""Coordinate-wise rules: literal references, other libraries, and the laws they promise."""

import numpy as np
import pytest
from flwr.server.strategy import aggregate as flower
from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights
from hypothesis import assume, given
from hypothesis import strategies as st

from fedge import aggregate
from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators import AGGREGATORS
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.aggregators.krum import scores
from fedge.strategies.columns import BLOCK, columnwise, nearest_mean
from fedge.strategies.gram import gram
from tests.oracles import byzfl

ROBUST = ("median", "trimmed-mean", "meamed", "phocas")
ALL = (*ROBUST, "sign-majority")
SEEDS = st.integers(0, 10_000)


def drawn(seed, n, d=7):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def reduced(kind, rows, f, weights=None):
    weights = np.full(len(rows), 1 / len(rows)) if weights is None else np.asarray(weights) / np.sum(weights)
    columns = np.array(np.asarray(rows, np.float32).T, order="C")
    found = AGGREGATORS.build({"kind": kind}).reduce(columns, f, weights)
    assert found.dtype == np.float32
    assert found.shape == (np.shape(rows)[1],)
    return found


def close(found, wanted, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


# ---- literal references, one coordinate at a time, float64 -------------------------------------


def literal_median(values):
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def literal_trimmed(values, f):
    kept = sorted(values)[f : len(values) - f]
    return sum(kept) / len(kept)


def literal_nearest(values, centre, keep):
    return sum(sorted(values, key=lambda value: abs(value - centre))[:keep]) / keep


def literal_majority(values):
    votes = sum((value > 0) - (value < 0) for value in values)
    return ((votes > 0) - (votes < 0)) * literal_median([abs(value) for value in values])


def literal(kind, rows, f):
    keep = len(rows) - f
    one = {
        "median": literal_median,
        "trimmed-mean": lambda values: literal_trimmed(values, f),
        "meamed": lambda values: literal_nearest(values, literal_median(values), keep),
        "phocas": lambda values: literal_nearest(values, literal_trimmed(values, f), keep),
        "sign-majority": literal_majority,
    }[kind]
    return [one([float(value) for value in column]) for column in np.asarray(rows).T]


def literal_bulyan(rows, f):
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        totals = []
        for i in left:
            others = sorted(sum((rows[i].astype(np.float64) - rows[j]) ** 2) for j in left if j != i)
            totals.append(sum(others[: max(1, len(left) - f - 2)]))
        chosen.append(left.pop(totals.index(min(totals))))
    columns = rows[chosen].astype(np.float64).T
    return chosen, [literal_nearest(column, literal_median(column), len(chosen) - 2 * f) for column in columns]


def counts():
    """(n, f) with n >= 2 f + 1."""
    return st.integers(0, 4).flatmap(lambda f: st.tuples(st.integers(2 * f + 1, 2 * f + 9), st.just(f)))


@pytest.mark.parametrize("kind", ALL)
@given(counts(), SEEDS)
def test_equals_the_literal_formula(kind, shape, seed):
    rows = drawn(seed, shape[0])
    close(reduced(kind, rows, shape[1]), literal(kind, rows, shape[1]))
    close(aggregate(rows, kind=kind, byzantine=shape[1]), literal(kind, rows, shape[1]))


@given(counts(), SEEDS)
def test_median_trimmed_mean_and_meamed_are_those_of_byzfl(shape, seed):
    n, f = shape
    rows = drawn(seed, n)
    close(reduced("median", rows, f), byzfl.Median()(rows))
    close(reduced("trimmed-mean", rows, f), byzfl.TrMean(f=f)(rows))
    close(reduced("meamed", rows, f), byzfl.Meamed(f=f)(rows))


@given(counts(), SEEDS)
def test_median_and_trimmed_mean_are_those_of_flower_where_it_cuts_as_many(shape, seed):
    n, f = shape
    rows = drawn(seed, n)
    results = [([row], 1) for row in rows]
    close(reduced("median", rows, f), flower.aggregate_median(results)[0])
    close(reduced("trimmed-mean", rows, f), flower.aggregate_trimmed_avg(results, (f + 0.25) / n)[0])


# ---- laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@given(counts(), SEEDS, st.randoms(), st.floats(0.01, 100))
def test_order_does_not_matter_and_scale_comes_through(kind, shape, seed, shuffler, scale):
    n, f = shape
    rows, order = drawn(seed, n), list(range(n))
    shuffler.shuffle(order)
    found = reduced(kind, rows, f)
    close(reduced(kind, rows[order], f), found)
    close(reduced(kind, rows * np.float32(scale), f), found * scale, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ROBUST)
@given(counts(), SEEDS)
def test_moving_all_rows_moves_the_result(kind, shape, seed):
    rows, shift = drawn(seed, shape[0]), drawn(seed + 1, 1)[0]
    close(reduced(kind, rows + shift, shape[1]), reduced(kind, rows, shape[1]) + shift, atol=1e-4)


@pytest.mark.parametrize("kind", ["trimmed-mean", "meamed", "phocas", "bulyan"])
@given(st.integers(3, 9), SEEDS)
def test_without_hostile_rows_it_is_the_mean(kind, n, seed):
    rows = drawn(seed, n)
    close(aggregate(rows, kind=kind), rows.mean(axis=0))


def spoilt(rows, f, value, seed):
    """The rows with the last f replaced by +-value, at random."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (f, rows.shape[1]))
    return np.concatenate([rows[: len(rows) - f], (signs * value).astype(np.float32)])


@pytest.mark.parametrize("kind", ["median", "trimmed-mean"])
@pytest.mark.parametrize("value", [1.0, 100.0, 1e38, np.inf])
@given(counts(), SEEDS)
def test_hostile_rows_cannot_pull_it_out_of_the_honest_values(kind, value, shape, seed):
    n, f = shape
    honest = drawn(seed, n)[: n - f]
    found = reduced(kind, spoilt(drawn(seed, n), f, value, seed), f)
    assert (found >= honest.min(axis=0) - 1e-5).all()
    assert (found <= honest.max(axis=0) + 1e-5).all()


@pytest.mark.parametrize("kind", ["meamed", "phocas"])
@pytest.mark.parametrize("value", [10.0, 1e38, np.inf])
@given(counts(), SEEDS)
def test_a_hostile_value_that_is_kept_is_no_further_off_than_an_honest_one(kind, value, shape, seed):
    n, f = shape
    honest = drawn(seed, n)[: n - f]
    found = reduced(kind, spoilt(drawn(seed, n), f, value, seed), f)
    width = honest.max(axis=0) - honest.min(axis=0)  # each kept value is within it of a centre among the honest ones
    assert (found >= honest.min(axis=0) - width - 1e-5).all()
    assert (found <= honest.max(axis=0) + width + 1e-5).all()


@pytest.mark.parametrize("value", [10.0, 1e38, np.inf])
@given(counts(), SEEDS)
def test_the_majority_of_signs_never_takes_longer_steps_than_an_honest_row(value, shape, seed):
    n, f = shape
    honest = np.abs(drawn(seed, n)[: n - f])
    found = np.abs(reduced("sign-majority", spoilt(drawn(seed, n), f, value, seed), f))
    assert (found <= honest.max(axis=0) + 1e-6).all()


def test_an_equal_vote_moves_nothing_and_an_agreed_one_by_the_middle_magnitude():
    rows = np.array([[1, 1, 0], [-3, 2, 0], [5, 9, 1], [-7, -4, 0]], np.float32)
    assert reduced("sign-majority", rows, 1).tolist() == [0.0, 3.0, 0.0]


@given(st.integers(1, 9), st.data())
def test_the_nearest_values_to_any_centre_are_found(n, data):
    rows, centre = np.sort(drawn(data.draw(SEEDS), n), axis=0), 2 * drawn(data.draw(SEEDS), 1)[0]
    keep = data.draw(st.integers(1, n))
    found = nearest_mean(np.ascontiguousarray(rows.T), centre, keep)
    close(found, [literal_nearest(values, middle, keep) for values, middle in zip(rows.T.astype(float), centre)])


# ---- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["median", "sign-majority"])
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), SEEDS)
def test_whole_weights_are_repeated_rows(kind, repeats, seed):
    assume(sum(repeats) > 0)
    rows = drawn(seed, len(repeats))
    close(reduced(kind, rows, 0, repeats), literal(kind, np.repeat(rows, repeats, axis=0), 0))
    close(aggregate(rows, kind=kind, weights=repeats), literal(kind, np.repeat(rows, repeats, axis=0), 0))


def test_a_heavy_liar_is_no_majority():
    rows = np.concatenate([drawn(0, 6), np.full((1, 7), 1e6, np.float32)])
    found = aggregate(rows, kind="median", byzantine=1, weights=[1] * 6 + [1e9])
    assert (found <= rows[:6].max(axis=0)).all()


# ---- Bulyan ------------------------------------------------------------------------------------


def selected(rows, f, selection):
    names = tuple(f"row-{index:03d}" for index in range(len(rows)))
    evidence = Evidence(gram(rows), np.full(len(rows), 1 / len(rows)), f, names)
    matrix, weights = AGGREGATORS.build({"kind": "bulyan", "selection": selection}).mix(evidence)
    assert weights.tolist() == [1 / len(matrix)] * len(matrix)
    assert ((matrix == 0) | (matrix == 1)).all()
    assert (matrix.sum(axis=1) == 1).all()
    return set(matrix.argmax(axis=1).tolist()), evidence


@given(st.integers(0, 2), st.integers(0, 3), SEEDS)
def test_bulyan_repeats_krum_and_averages_around_the_median(f, more, seed):
    rows = drawn(seed, 4 * f + 3 + more)
    chosen, wanted = literal_bulyan(rows, f)
    assert selected(rows, f, "iterative")[0] == set(chosen)
    close(aggregate(rows, kind="bulyan", byzantine=f), wanted)


@given(st.integers(0, 2), st.integers(0, 3), SEEDS)
def test_bulyan_is_that_of_flower_either_way(f, more, seed):
    rows = drawn(seed, 4 * f + 3 + more)
    legacy = flower.aggregate_bulyan([([row], 1) for row in rows], f, flower.aggregate_krum, to_keep=0)[0]
    close(aggregate(rows, kind="bulyan", byzantine=f), legacy)
    chosen, evidence = selected(rows, f, "multi-krum")
    theta = len(rows) - 2 * f
    assert chosen == set(np.argsort(scores(evidence.distances, f))[:theta].tolist())
    kept = [rows[index] for index in sorted(chosen)]
    one_shot = aggregate_n_closest_weights([np.median(kept, axis=0)], [[row] for row in kept], theta - 2 * f)[0]
    close(aggregate(rows, kind="bulyan", byzantine=f, selection="multi-krum"), one_shot)


def test_the_selections_differ():
    found = [
        {name: selected(drawn(seed, 11), 2, name)[0] for name in ("iterative", "multi-krum")} for seed in range(20)
    ]
    assert any(one["iterative"] != one["multi-krum"] for one in found)


def test_bulyan_leaves_out_what_is_far_off_and_needs_enough_rows():
    rows = drawn(3, 11)
    found = aggregate(spoilt(rows, 2, 1e6, 3), kind="bulyan", byzantine=2)
    assert (np.abs(found) <= np.abs(rows[:9]).max(axis=0)).all()
    with pytest.raises(ExperimentError, match="needs 11 rows"):
        aggregate(rows[:10], kind="bulyan", byzantine=2)
    with pytest.raises(ExperimentError, match="selection"):
        aggregate(rows, kind="bulyan", selection="best")


# ---- long rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ALL, "bulyan"])
def test_mapped_rows_of_any_length_are_the_same_and_stay_as_they_are(kind, tmp_path):
    table = drawn(5, 11, 2 * BLOCK + 5)
    table.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.float32, "r", shape=table.shape)
    rule = AGGREGATORS.build({"kind": kind})
    found = columnwise(list(mapped), lambda columns: rule.reduce(columns, 2, np.full(11, 1 / 11)))
    for low in (0, BLOCK - 3, 2 * BLOCK):
        wanted = reduced(kind, table[:, low : low + 5], 2)
        np.testing.assert_array_equal(found[low : low + 5], wanted)
    assert np.array_equal(mapped, table)


@given(SEEDS, st.integers(1, 6))
def test_rows_are_mixed_or_picked_before_the_rule_sees_them(seed, many):
    rows, generator = drawn(seed, 5), np.random.default_rng(seed)
    picked = np.eye(5)[generator.integers(0, 5, many)]
    for mixing in (generator.random((many, 5)), picked, 0.5 * picked):
        found = columnwise(list(rows), lambda columns: columns.max(axis=1), mixing)
        close(found, (mixing @ rows).max(axis=0))


def test_pre_aggregators_stand_in_front():
    rows = drawn(1, 9)
    n, f = 9, 2
    apart = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    mixed = np.array([rows[np.argsort(line)[: n - f]].mean(axis=0) for line in apart])
    for kind in ALL:
        close(aggregate(rows, kind=kind, byzantine=f, pre=["nnm"]), literal(kind, mixed, f))
