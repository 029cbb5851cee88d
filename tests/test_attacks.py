"""Attacks: each is its paper's formula, and hurts what it should."""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedge
from fedge import build as wiring
from fedge import experiment as experiments
from fedge.core.errors import ExperimentError
from fedge.core.limits import Limits
from fedge.core.task import Update
from fedge.strategies.attacks import ATTACKS, Lies, Poisons, Scene, build
from fedge.strategies.attacks.alie import supported
from tests.oracles import byzfl

ROWS = st.tuples(st.integers(1, 8), st.integers(1, 30), st.integers(0, 10_000))


def rows_of(count, size, seed, mean=1.0):
    return list((np.random.default_rng(seed).standard_normal((count, size)) + mean).astype(np.float32))


def scene(rows, **changes):
    return Scene(**{"own": rows[0], "honest": rows, "byzantine": 2, "clients": len(rows) + 2, **changes})


def forged(kind, view, **settings):
    before = [row.copy() for row in view.honest]
    sent = build({"kind": kind, **settings}).forge(view)
    assert sent.dtype == np.float32
    assert sent.shape == view.own.shape
    assert all(np.array_equal(row, was) for row, was in zip(view.honest, before))
    return sent


def close(found, wanted, rtol=1e-4):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-5)


# ---- the formulas, literally ---------------------------------------------------------------------


def literal_mean(rows):
    return sum(row.astype(np.float64) for row in rows) / len(rows)


def literal_std(rows, ddof=0):
    mean = literal_mean(rows)
    return np.sqrt(sum((row - mean) ** 2 for row in rows) / (len(rows) - ddof))


@given(ROWS)
def test_what_needs_only_the_own_update(shape):
    rows = rows_of(*shape)
    view = scene(rows)
    close(forged("none", view), rows[0])
    close(forged("label-flip", view), rows[0])
    close(forged("sign-flip", view, scale=3.0), -3.0 * rows[0])
    close(forged("flooding", view), -rows[0])
    close(forged("lying", view), -rows[0])
    close(forged("scaling", view), rows[0] * (len(rows) + 2) / 2)
    close(forged("scaling", view, boost=7.0), rows[0] * 7)
    close(forged("replay", view), rows[0])
    close(forged("replay", replace(view, past=[rows[-1]])), rows[-1])
    close(forged("sybil", replace(view, lead=rows[-1])), rows[-1])
    assert np.isinf(forged("inf", view)).all()
    assert np.isnan(forged("nan", view)).sum() == 1


@given(ROWS, st.floats(0.1, 5))
def test_alie_and_ipm_are_their_formulas(shape, factor):
    rows = rows_of(*shape)
    close(forged("alie", scene(rows), z=factor), literal_mean(rows) - factor * literal_std(rows))
    close(forged("ipm", scene(rows), epsilon=factor), -factor * literal_mean(rows))


def test_the_z_of_alie_is_the_papers():
    """N = 50, f = 12: s = 26 - 12 = 14 supporters, z with phi(z) = (50 - 12 - 14) / (50 - 12)."""
    assert supported(50, 12) == pytest.approx(NormalDist().inv_cdf(24 / 38))
    assert supported(10, 4) == pytest.approx(NormalDist().inv_cdf(4 / 6))
    assert supported(20, 1) == 0.0  # 10 of 19 would have to be swayed: beyond the mean
    assert supported(3, 1) == 0.0
    assert supported(4, 3) == supported(2, 1) + 3.0 == 3.0  # a majority needs nobody
    rows = rows_of(6, 9, 0)
    view = scene(rows, byzantine=4, clients=10)
    close(forged("alie", view), literal_mean(rows) - NormalDist().inv_cdf(4 / 6) * literal_std(rows))


def test_gaussian_noise_has_the_norm_of_an_honest_update_and_everybody_has_their_own():
    rows = rows_of(5, 20_000, 1)
    view = scene(rows, seed=3, client="a")
    noise = forged("gaussian", view, sigma=2.0)
    norm = np.mean([np.linalg.norm(row) for row in rows])
    assert np.linalg.norm(noise) == pytest.approx(2 * norm, rel=0.03)
    assert abs(noise.mean()) < 0.05 * noise.std()
    assert np.array_equal(noise, forged("gaussian", view, sigma=2.0))
    assert not np.array_equal(noise, forged("gaussian", replace(view, client="b"), sigma=2.0))
    assert not np.array_equal(noise, forged("gaussian", replace(view, seed=4), sigma=2.0))


PUSHES = {
    "unit": lambda rows: -literal_mean(rows) / np.linalg.norm(literal_mean(rows)),
    "std": lambda rows: -literal_std(rows),
    "sign": lambda rows: -np.sign(literal_mean(rows)),
}


def apart(rows):
    """Squared distances [n, n]."""
    return np.array([[((one.astype(np.float64) - other) ** 2).sum() for other in rows] for one in rows])


def to_honest(sent, rows):
    return np.array([((sent.astype(np.float64) - row) ** 2).sum() for row in rows])


MEASURES = {
    "min-max": (lambda sent, rows: to_honest(sent, rows).max(), lambda rows: apart(rows).max()),
    "min-sum": (lambda sent, rows: to_honest(sent, rows).sum(), lambda rows: apart(rows).sum(axis=1).max()),
}


@given(ROWS, st.sampled_from(sorted(PUSHES)), st.sampled_from(sorted(MEASURES)))
def test_min_max_and_min_sum_go_to_their_bound_and_no_further(shape, direction, kind):
    rows = rows_of(*shape)
    reach, bound = MEASURES[kind]
    sent, mean, push = forged(kind, scene(rows), direction=direction), literal_mean(rows), PUSHES[direction](rows)
    limit = bound(rows)
    assert reach(sent, rows) <= limit * (1 + 1e-4) + 1e-6
    if len(rows) == 1:
        close(sent, rows[0])
        return
    gamma = ((sent - mean) @ push) / (push @ push)
    close(sent, mean + gamma * push, rtol=1e-3)
    assert reach(mean + 1.01 * gamma * push + 1e-3 * push, rows) > limit  # gamma is the largest


def test_min_max_finds_the_gamma_of_the_papers_bisection():
    rows = rows_of(7, 40, 5)
    mean, push, limit = literal_mean(rows), -literal_std(rows), apart(rows).max()
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if to_honest(mean + middle * push, rows).max() <= limit else (low, middle)
    close(forged("min-max", scene(rows)), mean + low * push)


@given(st.integers(1, 8), st.integers(2, 30), st.integers(0, 1000))
def test_mimic_copies_the_client_furthest_along_the_principal_direction(count, size, seed):
    rows = rows_of(count, size, seed)
    centred = np.stack(rows).astype(np.float64) - literal_mean(rows)
    along = np.abs(centred @ np.linalg.svd(centred, full_matrices=False)[2][0])
    found = forged("mimic", scene(rows))
    [place] = [index for index, row in enumerate(rows) if np.array_equal(row, found)]
    assert along[place] >= along.max() * (1 - 1e-4) - 1e-4
    assert np.array_equal(forged("mimic", scene(rows), client=count - 1), rows[-1])


# ---- as byzfl has them ---------------------------------------------------------------------------


def test_byzfl_forges_the_same():
    rows = rows_of(6, 25, 2)
    mean = literal_mean(rows).astype(np.float32)
    close(forged("sign-flip", scene(rows, own=mean)), byzfl.SignFlipping()(rows))
    close(forged("ipm", scene(rows), epsilon=2.0), byzfl.InnerProductManipulation(2.0)(rows))
    close(forged("mimic", scene(rows), client=3), byzfl.Mimic(3)(rows))
    assert np.array_equal(forged("inf", scene(rows)), byzfl.Inf()(rows))
    # byzfl is on the other side of the mean and divides by n - 1.
    other = -1.5 * math.sqrt(6 / 5)
    close(forged("alie", scene(rows), z=other), byzfl.ALittleIsEnough(1.5)(rows))


RULES = {"trimmed-mean": "TrMean", "multi-krum": "MultiKrum", "krum": "Krum"}


def ours(kind):
    return lambda rows: fedge.aggregate(np.stack(rows), kind, 2)


def harm(rule, rows, sent):
    return np.linalg.norm(rule(np.stack([*rows, sent, sent])) - literal_mean(rows))


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("alie-optimal", "Optimal_ALittleIsEnough"),
        ("ipm-optimal", "Optimal_InnerProductManipulation"),
    ],
)
def test_the_search_does_as_much_harm_as_byzfls_on_the_same_rule(kind, name, theirs):
    rule, search = getattr(byzfl, RULES[kind])(2), getattr(byzfl, theirs)
    mine, their = [], []
    for seed in range(6):
        rows = rows_of(8, 30, seed, mean=0.3)
        view = scene(rows, aggregate=lambda found: rule(np.stack(found)))
        mine.append(harm(rule, rows, forged(name, view)))
        their.append(harm(rule, rows, search(rule, [], f=2)(np.stack(rows)).astype(np.float32)))
    assert sum(mine) >= 0.97 * sum(their)
    assert all(one >= 0.9 * other for one, other in zip(mine, their))


@given(st.sampled_from(["trimmed-mean", "multi-krum", "mean"]), st.integers(0, 100), st.integers(1, 12))
def test_the_optimised_attack_is_at_least_as_harmful_as_the_plain_one(kind, seed, evaluations):
    rows = rows_of(8, 12, seed)
    rule = (lambda found: fedge.aggregate(np.stack(found))) if kind == "mean" else ours(kind)
    asked = []

    def counting(found):
        asked.append(len(found))
        return rule(found)

    view = scene(rows, aggregate=counting)
    for name in ("alie", "ipm"):
        asked.clear()
        best = forged(f"{name}-optimal", view, evaluations=evaluations)
        assert asked == [10] * len(asked)
        assert len(asked) <= evaluations
        assert harm(rule, rows, best) >= harm(rule, rows, forged(name, view)) * (1 - 1e-6)


def test_the_search_falls_back_where_there_is_no_rule_or_it_refuses():
    def refusing(rows):
        raise ExperimentError("too few")

    rows = rows_of(5, 9, 0)
    for view in (scene(rows), scene(rows, aggregate=refusing)):
        for name in ("alie", "ipm"):
            assert np.array_equal(forged(f"{name}-optimal", view), forged(name, view))


# ---- data and metadata ---------------------------------------------------------------------------


def test_labels_are_turned_round():
    x, y = np.arange(12).reshape(4, 3), np.array([0, 1, 8, 9])
    for kind in ("label-flip", "sybil"):
        attack = build({"kind": kind})
        assert isinstance(attack, Poisons)
        assert attack.poison(x, y, 10, 0)[1].tolist() == [9, 8, 1, 0]
        assert np.array_equal(attack.poison(x, y, 10, 0)[0], x)


@pytest.mark.parametrize(
    ("shape", "dtype", "where", "value"),
    [
        ((6, 8, 8), np.uint8, (slice(None), slice(-3, None), slice(-3, None)), 255),
        ((6, 8, 8, 3), np.uint8, (slice(None), slice(-3, None), slice(-3, None)), 255),
        ((6, 1, 8, 8), np.float32, (slice(None), 0, slice(-3, None), slice(-3, None)), 0.5),
        ((6, 9), np.float32, (slice(None), slice(-3, None)), 0.5),
    ],
)
def test_a_backdoor_is_a_patch_and_a_target_on_a_share_of_the_examples(shape, dtype, where, value):
    x, y = np.zeros(shape, dtype), np.arange(6) % 3
    x[0].reshape(-1)[0] = value
    attack = build({"kind": "scaling", "target": 2, "share": 0.5})
    stamped = attack.stamped(x)
    assert (stamped[where] == value).all()
    assert stamped.dtype == dtype
    changed, labels = attack.poison(x, y, 3, 7)
    touched = (changed != x).reshape(6, -1).any(axis=1)
    assert touched.sum() == 3
    assert (labels[touched] == 2).all()
    assert (labels[~touched] == y[~touched]).all()
    assert not x.reshape(6, -1)[1:].any()
    with pytest.raises(ExperimentError, match="must be below 2"):
        attack.poison(x, y, 2, 0)


def test_a_liar_claims_as_much_as_passes():
    update = Update("a", "t", 3, 50, 10, {"delta": np.ones(3, np.float32)})
    attack = build({"kind": "lying"})
    assert isinstance(attack, Lies)
    lie = attack.lie(update)
    assert (lie.examples, lie.steps, lie.base_version) == (Limits().max_examples, 1, 3)
    assert build({"kind": "lying", "steps": 0}).lie(update).steps == 50


# ---- the names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ATTACKS.entries)
def test_every_kind_is_built_and_copes_with_one_row(kind):
    rows = rows_of(1, 5, 0)
    assert forged(kind, scene(rows, clients=3)).shape == (5,)


@dataclass(frozen=True)
class NotOne:
    """A dataclass that forges nothing."""


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("{ kind = 'alei' }", "simulation.attack: no kind 'alei'; did you mean 'alie'?"),
        ("{ clients = 2 }", "simulation.attack: needs kind = one of"),
        ("{ kind = 'alie', epsilon = 2.0 }", "simulation.attack.epsilon: 'alie' has no such setting"),
        ("{ kind = 'alie', clients = 10 }", "simulation.attack.clients is 10, and there are 10 clients; leave an"),
        ("{ kind = 'alie', clients = 0 }", "simulation.attack.clients: must be at least 1, not 0."),
        ("{ kind = 'alie', clients = 1.5 }", "simulation.attack.clients: expected an integer, got a number."),
        ("{ kind = 'alie', faster = 0.0 }", "simulation.attack.faster: must be above 0 and finite, not 0.0."),
        ("{ kind = 'alie', faster = -2 }", "simulation.attack.faster: must be above 0"),
        ("{ kind = 'min-max', direction = 'up' }", "simulation.attack.direction: must be one of unit, std, sign"),
        ("{ kind = 'gaussian', sigma = -1.0 }", "simulation.attack.sigma: must be at least 0"),
        ("{ kind = 'alie-optimal', evaluations = 0 }", "simulation.attack.evaluations: must be at least 1"),
        ("{ kind = 'scaling', share = 0.0 }", "share above 0 and at most 1"),
        ("{ kind = 'mimic', client = -2 }", "simulation.attack.client: must be -1 or"),
        ("{ kind = 'tests.test_attacks:NotOne' }", "is no attack; give it omniscient and forge()"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(table, sentence):
    with pytest.raises(ExperimentError) as caught:
        wiring.settled(experiments.parse(f"[simulation]\nattack = {table}"))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_completed_and_survive_another_kind():
    plan = experiments.parse("[simulation]\nattack = { kind = 'flooding', clients = 3 }")
    settled = wiring.settled(plan)
    assert settled.simulation.attack == {"kind": "flooding", "scale": 1.0, "clients": 3, "faster": 10.0}
    assert wiring.settled(settled) == settled == experiments.parse(experiments.resolved(settled))
    other = experiments.parse(experiments.resolved(settled), ["simulation.attack.kind=alie"])
    assert wiring.settled(other).simulation.attack == {"kind": "alie", "z": 0.0, "clients": 3, "faster": 10.0}
    assert wiring.settled(experiments.parse("")).simulation.attack is None
