"""What holds for every robust rule: order of arrival, hostile rows, weights, memory; and how a chain is built."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedge
from fedge.core import state as codec
from fedge.core.errors import ExperimentError, StrategyError
from fedge.strategies import aggregators
from fedge.strategies.aggregators import AGGREGATORS, robust
from fedge.strategies.aggregators.robust import Memory, Robust, Rows

F, N = 2, 13  # enough rows for every rule: Bulyan needs 4 f + 3
SIZE = 3001
MORE = {"fltrust": {"root": "c03"}, "gas": {"splits": 7}}
RULES = sorted(AGGREGATORS.entries.keys() - {"mean", "local-clipping"})
ROBUST = [kind for kind in RULES if kind not in ("average", "foolsgold")]  # FoolsGold looks at directions alone


def table(count=N, size=SIZE, seed=0, spread=1.0):
    random = np.random.default_rng(seed)
    return (1.0 + spread * random.standard_normal((count, size))).astype(np.float32)


def names(count=N):
    return [f"c{index:02d}" for index in range(count)]


def rule(kind, byzantine=F, **more):
    return aggregators.build({"kind": kind, "byzantine": byzantine, **MORE.get(kind, {}), **more})


def folded(aggregator, rows, weights=None):
    state = aggregator.init(rows[0].size)
    for row, weight in zip(rows, weights or [1.0] * len(rows)):
        state = aggregator.fold(state, row, weight)
    return state


def finished(aggregator, rows, clients, weights=None):
    state = folded(aggregator, rows, weights)
    return aggregator.finish(state, list(clients), aggregator.memory(), 5)


@pytest.mark.parametrize("pre", [[], ["nnm"], ["arc"], ["bucketing"]], ids=str)
@pytest.mark.parametrize("kind", RULES)
def test_the_order_of_arrival_changes_no_bit(kind, pre):
    if pre and kind in ("fltrust", "bulyan"):
        pre = []  # mixing hides the trusted row; two rows in a bucket leave too few for Bulyan
    aggregator = rule(kind, pre=pre, byzantine=1)
    rows, clients = table(), names()
    weights = [1.0 + index % 3 for index in range(N)] if aggregator.honours_weights else [1.0] * N
    wanted = finished(aggregator, rows, clients, weights)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(N)
        parts = [order[: 4 + seed], order[4 + seed :]]
        states = [folded(aggregator, rows[part], [weights[index] for index in part]) for part in parts]
        whole = aggregator.merge(*states)
        found = aggregator.finish(whole, [clients[index] for index in order], aggregator.memory(), 5)
        assert found.vector.tobytes() == wanted.vector.tobytes()
        assert found.verdicts == wanted.verdicts


@pytest.mark.parametrize("kind", ROBUST)
@pytest.mark.parametrize("size", [1e6, 1e15])
def test_f_hostile_rows_move_it_no_further_than_honest_ones_reach(kind, size):
    rows = table()
    honest = [index for index in range(N) if index not in (1, 9)]
    rows[[1, 9]] *= -size
    reach = np.linalg.norm(rows[honest], axis=1).max()
    vector = finished(rule(kind), rows, names()).vector
    assert np.isfinite(vector).all()
    assert np.linalg.norm(vector) <= 1.5 * reach


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in ROBUST if kind != "fltrust"])
def test_aggregate_sets_rows_aside_that_are_not_finite(kind, value):
    rows = table()
    spoilt = rows.copy()
    spoilt[2] = value
    spoilt[7, 5] = value
    kept = np.delete(rows, [2, 7], axis=0)
    found = fedge.aggregate(spoilt, kind, byzantine=F, **MORE.get(kind, {}))
    assert np.array_equal(found, fedge.aggregate(kept, kind, **MORE.get(kind, {})))


def test_aggregate_refuses_more_spoilt_rows_than_f():
    rows = table()
    rows[:3] = np.nan
    with pytest.raises(ExperimentError, match="3 of 13 rows"):
        fedge.aggregate(rows, "median", byzantine=2)
    with pytest.raises(ExperimentError, match="3 of 13 rows"):
        fedge.aggregate(rows)


@pytest.mark.parametrize("kind", RULES)
def test_equal_rows_come_back(kind):
    rows = np.repeat(table(1), N, axis=0)
    vector = finished(rule(kind), rows, names()).vector
    np.testing.assert_allclose(vector, rows[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scaling_all_rows_scales_the_aggregate(kind, scale):
    plain, scaled = (finished(rule(kind), factor * table(), names()).vector for factor in (1.0, np.float32(scale)))
    np.testing.assert_allclose(scaled, scale * plain, rtol=2e-3, atol=2e-4 * scale)


@pytest.mark.parametrize("kind", RULES)
def test_rows_at_once_are_as_good_as_rows_one_by_one(kind):
    aggregator, rows = rule(kind), table()
    at_once = aggregator.finish(aggregator.of(rows, np.ones(N)), names(), aggregator.memory(), 5).vector
    np.testing.assert_allclose(at_once, finished(aggregator, rows, names()).vector, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", RULES)
def test_rows_are_never_changed(kind):
    rows = table()
    rows.flags.writeable = False
    before = rows.copy()
    finished(rule(kind, pre=["clip"] if kind != "fltrust" else []), rows, names())
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("kind", RULES)
def test_too_few_rows_are_refused(kind):
    least = rule(kind).min_rows()
    enough = [f"c{index:02d}" for index in range(3, 3 + least)]  # from c03 on, whom FLTrust trusts
    assert not rule(kind).lacks(enough, Memory())
    assert rule(kind).lacks(enough[1:], Memory())


# ---- weights -----------------------------------------------------------------------------------

WEIGHTS = st.lists(st.floats(0.01, 1e6), min_size=5, max_size=20)


@given(WEIGHTS, st.integers(1, 9))
def test_f_clients_never_weigh_half(weights, byzantine):
    if 2 * byzantine >= len(weights):
        return
    capped = robust._capped(np.array(weights), byzantine)
    assert capped.sum() == pytest.approx(1)
    assert np.sort(capped)[-byzantine:].sum() <= (byzantine / len(weights) + 0.5) / 2 + 1e-9
    order = np.argsort(weights, kind="stable")
    assert (np.diff(capped[order]) >= -1e-12).all(), "who weighed more weighs no less"


def test_weights_that_are_harmless_are_left_alone():
    np.testing.assert_allclose(robust._capped(np.array([1.0, 2.0, 1.0, 2.0, 2.0]), 1), np.array([1, 2, 1, 2, 2]) / 8)
    np.testing.assert_allclose(robust._capped(np.array([1.0, 99.0]), 0), [0.01, 0.99])


def test_a_weight_of_a_billion_does_not_buy_the_aggregate():
    rows = table()
    rows[4] += 50
    claimed = [1.0] * N
    claimed[4] = 1e9
    vector = finished(rule("geometric-median"), rows, names(), claimed).vector
    honest = np.delete(rows, 4, axis=0).mean(axis=0)
    assert np.linalg.norm(vector - honest) < 0.5 * np.linalg.norm(rows[4] - honest)


# ---- memory ------------------------------------------------------------------------------------


def groups(aggregator, groups_of_rows):
    memory, found = aggregator.memory(), []
    for rows in groups_of_rows:
        state = folded(aggregator, list(rows.values()))
        outcome = aggregator.finish(state, list(rows), memory, 0)
        memory = outcome.memory
        found.append(outcome)
    return found


def test_momentum_is_the_running_average_of_each_client():
    aggregator = rule("average", 0, momentum=0.75)
    a, b, c = table(3)
    first, second = groups(aggregator, [{"x": a, "y": b}, {"x": c}])
    np.testing.assert_allclose(first.vector, (a + b) / 2, rtol=1e-6)
    np.testing.assert_allclose(second.vector, 0.75 * a + 0.25 * c, rtol=1e-5, atol=1e-6)


def test_the_cache_takes_in_the_absent():
    aggregator = rule("average", 0, cache=True)
    a, b, c = table(3)
    _, second = groups(aggregator, [{"x": a, "y": b}, {"x": c}])
    np.testing.assert_allclose(second.vector, (c + b) / 2, rtol=1e-5, atol=1e-6)
    assert set(second.verdicts) == {"x", "y"}


def test_who_is_away_for_very_long_is_forgotten():
    aggregator = rule("average", 0, cache=True)
    a, b, c = table(3)
    many = groups(aggregator, [{"x": a, "y": b}, *([{"x": c}] * (2 * robust.FORGOTTEN + 1))])
    assert set(many[-2].verdicts) == {"x", "y"}
    assert set(many[-1].verdicts) == {"x"}
    assert set(many[-1].memory.rows) == {"x"}


def test_the_memory_survives_a_snapshot():
    aggregator = rule("median", 1, cache=True, momentum=0.5)
    rows = table(4)
    memory = groups(aggregator, [dict(zip("wxyz", rows))])[0].memory
    again = codec.convert(codec.decode(codec.encode(memory)), Memory)
    fresh = {"w": rows[1]}
    outcomes = [
        aggregator.finish(folded(aggregator, list(fresh.values())), list(fresh), one, 0) for one in (memory, again)
    ]
    assert outcomes[0].vector.tobytes() == outcomes[1].vector.tobytes()


def test_the_rows_survive_a_snapshot():
    aggregator = rule("multi-krum")
    state = folded(aggregator, table())
    again = codec.convert(codec.decode(codec.encode(state)), Rows)
    outcomes = [aggregator.finish(one, names(), Memory(), 0) for one in (state, again)]
    assert outcomes[0].vector.tobytes() == outcomes[1].vector.tobytes()


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "median", "byzantine": -1}, "byzantine: must be at least 0"),
        ({"kind": "median", "momentum": 1.0}, "momentum: must be at least 0 and below 1"),
        ({"kind": "median", "byzantine": "four"}, "server.aggregator.byzantine: expected an integer, got text"),
        ({"kind": "median", "pre": ["nmm"]}, "no kind 'nmm'; did you mean 'nnm'"),
        ({"kind": "median", "pre": [{"kind": "bucketing", "size": 0}]}, "size"),
        ({"kind": "local-clipping", "momentum": 0.5}, "'local-clipping' has no such setting"),
        ({"kind": "fltrust", "root": "a", "pre": ["nnm"]}, "which mixing would blur"),
        ({"kind": "mean", "byzantin": 1}, "'mean' has no such setting"),
        ({}, "needs kind"),
        ({"kind": "fedge.strategies.gram:products"}, "not a dataclass"),
        ({"kind": "fedge.core.limits:Limits"}, "'fedge.core.limits:Limits' is no rule; give it honours_weights"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, sentence):
    with pytest.raises(ExperimentError, match=sentence):
        aggregators.build(settings)


def test_completed_settings_say_all_and_build_the_same():
    given_ = {"kind": "trimmed-mean", "byzantine": 1, "pre": ["nnm", {"kind": "bucketing", "size": 3}]}
    whole = aggregators.completed(given_)
    assert whole["pre"] == [{"kind": "nnm"}, {"kind": "bucketing", "size": 3}]
    assert aggregators.build(whole) == aggregators.build(given_)
    assert aggregators.completed(whole) == whole


def test_a_preset_is_a_name_for_settings_and_what_is_added_goes_on_top():
    paper = {"kind": "flag", "pairwise": 1.0, "unit": False, "byzantine": 2}
    assert aggregators.build({"kind": "flag-paper", "byzantine": 2}) == aggregators.build(paper)
    assert aggregators.completed({"kind": "flag-paper", "iterations": 3})["iterations"] == 3


def test_a_whole_aggregator_has_its_own_f():
    assert aggregators.build({"kind": "local-clipping", "byzantine": 2}).byzantine == 2


def test_whom_others_are_compared_with_is_not_judged():
    assert set(finished(rule("fltrust"), table(), names()).verdicts) == set(names()) - {"c03"}


def test_a_mean_with_something_in_front_keeps_its_rows():
    assert aggregators.build({"kind": "mean"}).associative
    assert not aggregators.build({"kind": "mean", "pre": ["clip"]}).associative


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"least": lambda _, f: "three"}, r"Own.least\(\) gave 'three'; give a whole number of rows"),
        ({"least": lambda _, f: 1 / 0}, r"Own.least\(\) raised ZeroDivisionError"),
        (
            {"reduce": lambda _, columns, f, w: np.zeros(3)},
            r"Own.reduce\(\) gave float64 of shape \(3,\); give .* \(5,\)",
        ),
        ({"reduce": lambda _, columns, f, w: 1 / 0}, r"Own.reduce\(\) raised ZeroDivisionError"),
        ({"reduce": lambda _, columns, f, w: columns[:, 0] * np.inf}, r"Own.reduce\(\) gave NaN or infinite"),
        ({"mix": lambda _, evidence: (np.eye(2), np.ones(2))}, r"Own.mix\(\) gave float64 of shape \(2, 2\)"),
        ({"mix": lambda _, evidence: 7}, r"Own.mix\(\) raised TypeError"),
    ],
)
def test_a_rule_of_ones_own_that_breaks_is_named(own, says):
    sound = {"honours_weights": False, "least": lambda _, f: 1, "reduce": lambda _, columns, f, w: columns[:, 0]}
    rule = Robust(type("Own", (), sound | own)())
    rows = np.ones((4, 5), np.float32)

    def group():
        rule.min_rows()
        return rule.finish(rule.of(rows, np.ones(4)), list("abcd"), rule.memory(), 0)

    with pytest.raises(StrategyError, match=says):
        group()
