"""Server optimizers against their formulas, written out one element at a time or as torch has them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core import state as plain
from fedge.core.errors import ExperimentError, StrategyError
from fedge.strategies.blocks import BLOCK
from fedge.strategies.contracts import Arrival, Group
from fedge.strategies.optimizers import OPTIMIZERS
from fedge.strategies.weighers.fednova import FedNova as NovaWeigher

SIZE = 6
KINDS = sorted(OPTIMIZERS.entries)


def vector(seed, size=SIZE):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def group(*, pools=("p",), members=2, expected=4, weights=None, steps=None):
    arrivals = tuple(
        Arrival(f"c{index}", f"t{index}", 0, 0, steps[index] if steps else 10, 100, 100, 1.0, 1.0)
        for index in range(members)
    )
    return Group(pools, arrivals, weights or (1.0,) * members, 1.0, expected)


def run(settings, deltas, start, **further):
    """The parameters after each step."""
    optimizer = OPTIMIZERS.build(settings)
    state, current, path = optimizer.init(start), start, []
    for index, delta in enumerate(deltas):
        aggregate = {"delta": delta, **{name: rows[index] for name, rows in further.items()}}
        state, current, _ = optimizer.step(state, current, aggregate, group())
        path.append(current)
    return path


def close(found, wanted):
    for one, other in zip(found, wanted):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def adaptive(kind, rate, beta1, beta2, tau, deltas, start):
    """The published loops, in double precision, coordinate by coordinate."""
    w, m, v, path = start.astype(float), np.zeros(SIZE), np.zeros(SIZE), []
    for t, delta in enumerate(deltas, start=1):
        for k, g in enumerate(-delta.astype(float)):  # Delta_t of the paper is local - global
            m[k] = beta1 * m[k] + (1 - beta1) * g
            if kind == "adagrad":
                v[k] = v[k] + g * g
            elif kind == "adam":
                v[k] = beta2 * v[k] + (1 - beta2) * g * g
            else:
                v[k] = v[k] - (1 - beta2) * g * g * math.copysign(1.0, v[k] - g * g)
            eta = rate * math.sqrt(1 - beta2**t) / (1 - beta1**t) if kind == "adam" else rate
            w[k] = w[k] + eta * m[k] / (math.sqrt(v[k]) + tau)
        path.append(w.copy())
    return path


@pytest.mark.parametrize(
    ("kind", "rate", "beta1", "beta2"),
    [("adagrad", 0.1, 0.0, 0.0), ("adam", 0.1, 0.9, 0.99), ("yogi", 0.01, 0.9, 0.99)],
)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 6))
@settings(max_examples=25)
def test_adaptive_optimizers_follow_the_paper(kind, rate, beta1, beta2, seed, steps):
    deltas = [vector(seed + step + 1) for step in range(steps)]
    start = vector(seed)
    close(run({"kind": kind}, deltas, start), adaptive(kind, rate, beta1, beta2, 1e-3, deltas, start))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sgd", {}),
        ("momentum", {"momentum": 0.9}),
        ("nesterov", {"momentum": 0.9, "nesterov": True}),
    ],
)
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_sgd_and_momentum_are_those_of_torch(kind, options, rate):
    deltas, start = [vector(step + 1) for step in range(5)], vector(0)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference, path = torch.optim.SGD([parameter], lr=rate, **options), []
    for delta in deltas:
        parameter.grad = torch.from_numpy(delta.copy())
        reference.step()
        path.append(parameter.detach().numpy().copy())
    close(run({"kind": kind, "rate": rate}, deltas, start), path)


def test_sgd_with_rate_one_is_fedavg_to_the_bit():
    start, delta = vector(0), vector(1)
    assert np.array_equal(run({"kind": "sgd"}, [delta], start)[0], start - delta)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([1.0, 0.5]),
)
def test_fednova_pairs_with_its_weigher_to_give_the_published_step(clients, momentum, rate):
    deltas = [vector(index + 1) for index in range(len(clients))]
    weigher = NovaWeigher(momentum=momentum)
    members = tuple(Arrival("c", "t", 0, 0, steps, steps, n, 1.0, 1.0) for n, steps in clients)
    weights = tuple(weigher.weigh(member) for member in members)
    mean = np.average(deltas, axis=0, weights=weights).astype(np.float32)
    optimizer = OPTIMIZERS.build({"kind": "fednova", "momentum": momentum, "rate": rate})
    start = vector(0)
    _, found, _ = optimizer.step(None, start, {"delta": mean}, Group(("p",), members, weights, 1.0, 9))

    total = sum(n for n, _ in clients)
    work = [sum(sum(momentum**age for age in range(steps - k)) for k in range(steps)) for _, steps in clients]
    tau_eff = sum(n / total * a for (n, _), a in zip(clients, work))
    direction = sum(n / total * delta.astype(float) / a for (n, _), delta, a in zip(clients, deltas, work))
    np.testing.assert_allclose(found, start - rate * tau_eff * direction, rtol=1e-3, atol=1e-4)


def test_fednova_with_equal_work_is_fedavg_and_without_weight_stands_still():
    start, delta = vector(0), vector(1)
    optimizer = OPTIMIZERS.build({"kind": "fednova"})
    _, found, _ = optimizer.step(None, start, {"delta": delta}, group(weights=(0.1, 0.3)))
    np.testing.assert_allclose(found, start - delta, rtol=1e-6)
    _, still, _ = optimizer.step(None, start, {"delta": np.zeros_like(delta)}, group(weights=(0.0, 0.0)))
    assert np.array_equal(still, start)


def test_scaffold_moves_the_control_by_the_share_that_took_part_and_leaves_old_broadcasts_alone():
    optimizer = OPTIMIZERS.build({"kind": "scaffold"})
    state, start = optimizer.init(vector(0)), vector(0)
    changes, control, sent = [vector(7), vector(8)], np.zeros(SIZE, np.float32), []
    for change in changes:
        aggregate = {"delta": vector(1), "control": change}
        state, after, blobs = optimizer.step(state, start, aggregate, group(members=1, expected=4))
        control = control + change / 4
        np.testing.assert_allclose(blobs["control"], control, rtol=1e-6, atol=1e-7)
        sent.append((blobs["control"], blobs["control"].copy()))
        np.testing.assert_allclose(after, start - vector(1), rtol=1e-6)
    assert all(np.array_equal(blob, copy) for blob, copy in sent)
    with pytest.raises(StrategyError, match="client hook 'scaffold'"):
        optimizer.step(state, start, {"delta": vector(1)}, group())


def test_feddyn_follows_the_paper_with_its_own_alpha():
    alpha, start = 0.1, vector(0)
    deltas = [vector(step + 1) for step in range(4)]
    w, h, path = start.astype(float), np.zeros(SIZE), []
    for delta in deltas:
        mean_local = w - delta
        h = h - alpha * (2 / 4) * (mean_local - w)
        w = mean_local - h / alpha
        path.append(w)
    close(run({"kind": "feddyn"}, deltas, start), path)


def test_fedat_weighs_tiers_by_the_reports_of_the_tier_at_the_other_end():
    optimizer = OPTIMIZERS.build({"kind": "fedat"})
    start = vector(0)
    state, current = optimizer.init(start), start
    bases, models, reports = [start.astype(float)] * 3, {}, [0, 0, 0]
    for index, tier in enumerate([2, 1, 0, 0, 0, 1, 0, 2]):
        delta = vector(index + 1)
        state, current, _ = optimizer.step(state, current, {"delta": delta}, group(pools=(f"tier-{tier}",)))
        models[tier] = bases[tier] - delta
        reports[tier] += 1
        mirrors = {2: {2: 2}, 1: {1: 2, 2: 1}}.get(3 - index - 1) or {0: 2, 1: 1, 2: 0}
        wanted = sum(reports[mirrors[each]] * model for each, model in models.items()) / sum(reports)
        bases[tier] = wanted
        np.testing.assert_allclose(current, wanted, rtol=1e-4, atol=1e-5)


def test_fedat_starts_all_tiers_from_the_model_of_the_profiling_round():
    optimizer = OPTIMIZERS.build({"kind": "fedat"})
    start = vector(0)
    state, current, _ = optimizer.step(optimizer.init(start), start, {"delta": vector(1)}, group(pools=("profile",)))
    assert np.array_equal(current, start - vector(1))
    state, moved, _ = optimizer.step(state, current, {"delta": vector(2)}, group(pools=("tier-1",)))
    assert np.array_equal(moved, current - vector(2))
    state, mixed, _ = optimizer.step(state, moved, {"delta": vector(3)}, group(pools=("tier-0",)))
    np.testing.assert_allclose(mixed, current - (vector(2) + vector(3)) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pools", [("g1",), ("tier-3",), ("tier-0", "tier-1"), ("profile", "tier-0")])
def test_fedat_refuses_groups_that_are_not_one_of_its_tiers(pools):
    optimizer = OPTIMIZERS.build({"kind": "fedat"})
    with pytest.raises(StrategyError, match="needs the scheduler 'fedat'"):
        optimizer.step(optimizer.init(vector(0)), vector(0), {"delta": vector(1)}, group(pools=pools))


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_keeps_its_inputs_and_its_state_survives_a_snapshot(kind):
    optimizer = OPTIMIZERS.build({"kind": kind})
    size = BLOCK + 5
    start = vector(0, size)
    start.flags.writeable = False
    aggregate = {"delta": vector(1, size), "control": vector(2, size)}
    given_ = {name: blob.copy() for name, blob in aggregate.items()}
    tier = group(pools=("tier-0",))
    state, current, _ = optimizer.step(optimizer.init(start), start, aggregate, tier)
    assert current.dtype == np.float32
    assert not np.shares_memory(current, start)
    assert all(np.array_equal(aggregate[name], blob) for name, blob in given_.items())
    current.flags.writeable = False

    again = plain.convert(plain.decode(plain.encode(state)), type(state)) if state is not None else None
    _, one, blobs = optimizer.step(state, current, aggregate, tier)
    _, other, blobs_again = optimizer.step(again, current, aggregate, tier)
    assert np.array_equal(one, other)
    assert np.array_equal(blobs.get("control", 0), blobs_again.get("control", 0))


@pytest.mark.parametrize(
    "settings_",
    [
        *({"kind": kind, "rate": 0.0} for kind in KINDS if kind not in ("feddyn", "fedat")),
        {"kind": "momentum", "beta": 1.0},
        {"kind": "nesterov", "beta": -0.1},
        {"kind": "adam", "tau": 0.0},
        {"kind": "yogi", "beta2": 1.0},
        {"kind": "fednova", "momentum": 1.0},
        {"kind": "fedat", "tiers": 0},
        {"kind": "sgd", "rate": float("nan")},
    ],
)
def test_bad_settings_are_refused_by_name(settings_):
    with pytest.raises(ExperimentError, match=r"must be"):
        OPTIMIZERS.build(settings_)
