"""Flag, CAF, DnC, FoolsGold and FLTrust against their papers written as loops over rows, and against hostile rows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators import build, completed
from fedge.strategies.aggregators.caf import CovarianceFilter
from fedge.strategies.aggregators.dnc import DivideAndConquer
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.aggregators.flag import EPS, FlagAggregator
from fedge.strategies.aggregators.fltrust import FLTrust
from fedge.strategies.aggregators.foolsgold import FoolsGold
from tests.oracles import byzfl

ROOT = "client-00"
RULES = {
    "flag": FlagAggregator(),
    "flag-paper": FlagAggregator(pairwise=1.0, unit=False),
    "caf": CovarianceFilter(),
    "dnc": DivideAndConquer(),
    "dnc-at-once": DivideAndConquer(at_once=True),
    "foolsgold": FoolsGold(),
    "fltrust": FLTrust(ROOT),
}
FAR = ("flag", "caf", "dnc", "fltrust")  # withstand rows of any length
EVERY = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
SEEDS = st.integers(0, 10_000)


def evidence(rows, byzantine, names=None):
    rows = np.asarray(rows, np.float64)
    count = len(rows)
    names = names or tuple(f"client-{index:02d}" for index in range(count))
    return Evidence(rows @ rows.T, np.full(count, 1 / count), byzantine, names)


def aggregate(rule, rows, byzantine=0, names=None):
    return rule.coefficients(evidence(rows, byzantine, names)) @ np.asarray(rows, np.float64)


def scattered(seed, count=8, size=12, noise=1.0):
    """Honest rows around a common mean of length 1, and that mean."""
    draw = np.random.default_rng(seed)
    mean = draw.standard_normal(size)
    mean /= np.linalg.norm(mean)
    return mean + noise * draw.standard_normal((count, size)) / math.sqrt(size), mean


# ---- the papers, in row space ------------------------------------------------------------------


def literal_flag(rows, rank, strength, iterations, unit):
    count = len(rows)
    lengths = [np.linalg.norm(row) for row in rows]
    scale = np.median(lengths) if unit else 1.0
    rows = [row / length for row, length in zip(rows, lengths)] if unit else list(rows)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    vectors = rows + [rows[i] - rows[j] for i, j in pairs]
    factors = [1.0] * count + [strength / (count - 1)] * len(pairs)
    explained = [0.0] * len(vectors)
    for _ in range(iterations):
        columns = [
            math.sqrt(factor) * (1 - v + EPS) ** -0.25 * vector / np.linalg.norm(vector)
            for factor, v, vector in zip(factors, explained, vectors)
        ]
        left, _, _ = np.linalg.svd(np.stack(columns, axis=1), full_matrices=False)
        basis = left[:, :rank]
        explained = [min(1.0, np.sum((basis.T @ vector) ** 2) / np.sum(vector**2)) for vector in vectors]
    return scale * basis @ (basis.T @ sum(rows)) / count


def literal_caf(rows, byzantine, over_all=False):
    counts, smallest, best = [1.0] * len(rows), math.inf, None
    while sum(counts) > len(rows) - 2 * byzantine:
        mean = sum(c * row for c, row in zip(counts, rows)) / sum(counts)
        covariance = sum(c * np.outer(row - mean, row - mean) for c, row in zip(counts, rows)) / sum(counts)
        values, vectors = np.linalg.eigh(covariance)
        if values[-1] < smallest:
            smallest, best = values[-1], mean
        squares = [np.dot(row - mean, vectors[:, -1]) ** 2 for row in rows]
        largest = max(square for square, c in zip(squares, counts) if over_all or c > 0)
        counts = [max(0.0, c * (1 - square / largest)) for c, square in zip(counts, squares)]
    return best


def literal_dnc(rows, dropped, at_once):
    left = list(rows)
    for _ in range(1 if at_once else dropped):
        centred = np.stack(left) - np.mean(left, axis=0)
        direction = np.linalg.svd(centred)[2][0]
        order = sorted(range(len(left)), key=lambda i: np.dot(centred[i], direction) ** 2)
        left = [left[i] for i in sorted(order[: len(left) - (dropped if at_once else 1)])]
    return np.mean(left, axis=0)


def literal_foolsgold(rows):
    count = len(rows)
    alike = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            if i != j:
                alike[i, j] = np.dot(rows[i], rows[j]) / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
    nearest = [max(alike[i].max(), 0.0) for i in range(count)]
    for i in range(count):
        for j in range(count):
            if nearest[j] > nearest[i]:
                alike[i, j] *= nearest[i] / nearest[j]
    apart = [min(1.0, 1 - alike[i].max()) for i in range(count)]
    shares = []
    for value in apart:
        relative = value / max(apart)
        shares.append(1.0 if relative == 1 else min(1.0, max(0.0, math.log(relative / (1 - relative)) + 0.5)))
    return sum(share * row for share, row in zip(shares, rows)) / sum(shares)


def literal_fltrust(rows, root):
    total, trusts = np.zeros_like(rows[0]), 0.0
    for i, row in enumerate(rows):
        if i != root:
            trust = max(0.0, np.dot(row, rows[root]) / np.linalg.norm(row) / np.linalg.norm(rows[root]))
            total += trust * np.linalg.norm(rows[root]) / np.linalg.norm(row) * row
            trusts += trust
    return total / trusts if trusts else rows[root]


@given(SEEDS, st.integers(2, 9), st.sampled_from([0.0, 0.1, 1.0]), st.booleans(), st.integers(1, 5))
def test_flag_is_the_papers_decomposition_of_long_columns(seed, count, pairwise, unit, iterations):
    rows, _ = scattered(seed, count, size=12, noise=3.0)
    rows *= np.random.default_rng(seed).uniform(0.5, 2.0, (count, 1))
    rank = math.ceil((count + 1) / 2)
    wanted = literal_flag(rows, rank, pairwise * count, iterations, unit)
    found = aggregate(FlagAggregator(pairwise=pairwise, unit=unit, iterations=iterations), rows)
    np.testing.assert_allclose(found, wanted, atol=1e-6 * np.linalg.norm(rows, axis=1).max())


def test_flag_with_a_subspace_of_ones_own_choice():
    rows, _ = scattered(3)
    for rank in (1, 2, 8, 50):
        found = aggregate(FlagAggregator(subspace=rank), rows)
        np.testing.assert_allclose(found, literal_flag(rows, min(rank, 8), 0.0, 5, unit=True), atol=1e-6)


@given(SEEDS, st.integers(0, 3), st.integers(1, 12), st.floats(0.1, 30.0))
def test_caf_is_the_papers_filter(seed, byzantine, size, far):
    rows, _ = scattered(seed, size=size)
    rows[:byzantine] *= far
    wanted = literal_caf(rows, byzantine) if byzantine else rows.mean(axis=0)
    np.testing.assert_allclose(aggregate(CovarianceFilter(), rows, byzantine), wanted, atol=1e-8 * max(1.0, far))


@given(SEEDS, st.integers(0, 3), st.booleans(), st.floats(0.1, 30.0))
def test_dnc_drops_what_the_decomposition_of_whole_rows_drops(seed, byzantine, at_once, far):
    rows, _ = scattered(seed)
    rows[:byzantine] *= far
    wanted = literal_dnc(rows, byzantine, at_once)
    np.testing.assert_allclose(aggregate(DivideAndConquer(at_once=at_once), rows, byzantine), wanted, atol=1e-9 * far)


def test_dnc_drops_a_multiple_of_f_rounded_up():
    rows, _ = scattered(5, count=9)
    for fraction, dropped in ((0.5, 1), (1.0, 2), (1.2, 3), (2.0, 4)):
        assert np.count_nonzero(DivideAndConquer(fraction).coefficients(evidence(rows, 2)) == 0) == dropped
    assert [DivideAndConquer(fraction).least(2) for fraction in (1.0, 2.5)] == [5, 6]


@given(SEEDS, st.integers(2, 8), st.floats(0.1, 3.0))
def test_foolsgold_is_the_papers_reweighting(seed, count, noise):
    rows, _ = scattered(seed, count, noise=noise)
    np.testing.assert_allclose(aggregate(FoolsGold(), rows), literal_foolsgold(rows), atol=1e-7)


def test_foolsgold_silences_those_who_say_the_same():
    rows, _ = scattered(2, noise=3.0)
    rows[:3] = -2.0 * rows[3]
    shares = FoolsGold().coefficients(evidence(rows, 3))
    assert np.array_equal(shares[:3], np.zeros(3))
    assert shares[3:].min() > 0.1
    assert shares.sum() == pytest.approx(1.0)


@given(SEEDS, st.integers(2, 8), st.floats(0.1, 3.0))
def test_fltrust_is_the_papers_weighted_sum(seed, count, noise):
    rows, _ = scattered(seed, count, noise=noise)
    names = tuple(f"client-{index:02d}" for index in range(count))
    for root in (0, count - 1):
        found = aggregate(FLTrust(names[root]), rows, names=names)
        np.testing.assert_allclose(found, literal_fltrust(list(rows), root), atol=1e-9)


# ---- byzfl -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_in_one_dimension_caf_is_byzfls_but_for_the_rows_it_has_dropped(seed):
    # In one dimension there is one direction, which a step of the power method from any start finds.
    rows = np.random.default_rng(seed).standard_normal((9, 1))
    np.testing.assert_allclose(literal_caf(rows, 2, over_all=True), byzfl.CAF(2)(rows), atol=1e-9)
    np.testing.assert_allclose(aggregate(CovarianceFilter(), rows, 1), literal_caf(rows, 1), atol=1e-9)


def test_caf_agrees_with_byzfl_where_one_pass_is_enough():
    rows = np.array([[-1.0], [0.0], [1.0]]) * np.array([3.0, 1.0, 2.0]) + 5.0  # on a line
    np.testing.assert_allclose(aggregate(CovarianceFilter(), rows, 1), byzfl.CAF(1)(rows))
    assert byzfl.CAF(0)(rows) is None
    np.testing.assert_allclose(aggregate(CovarianceFilter(), rows, 0), rows.mean(axis=0))


# ---- laws --------------------------------------------------------------------------------------


@EVERY
@settings(max_examples=20)
@given(SEEDS, st.randoms())
def test_the_order_of_rows_does_not_matter(rule, seed, shuffler):
    rows, _ = scattered(seed)
    rows[:2] *= 5.0
    order = list(range(1, len(rows)))
    shuffler.shuffle(order)
    again = aggregate(rule, rows[[0, *order]], 2)
    np.testing.assert_allclose(again, aggregate(rule, rows, 2), atol=1e-6)


@EVERY
@settings(max_examples=20)
@given(SEEDS, st.sampled_from([2.0**-40, 2.0**-7, 2.0**13, 2.0**40]))
def test_in_other_units_it_is_the_same_result(rule, seed, scale):
    rows, _ = scattered(seed)
    rows[:2] *= 5.0
    np.testing.assert_allclose(aggregate(rule, scale * rows, 2) / scale, aggregate(rule, rows, 2), atol=1e-6)


@EVERY
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("byzantine", [0, 3])
def test_equal_rows_come_back(rule, count, byzantine):
    row, _ = scattered(1, count=1)
    byzantine = min(byzantine, (count - 1) // 2)
    np.testing.assert_allclose(aggregate(rule, np.repeat(row, count, axis=0), byzantine), row[0], atol=1e-7)


@EVERY
def test_rows_of_zeros_give_zeros(rule):
    assert np.array_equal(aggregate(rule, np.zeros((5, 3)), 1), np.zeros(3))


@EVERY
def test_two_equal_rows_and_a_row_of_zeros_among_others_are_no_harm(rule):
    rows, mean = scattered(4, noise=0.5)
    rows[3], rows[4] = rows[2], 0.0
    found = aggregate(rule, rows, 1)
    assert np.isfinite(found).all()
    # With lambda = n the paper's subspace holds differences, and the common direction only by the way.
    assert np.dot(found, mean) > (-0.5 if rule == RULES["flag-paper"] else 0.5)


@pytest.mark.parametrize("rule", [CovarianceFilter(), DivideAndConquer(), DivideAndConquer(at_once=True)])
@given(seed=SEEDS)
def test_without_hostile_rows_it_is_the_mean_and_moves_along_with_the_rows(rule, seed):
    rows, _ = scattered(seed)
    np.testing.assert_allclose(aggregate(rule, rows, 0), rows.mean(axis=0), atol=1e-12)
    shift = 3.0 * np.ones(rows.shape[1])
    np.testing.assert_allclose(aggregate(rule, rows + shift, 2), aggregate(rule, rows, 2) + shift, atol=1e-6)


@pytest.mark.parametrize("rule", [CovarianceFilter(), DivideAndConquer(), FoolsGold()])
@given(seed=SEEDS)
def test_the_result_lies_between_the_rows(rule, seed):
    rows, _ = scattered(seed)
    coefficients = rule.coefficients(evidence(rows, 2))
    assert coefficients.min() >= 0
    assert coefficients.sum() == pytest.approx(1.0)


# ---- hostile rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAR)
@given(
    seed=SEEDS,
    lengths=st.lists(st.sampled_from([0.0, 1.0, 1e3, 1e9, 1e15]), min_size=4, max_size=4),
    directions=st.sampled_from(["one", "opposed", "any"]),
)
def test_f_rows_of_any_length_stay_bounded(name, seed, lengths, directions):
    rows, _ = scattered(seed, count=11, size=20)
    draw = np.random.default_rng(seed)
    hostile = draw.standard_normal((4, 20))
    if directions != "any":
        hostile[:] = -rows[4:].mean(axis=0) if directions == "opposed" else hostile[0]
    hostile *= np.array(lengths)[:, None] / np.linalg.norm(hostile, axis=1, keepdims=True)
    rule = FLTrust("client-10") if name == "fltrust" else RULES[name]
    found = aggregate(rule, np.concatenate([hostile, rows[4:]]), 4)
    assert np.linalg.norm(found) <= 4.0 * np.linalg.norm(rows[4:], axis=1).max()


def test_a_row_without_limits_moves_the_papers_flag_and_foolsgold_at_will():
    rows, _ = scattered(6)
    rows[0] *= -1e9
    for name in ("flag-paper", "foolsgold"):
        assert np.linalg.norm(aggregate(RULES[name], rows, 1)) > 1e6


def test_two_rows_evade_dnc_at_once_and_not_one_by_one():
    rows = np.zeros((10, 3))
    rows[2:] = np.random.default_rng(0).standard_normal((8, 3))
    rows[0] = [1e9, 0.0, 0.0]
    rows[1] = [1e9 / 9, 1e8, 0.0]  # in the middle along the direction that the first one sets
    assert np.linalg.norm(aggregate(DivideAndConquer(at_once=True), rows, 2)) > 1e6
    np.testing.assert_allclose(aggregate(DivideAndConquer(), rows, 2), rows[2:].mean(axis=0), atol=1e-6)


def test_caf_finds_colluders_within_the_noise():
    draw = np.random.default_rng(1)
    honest = draw.standard_normal((16, 2000)) / math.sqrt(2000)
    hostile = np.repeat((honest.mean(axis=0) - 1.5 * honest.std(axis=0))[None], 4, axis=0)
    found = aggregate(CovarianceFilter(), np.concatenate([hostile, honest]), 4)
    assert np.linalg.norm(found - honest.mean(axis=0)) < 0.2 * np.linalg.norm(hostile.mean(axis=0))


def cosine(one, other):
    return np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.mark.parametrize("seed", range(3))
def test_flags_defaults_keep_the_honest_direction_and_lambda_of_n_does_not(seed):
    rows, mean = scattered(seed, count=20, size=2000, noise=3.3)
    plain = cosine(rows.mean(axis=0), mean)
    found = aggregate(FlagAggregator(), rows)
    assert cosine(found, mean) > 0.85 * plain
    assert 0.5 < np.linalg.norm(found) / np.linalg.norm(rows.mean(axis=0)) < 2.0
    assert cosine(aggregate(FlagAggregator(pairwise=1.0), rows), mean) < 0.5 * plain


def test_fltrust_survives_a_majority_and_falls_back_on_the_root():
    rows, _ = scattered(7, noise=0.3)
    rows[:6] = -1e15 * rows[7]
    rule = FLTrust("client-07")
    found = aggregate(rule, rows, 6)
    assert cosine(found, rows[7]) > 0.5
    rows[:7] = -rows[7]
    np.testing.assert_array_equal(aggregate(rule, rows, 7), rows[7])
    np.testing.assert_array_equal(aggregate(rule, rows[7:], 0, ("client-07",)), rows[7])


def test_fltrust_says_what_it_misses():
    with pytest.raises(ExperimentError, match="run a client on the server's machine"):
        FLTrust()
    rule = FLTrust("lab")
    assert rule.lacks(["a", "b"]) == "the update of the root client 'lab'"
    assert rule.lacks(["a", "lab"]) == ""
    assert rule.least(7) == 1
    with pytest.raises(ExperimentError, match="'lab' is lost behind what merges rows"):
        rule.coefficients(evidence(np.eye(3), 0))


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ({"kind": "flag", "subspace": -1}, "server.aggregator.subspace: must be at least 0, not -1"),
        ({"kind": "flag", "pairwise": -0.5}, "server.aggregator.pairwise: must be at least 0, not -0.5"),
        ({"kind": "flag", "iterations": 0}, "server.aggregator.iterations: must be at least 1, not 0"),
        ({"kind": "dnc", "fraction": 0.0}, "server.aggregator.fraction: must be above 0, not 0.0"),
        ({"kind": "fltrust"}, "server.aggregator.root: name the client"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(table, what):
    with pytest.raises(ExperimentError, match=what):
        build(table)


@pytest.mark.parametrize("kind", ["flag", "caf", "dnc", "foolsgold", "fltrust"])
def test_the_registry_builds_a_whole_aggregator(kind):
    table = {"kind": kind, "byzantine": 1} | ({"root": "c0"} if kind == "fltrust" else {})
    rule = build(table)
    rows = np.stack(scattered(8, count=7)[0]).astype(np.float32)
    state = rule.init(rows.shape[1])
    for row in rows:
        state = rule.fold(state, row, 1.0)
    outcome = rule.finish(state, [f"c{index}" for index in range(7)], rule.memory(), 0)
    assert outcome.vector.dtype == np.float32
    wanted = aggregate(rule.rule, rows, 1, tuple(f"c{index}" for index in range(7)))
    np.testing.assert_allclose(outcome.vector, wanted, atol=1e-5)
    assert not rule.honours_weights
    assert completed(table)["kind"] == kind
