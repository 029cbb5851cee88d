"""Rules and pre-aggregators that see inner products only: against their formulas on rows, and their laws.

Here a rule is applied to rows in float64, [n, d]; what float32 does to the products is tested with the products.
"""

import itertools

import numpy as np
import pytest
from flwr.server.strategy.aggregate import aggregate_krum
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedge import aggregate
from fedge.core.errors import ExperimentError
from fedge.core.random import generator
from fedge.strategies.aggregators import AGGREGATORS, mda
from fedge.strategies.aggregators.average import Average
from fedge.strategies.aggregators.centered_clipping import CenteredClipping
from fedge.strategies.aggregators.evidence import Mixing
from fedge.strategies.aggregators.geometric_median import GeometricMedian, middle
from fedge.strategies.aggregators.krum import Krum, MultiKrum
from fedge.strategies.aggregators.mda import MinimumDiameterAveraging
from fedge.strategies.preaggregators import PREAGGREGATORS
from fedge.strategies.preaggregators.arc import AdaptiveRobustClipping
from fedge.strategies.preaggregators.basgd import Buckets
from fedge.strategies.preaggregators.bucketing import Bucketing
from fedge.strategies.preaggregators.clip import Clip
from fedge.strategies.preaggregators.nnm import NearestNeighbourMixing
from tests.literal_rules import (
    evidence,
    gap,
    krum_scores,
    literal_arc,
    literal_bucketing,
    literal_buckets,
    literal_centered_clipping,
    literal_clip,
    literal_geometric_median,
    literal_krum,
    literal_mda,
    literal_middle,
    literal_multi_krum,
    literal_nnm,
    same,
    subsets,
)
from tests.oracles import byzfl

RULES = [Krum(), MultiKrum(), MinimumDiameterAveraging(), GeometricMedian(), CenteredClipping()]
MOVABLE = RULES[:4]  # CenteredClipping starts at 0, and so depends on where 0 is
SAME_COUNT = [NearestNeighbourMixing(), Clip(), AdaptiveRobustClipping()]
SMOOTH = [Average(), GeometricMedian(), CenteredClipping()]  # no selection, so that ties behind a mixing do not show
PRE = [*SAME_COUNT, Bucketing(), Buckets(5)]

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
each_pre = pytest.mark.parametrize("pre", PRE, ids=lambda pre: type(pre).__name__)
few, many = settings(max_examples=25, deadline=None), settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32)
sizes = st.sampled_from([1, 2, 3, 40])  # d below and above n


def apply(rule, rows, f=0, weights=None, pre=(), names=None, seed=0):
    """The aggregate [d], by way of the inner products alone."""
    seen, mixing = evidence(rows, f, weights, names, seed), np.eye(len(rows))
    for step in pre:
        matrix, shares = step.mix(seen)
        seen, mixing = seen.mixed(matrix, shares), matrix @ mixing
    return rule.coefficients(seen) @ mixing @ rows


@st.composite
def cases(draw, sizes=sizes, least=3):
    """(rows [n, d], f, weights [n]) with n >= 2 f + 3, so that every rule will do."""
    f = draw(st.integers(0, 2))
    n = draw(st.integers(max(least, 2 * f + 3), 9))
    random = np.random.default_rng(draw(seeds))
    return random.standard_normal((n, draw(sizes))) + random.standard_normal(), f, random.uniform(0.5, 1.5, n)


# ---- the formulas on rows ----------------------------------------------------------------------


LITERAL = [literal_krum, literal_multi_krum, literal_mda, literal_geometric_median, literal_centered_clipping]


@pytest.mark.parametrize(
    ("rule", "literal"),
    [*zip([*RULES[:3], GeometricMedian(60), RULES[4]], LITERAL)],
    ids=lambda item: getattr(item, "__name__", ""),
)
@many
@given(case=cases())
def test_a_rule_is_its_formula(rule, literal, case):
    rows, f, weights = case
    shares = weights / weights.sum() if rule.honours_weights else np.full(len(rows), 1 / len(rows))
    same(apply(rule, rows, f, weights), literal(rows, f, shares), rtol=1e-5)


@pytest.mark.parametrize("f", [3, 4])
def test_mda_finds_the_best_of_all_subsets_where_a_guess_would_not(f):
    """Random rows for which leaving out the f rows farthest from the mean, say, is not the answer."""
    guessed = 0
    for seed in range(30):
        rows = np.random.default_rng(seed).standard_normal((2 * f + 2, 3))
        found = MinimumDiameterAveraging().coefficients(evidence(rows, f))
        chosen = tuple(np.flatnonzero(found).tolist())
        assert chosen == min(subsets(rows, f))[2]
        same(found[list(chosen)], 1 / (f + 2))
        far = np.argsort(np.linalg.norm(rows - rows.mean(axis=0), axis=1))
        guessed += set(chosen) == set(far[: f + 2].tolist())
    assert guessed < 30


def test_mda_looks_at_no_more_subsets_than_it_says():
    """f pairs of far rows: every choice of one from each has to be looked at, and one has the smallest sum."""
    f = 6
    rows = np.zeros((2 * f + 1, f))
    for pair in range(f):
        rows[2 * pair, pair], rows[2 * pair + 1, pair] = 10.0 + pair / 10, -10.0
    kept = np.flatnonzero(MinimumDiameterAveraging().coefficients(evidence(rows, f)))
    assert kept.tolist() == [1, 3, 5, 7, 9, 11, 12]


LITERAL_PRE = [literal_nnm, literal_clip, literal_arc, literal_bucketing, literal_buckets]


@pytest.mark.parametrize(("pre", "literal"), [*zip(PRE, LITERAL_PRE)], ids=lambda item: getattr(item, "__name__", ""))
@many
@given(case=cases())
def test_a_pre_aggregator_is_its_formula(pre, literal, case):
    rows, f, weights = case
    matrix, shares = pre.mix(evidence(rows, f, weights))
    wanted, wanted_shares = literal(rows, f, weights / weights.sum())
    same(matrix @ rows, np.array(wanted))
    same(shares, wanted_shares)
    assert (matrix >= 0).all()
    same(shares.sum(), 1.0)


# ---- laws of rules -----------------------------------------------------------------------------


@each_rule
@many
@given(case=cases(least=4), shuffler=st.randoms())
def test_the_order_of_rows_does_not_matter(rule, case, shuffler):
    rows, f, weights = case
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    same(apply(rule, rows[order], f, weights[order]), apply(rule, rows, f, weights), rtol=1e-5)


@each_pre
@pytest.mark.parametrize("rule", SMOOTH, ids=lambda rule: type(rule).__name__)
@few
@given(case=cases(), shuffler=st.randoms())
def test_the_order_of_rows_does_not_matter_in_front_of_a_rule(rule, pre, case, shuffler):
    if isinstance(pre, Bucketing):  # draws by place
        return
    rows, f, weights = case
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    names = [f"client-{index:02d}" for index in order]
    found = apply(rule, rows[order], f, weights[order], (pre,), names)
    same(found, apply(rule, rows, f, weights, (pre,)), rtol=1e-5)


@pytest.mark.parametrize("rule", MOVABLE, ids=lambda rule: type(rule).__name__)
@many
@given(case=cases(least=4), move=seeds)
def test_moving_all_rows_moves_the_result(rule, case, move):
    rows, f, weights = case
    shift = np.random.default_rng(move).standard_normal(rows.shape[1])
    same(apply(rule, rows + shift, f, weights), apply(rule, rows, f, weights) + shift, rtol=1e-5)


@pytest.mark.parametrize("pre", [NearestNeighbourMixing(), Bucketing(), Buckets(5)], ids=["nnm", "bucketing", "basgd"])
@pytest.mark.parametrize("rule", SMOOTH[:2], ids=lambda rule: type(rule).__name__)
@few
@given(case=cases(), move=seeds)
def test_moving_all_rows_moves_the_result_behind_a_mean(rule, pre, case, move):
    rows, f, weights = case
    shift = np.random.default_rng(move).standard_normal(rows.shape[1])
    found = apply(rule, rows + shift, f, weights, (pre,))
    same(found, apply(rule, rows, f, weights, (pre,)) + shift, rtol=1e-5)


@each_rule
@many
@given(case=cases(least=4), scale=st.sampled_from([1e-12, 1e-3, 0.5, 2.0, 1e9]))
def test_scaling_all_rows_scales_the_result(rule, case, scale):
    rows, f, weights = case
    same(apply(rule, scale * rows, f, weights) / scale, apply(rule, rows, f, weights), rtol=1e-5)


@each_pre
@pytest.mark.parametrize("rule", SMOOTH, ids=lambda rule: type(rule).__name__)
@few
@given(case=cases(), scale=st.sampled_from([1e-12, 1e-3, 0.5, 2.0, 1e9]))
def test_scaling_all_rows_scales_the_result_behind_any_matrix(rule, pre, case, scale):
    rows, f, weights = case
    found = apply(rule, scale * rows, f, weights, (pre,)) / scale
    same(found, apply(rule, rows, f, weights, (pre,)), rtol=1e-5)


@each_rule
@many
@given(case=cases(), size=st.sampled_from([1.0, 1e6, 1e15]))
def test_the_result_lies_in_the_hull_of_the_rows(rule, case, size):
    rows, f, weights = case
    rows[: f or 1] *= size
    found = rule.coefficients(evidence(rows, f, weights))
    assert (found >= 0).all()
    total = found.sum()
    if isinstance(rule, CenteredClipping):
        assert 0 < total <= 1 + 1e-12  # of the rows and 0
    else:
        same(total, 1.0, rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "pre"),
    [
        (MultiKrum(), ()),
        (MinimumDiameterAveraging(), ()),
        (Average(), (NearestNeighbourMixing(),)),
        (Average(), (AdaptiveRobustClipping(),)),
        (MultiKrum(), (NearestNeighbourMixing(),)),
    ],
)
@many
@given(case=cases())
def test_with_nobody_hostile_it_is_the_mean(rule, pre, case):
    rows = case[0]
    same(apply(rule, rows, 0, pre=pre), rows.mean(axis=0))


@each_rule
@each_pre
def test_equal_rows_come_back(rule, pre):
    row = np.random.default_rng(1).standard_normal(6)
    rows = np.tile(row, (10, 1))
    same(apply(rule, rows, 1), row)
    same(apply(rule, rows, 1, pre=(pre,)), row)
    assert not apply(rule, 0 * rows, 1, pre=(pre,)).any()


HOSTILE = {
    "one point": lambda random, f, d: np.tile(random.standard_normal(d), (f, 1)),
    "all directions": lambda random, f, d: random.standard_normal((f, d)),
    "one line": lambda random, f, d: np.outer(np.arange(1, f + 1), random.standard_normal(d)),
    "all sizes": lambda random, f, d: random.standard_normal((f, d)) * np.logspace(-15, 0, f)[:, None],
}


@each_rule
@pytest.mark.parametrize("pre", [None, *PRE], ids=lambda pre: type(pre).__name__)
@few
@given(case=seeds, kind=st.sampled_from(sorted(HOSTILE)), size=st.integers(0, 15), f=st.integers(1, 3))
def test_f_rows_of_any_size_move_it_no_further_than_a_constant(rule, pre, case, kind, size, f):
    random, d = np.random.default_rng(case), 8
    chain = () if pre is None else (Buckets(2 * f + 3) if isinstance(pre, Buckets) else pre,)
    n = rule.least(f)
    for step in chain:
        n = step.least(n, f)
    honest = random.standard_normal((n - f, d)) + random.standard_normal(d)
    bad = 10.0**size * HOSTILE[kind](random, f, d)
    order = random.permutation(n)
    weights = np.concatenate([np.full(f, 1.1), np.ones(n - f)])[order]  # hostile rows below one half of the weight
    assume(1.1 * f < 0.5 * weights.sum())
    found = apply(rule, np.concatenate([bad, honest])[order], f, weights, chain, seed=case)
    reach = max(gap(row, 0.0) for row in honest)
    assert gap(found, 0.0) <= 3 * reach


@pytest.mark.parametrize("rule", [GeometricMedian(), CenteredClipping()], ids=lambda rule: type(rule).__name__)
@many
@given(case=cases(sizes=st.sampled_from([2, 3, 40])), counts=st.lists(st.integers(1, 3), min_size=9, max_size=9))
def test_a_weight_is_that_many_rows(rule, case, counts):
    """Not on a line, where every point between two halves of the weight is a geometric median."""
    rows = case[0]
    counts = np.array(counts[: len(rows)])
    found = apply(rule, rows, weights=counts)
    same(found, apply(rule, np.repeat(rows, counts, axis=0)), rtol=1e-5)
    assert rule.honours_weights


@pytest.mark.parametrize("rule", [GeometricMedian(), CenteredClipping()], ids=lambda rule: type(rule).__name__)
def test_a_row_without_weight_has_no_part(rule):
    rows = np.random.default_rng(3).standard_normal((7, 4))
    found = rule.coefficients(evidence(rows, 1, [1, 1, 0, 1, 1, 2, 1]))
    assert found[2] == 0
    assert (np.delete(found, 2) > 0).all()


@pytest.mark.parametrize(
    "rule", [Krum(), MultiKrum(), MinimumDiameterAveraging()], ids=lambda rule: type(rule).__name__
)
def test_a_rule_that_ignores_weights_ignores_them(rule):
    rows = np.random.default_rng(4).standard_normal((9, 4))
    assert not rule.honours_weights
    assert np.array_equal(apply(rule, rows, 2), apply(rule, rows, 2, np.arange(1, 10)))


# ---- single rules ------------------------------------------------------------------------------


@many
@given(case=cases(sizes=st.sampled_from([2, 3, 40])))
def test_at_the_geometric_median_the_pulls_cancel(case):
    """Sum of w_i (x_i - z) / |x_i - z| is 0, or z is at a row whose weight is at least the others' pull."""
    rows, _, weights = case
    shares = weights / weights.sum()
    z = apply(GeometricMedian(), rows, weights=weights)
    gaps = np.array([gap(row, z) for row in rows])
    at = gaps < 2e-3 * np.median(gaps)
    pull = sum(share * (row - z) / far for share, row, far in zip(shares[~at], rows[~at], gaps[~at]))
    assert gap(pull, 0.0) <= shares[at].sum() + 1e-3


def test_half_of_the_weight_in_one_point_is_the_geometric_median():
    rows = np.random.default_rng(5).standard_normal((6, 3))
    rows[[1, 4, 5]] = rows[1]
    found = GeometricMedian().coefficients(evidence(rows, 2, [1, 2, 1, 1, 2, 1]))
    same(found, np.array([0, 0.4, 0, 0, 0.4, 0.2]))


@many
@given(case=cases())
def test_the_middle_is_the_weighted_median(case):
    rows, _, weights = case
    shares = weights / weights.sum()
    assert middle(rows[:, 0], shares) == literal_middle(rows[:, 0].tolist(), shares.tolist())


def test_the_middle_of_equal_weights_is_the_lower_median_whatever_their_sum_rounds_to():
    for count in range(1, 60):
        for half in (0, 1):
            values = np.random.default_rng(count + half).permutation(count).astype(float)
            assert middle(values, np.full(count, 1 / count)) == (count - 1) // 2


def test_centered_clipping_with_a_large_radius_is_the_mean_and_with_a_small_one_hardly_moves():
    rows = np.random.default_rng(6).standard_normal((8, 5)) + 3.0
    same(apply(CenteredClipping(1, 1e6), rows), rows.mean(axis=0))
    small = apply(CenteredClipping(1, 1e-3), rows)
    same(small, 1e-3 * np.median(np.sort(np.linalg.norm(rows, axis=1))[:7]) * _unit_mean(rows))
    assert gap(apply(CenteredClipping(20), rows), rows.mean(axis=0)) < 0.3


def _unit_mean(rows):
    return (rows / np.linalg.norm(rows, axis=1)[:, None]).mean(axis=0)


def test_multi_krum_keeps_as_many_as_asked():
    rows = np.random.default_rng(7).standard_normal((9, 5))
    found = MultiKrum(keep=3).coefficients(evidence(rows, 2))
    assert sorted(found.tolist()) == [0.0] * 6 + [1 / 3] * 3
    assert np.array_equal(apply(MultiKrum(keep=1), rows, 2), apply(Krum(), rows, 2))
    assert MultiKrum(keep=9).least(2) == 11


# ---- other implementations ---------------------------------------------------------------------


@many
@given(case=cases())
def test_krum_and_multi_krum_are_flower_s(case):
    rows, f, _ = case
    results = [([row], 1) for row in rows]
    same(apply(Krum(), rows, f), aggregate_krum(results, f, 0)[0])
    same(apply(MultiKrum(), rows, f), aggregate_krum(results, f, len(rows) - f)[0])


def test_byzfl_s_krum_counts_one_neighbour_more():
    """n - f - 1 of them; on these rows that chooses another row than the paper's n - f - 2, and than Flower's."""
    rows, f = np.array([[0.0], [0.9], [1.0], [2.05], [3.2]]), 1
    assert [index for index in range(5) if rows[index] == apply(Krum(), rows, f)] == [1]
    assert aggregate_krum([([row], 1) for row in rows], f, 0)[0] == rows[1]
    assert byzfl.Krum(f)(rows) == rows[2]
    more = krum_scores(rows, len(rows) - f - 1)
    assert more.index(min(more)) == 2


@many
@given(case=cases())
def test_mda_is_byzfl_s_where_one_subset_is_best(case):
    rows, f, _ = case
    ranked = sorted(subsets(rows, f))
    unique = len(ranked) == 1 or ranked[1][0] > ranked[0][0]
    theirs = byzfl.MDA(f)(rows)
    if unique:
        same(apply(MinimumDiameterAveraging(), rows, f), theirs)
    else:  # theirs is the mean of one of the best
        best = [rows[list(chosen)].mean(axis=0) for diameter, _, chosen in ranked if diameter == ranked[0][0]]
        assert min(gap(mean, theirs) for mean in best) < 1e-9


@few
@given(case=cases(sizes=st.sampled_from([2, 3, 40])))
def test_byzfl_s_geometric_median_gets_there_with_enough_steps(case):
    """Its defaults are 3 steps from 0, and a row nearer than 0.1 pulls no harder, in whatever units the rows are."""
    rows = case[0]
    theirs = byzfl.GeometricMedian(nu=1e-9, T=500)(rows)
    ours = apply(GeometricMedian(), rows)
    sums = [np.linalg.norm(rows - z, axis=1).sum() for z in (ours, theirs)]
    same(sums[0], sums[1], rtol=1e-3)


def test_byzfl_s_absolute_bounds_depend_on_the_units():
    rows = np.random.default_rng(11).standard_normal((9, 5)) + 1.0
    rows[0] = 1e3
    bound = byzfl.GeometricMedian()
    assert gap(bound(1e-3 * rows) / 1e-3, bound(rows)) > 10  # all rows within 0.1: nearly the mean
    same(apply(GeometricMedian(), 1e-3 * rows, 1) / 1e-3, apply(GeometricMedian(), rows, 1), rtol=1e-6)
    same(byzfl.CenteredClipping(tau=1e4)(rows), rows.mean(axis=0))


@many
@given(case=cases(sizes=st.sampled_from([2, 3, 40])), steps=st.integers(1, 3))
def test_centered_clipping_is_byzfl_s_with_the_radius_of_each_step(case, steps):
    """Not on a line, where v may meet a row, and theirs divides by the distance."""
    rows = case[0]
    v = np.zeros(rows.shape[1])
    for step in range(steps):
        theirs = byzfl.CenteredClipping(
            L=1, tau=middle(np.linalg.norm(rows - v, axis=1), np.full(len(rows), 1 / len(rows)))
        )
        theirs.m = v
        v = theirs(rows)
        same(apply(CenteredClipping(step + 1), rows), v, rtol=1e-6)


@many
@given(case=cases())
def test_mixing_and_clipping_are_byzfl_s(case):
    rows, f, _ = case
    norms = np.linalg.norm(rows, axis=1)
    for ours, theirs in (
        (NearestNeighbourMixing(), byzfl.NNM(f)),
        (AdaptiveRobustClipping(), byzfl.ARC(f)),
        (Clip(), byzfl.Clipping(float(np.median(norms)))),
    ):
        same(ours.mix(evidence(rows, f))[0] @ rows, theirs(rows.copy()))


def test_bucketing_is_byzfl_s_with_the_same_order(monkeypatch):
    rows = np.random.default_rng(12).standard_normal((9, 4))
    places = generator(5, "bucketing").permutation(9)
    monkeypatch.setattr(np.random, "permutation", lambda table: table[np.argsort(places)])
    theirs = byzfl.Bucketing(2)(rows)
    ours = Bucketing(2).mix(evidence(rows, seed=5))[0] @ rows
    same(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


# ---- as users meet them ------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, "nnm", "clip", "arc", "bucketing", "basgd"])
@pytest.mark.parametrize("kind", ["krum", "multi-krum", "mda", "geometric-median", "centered-clipping"])
def test_rows_in_float32_come_to_the_same(kind, step):
    rows = np.random.default_rng(13).standard_normal((20, 50)).astype(np.float32)
    rows[:2] *= 100
    found = aggregate(rows, kind, byzantine=2, pre=[step] if step else [], seed=3)
    pre = (PREAGGREGATORS.build({"kind": step}),) if step else ()
    wanted = apply(AGGREGATORS.build({"kind": kind}), rows.astype(np.float64), 2, pre=pre, seed=3)
    same(found, wanted, rtol=1e-4)


# ---- what they ask for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("multi-krum", {"keep": -1}, "keep: must be at least 0, not -1"),
        ("geometric-median", {"iterations": 0}, "iterations: must be at least 1, not 0"),
        ("geometric-median", {"smoothing": 0.0}, "smoothing: must be above 0 and at most 1, not 0"),
        ("geometric-median", {"smoothing": 1.5}, "share of the median distance"),
        ("centered-clipping", {"iterations": 0}, "iterations: must be at least 1, not 0"),
        ("centered-clipping", {"radius": 0.0}, "radius: must be above 0 and finite, not 0"),
        ("centered-clipping", {"radius": float("nan")}, "radius: must be above 0 and finite, not nan"),
        ("bucketing", {"size": 0}, "at least 1 row, not 0"),
        ("clip", {"factor": 0.0}, "factor: must be above 0 and finite, not 0"),
        ("clip", {"factor": float("inf")}, "factor: must be above 0 and finite, not inf"),
        ("basgd", {"buckets": 0}, "buckets: must be at least 1, not 0"),
    ],
)
def test_a_bad_setting_is_refused_in_words(kind, settings, words):
    registry = AGGREGATORS if kind in AGGREGATORS.entries else PREAGGREGATORS
    with pytest.raises(ExperimentError, match=words):
        registry.build({"kind": kind, **settings})


def test_the_kinds_are_registered():
    kinds = ("krum", "multi-krum", "mda", "geometric-median", "centered-clipping")
    assert [AGGREGATORS.build({"kind": kind}) for kind in kinds] == RULES
    kinds = ("nnm", "clip", "arc", "bucketing", "basgd")
    built = [PREAGGREGATORS.build({"kind": kind}) for kind in kinds]
    assert built == [*PRE[:4], Buckets(10)]
    assert all(isinstance(step, Mixing) for step in built)


def test_how_many_rows_each_asks_for():
    assert [rule.least(3) for rule in RULES] == [9, 9, 7, 7, 7]
    assert [step.least(4, 3) for step in SAME_COUNT] == [7, 7, 7]
    assert [step.least(9, 3) for step in SAME_COUNT] == [9, 9, 9]
    for size, needed in itertools.product((1, 2, 3), (1, 2, 5)):
        count = Bucketing(size).least(needed, 1)
        behind = [len(Bucketing(size).mix(evidence(np.eye(rows)))[0]) for rows in (count - 1, count) if rows]
        assert behind[-1] == needed
        assert behind[0] == needed - (len(behind) == 2)


def test_too_many_hostile_rows_for_mda_are_refused_and_as_many_as_it_says_are_not():
    assert mda.MAX_SUBSETS == 2**16
    assert MinimumDiameterAveraging().least(16) == 33
    with pytest.raises(ExperimentError, match="at most 16, not 17"):
        MinimumDiameterAveraging().least(17)


def test_too_few_buckets_for_the_rule_behind_are_refused_with_the_number_that_works():
    assert Buckets(9).least(9, 3) == 9
    assert Buckets(12).least(9, 3) == 12
    with pytest.raises(ExperimentError, match="with byzantine = 3 .* needs 9 rows.* set buckets to at least 9"):
        Buckets(8).least(9, 3)
