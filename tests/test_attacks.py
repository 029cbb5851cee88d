"""Attacks: each is its paper's formula, hurts what it should, and changes no honest byte of a simulation."""

import asyncio
import math
import threading
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedge
from fedge import build as wiring
from fedge import experiment as experiments
from fedge import hostile as hostile_clients
from fedge import testing
from fedge.client.data import Dataset
from fedge.client.runtime import run_client
from fedge.client.trainer import FunctionTrainer
from fedge.core.errors import ExperimentError, FedgeError, RefusedClient, StrategyError
from fedge.core.limits import Limits
from fedge.core.params import Layout
from fedge.core.task import Broadcast, Task, Update
from fedge.server.coordinator import serve
from fedge.server.machine import Federation, Stop
from fedge.simulation import SPEEDS, Adversary, Simulation
from fedge.strategies import aggregators
from fedge.strategies.aggregators.mean import Mean
from fedge.strategies.attacks import ATTACKS, Lies, Poisons, Scene, build
from fedge.strategies.attacks.alie import supported
from fedge.strategies.optimizers.sgd import Sgd
from fedge.strategies.schedulers import SCHEDULERS
from fedge.strategies.schedulers.fedavg import FedAvg
from fedge.strategies.weighers import WEIGHERS
from fedge.strategies.weighers.equal import Equal
from fedge.strategies.weighers.staleness import Constant
from tests.machines import federation
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


@dataclass(frozen=True)
class Broken:
    """A user's attack with a fault."""

    way: str = "raises"
    omniscient: ClassVar[bool] = False

    def forge(self, scene):
        if self.way == "raises":
            raise ValueError("no idea")
        return scene.own[1:]


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


# ---- in a simulation -----------------------------------------------------------------------------

SIZE = 6
SHARDS = [np.arange(start, start + 10) for start in range(0, 80, 10)]


def pull(vector, task, shard):
    """Each client pulls the model towards the mean of its shard, by another way in each coordinate."""
    goal = np.float32(shard.mean()) * np.linspace(0.5, 1.5, SIZE, dtype=np.float32)
    return vector + np.float32(0.01) * task.steps * (goal - vector) / 10


def trainer_from(settings):
    """What a worker builds."""
    return FunctionTrainer(np.zeros(SIZE), pull)


def simulated(attack=None, clients=2, faster=1.0, scheduler="fedavg", rule=None, processes=0, **changes):
    trainer = trainer_from({})
    plan = federation(
        **{
            "layout": trainer.layout,
            "scheduler": SCHEDULERS.build({"kind": scheduler}),
            "aggregator": aggregators.build(rule or {"kind": "mean"}),
            "expected": len(SHARDS),
            "seed": 3,
            "stop": Stop(updates=60),
            **changes,
        }
    )
    adversary = attack and Adversary(build({"kind": attack}) if isinstance(attack, str) else attack, clients, faster)
    spec = ("tests.test_attacks:trainer_from", {})
    speeds = SPEEDS.build({"kind": "homogeneous" if faster > 1 else "exponential"})
    records = []
    run = Simulation(plan, trainer, SHARDS, speeds, processes=processes, worker_spec=spec, adversary=adversary)
    return run.run(records.append), records


def of(records, kind):
    return [record.values for record in records if record.kind == kind]


TRIMMED = {"kind": "trimmed-mean", "byzantine": 2}


@dataclass(frozen=True)
class Spy:
    """Tells the truth, having looked at everything."""

    seen: list
    omniscient: ClassVar[bool] = True

    def forge(self, scene):
        aggregate = scene.aggregate and scene.aggregate([*scene.honest, *[scene.own] * scene.byzantine])
        self.seen.append((scene, aggregate))
        return scene.own


@pytest.mark.parametrize("scheduler", ["fedavg", "fedbuff", "compass"])
@pytest.mark.parametrize("rule", [None, TRIMMED], ids=["mean", "trimmed"])
def test_hostile_clients_that_behave_change_no_byte_even_if_they_look_at_everything(scheduler, rule):
    plain, _ = simulated(None, scheduler=scheduler, rule=rule)
    control, records = simulated("none", scheduler=scheduler, rule=rule)
    spied, _ = simulated(Spy([]), scheduler=scheduler, rule=rule)
    assert plain.hash == control.hash == spied.hash
    assert plain.now == control.now == spied.now
    [hostile] = of(records, "hostile")
    assert records[0].kind == "hostile"
    assert len(hostile["clients"]) == 2


def test_an_omniscient_attacker_sees_every_honest_client_and_may_ask_the_rule():
    seen = []
    _, records = simulated(Spy(seen), rule=TRIMMED, stop=Stop(versions=2))
    first = [view for view, _ in seen[:2]]
    hostile = of(records, "hostile")[0]["clients"]
    honest = [index for index in range(8) if f"client-{index:03d}" not in hostile]
    task = Task("t", "c", 0, FedAvg().steps)
    wanted = [-pull(np.zeros(SIZE, np.float32), task, SHARDS[index]) for index in honest]
    for view in first:  # the first round: all train from zeros
        np.testing.assert_array_equal(np.stack(view.honest), np.stack(wanted))
        assert (view.byzantine, view.clients) == (2, 8)
        assert view.client in hostile
    assert first[0].past == []
    assert np.array_equal(first[1].lead, first[0].own)
    again = next(view for view, _ in seen[2:] if view.client == first[0].client)
    assert np.array_equal(again.past[0], first[0].own)
    view, aggregate = seen[0]
    rows = np.stack([*view.honest, view.own, view.own])
    np.testing.assert_array_equal(aggregate, fedge.aggregate(rows, "trimmed-mean", 2))


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "scheduler"), [("alie-optimal", "fedbuff"), ("min-max", "compass")])
def test_one_process_and_two_give_the_same_bytes_under_an_omniscient_attack(attack, scheduler):
    one, again, two = (simulated(attack, scheduler=scheduler, rule=TRIMMED, processes=many)[0] for many in (0, 0, 2))
    assert (one.hash, one.now) == (again.hash, again.now) == (two.hash, two.now)
    assert one.hash != simulated(None, scheduler=scheduler, rule=TRIMMED)[0].hash


@pytest.mark.parametrize("attack", sorted(set(ATTACKS.entries) - {"nan", "inf"}))
@pytest.mark.parametrize("rule", [None, TRIMMED], ids=["mean", "trimmed"])
def test_every_attack_runs_against_mean_and_robust_rule(attack, rule):
    result, _ = simulated(attack, rule=rule, stop=Stop(updates=32))
    assert result.finished == "updates"
    assert np.isfinite(result.vector).all()


def test_a_robust_rule_holds_where_the_mean_does_not():
    truth = simulated()[0].vector

    def off(attack, rule):
        return np.linalg.norm(simulated(attack, rule=rule)[0].vector - truth)

    attack = build({"kind": "ipm", "epsilon": 10.0})
    assert off(attack, {"kind": "median", "byzantine": 2}) < 0.3 * off(attack, None)


@pytest.mark.parametrize(("attack", "reason"), [("nan", "NOT_FINITE"), ("inf", "NOT_FINITE")])
def test_values_that_are_no_numbers_are_refused_their_senders_evicted_and_the_run_goes_on(attack, reason):
    for rule in (None, TRIMMED):
        result, records = simulated(attack, rule=rule, scheduler="fedbuff")
        hostile = of(records, "hostile")[0]["clients"]
        assert result.finished == "updates"
        assert np.isfinite(result.vector).all()
        refused = of(records, "refused")
        assert {values["reason"] for values in refused} == {reason}
        assert sorted(values["client"] for values in of(records, "evicted")) == hostile
        assert not set(hostile) & {values["client"] for values in of(records, "arrived")}


def test_who_floods_is_faster_but_has_one_row_in_a_group_of_a_robust_rule():
    rule = {"kind": "trimmed-mean", "byzantine": 2}
    result, records = simulated("flooding", faster=10.0, scheduler="fedbuff", rule=rule, stop=Stop(versions=8))
    hostile = set(of(records, "hostile")[0]["clients"])
    sent = [values["client"] for values in of(records, "arrived")]
    by_hostile = sum(client in hostile for client in sent) / 2
    assert by_hostile > 5 * (len(sent) - 2 * by_hostile) / 6
    groups = [[member["client"] for member in values["members"]] for values in of(records, "aggregated")]
    assert all(len(set(group)) == len(group) for group in groups)
    assert result.finished == "versions"
    # A mean has no rows to tell apart: there they fill the buffer.
    _, open_records = simulated("flooding", faster=10.0, scheduler="fedbuff", stop=Stop(versions=8))
    most = max(
        sum(member["client"] in hostile for member in values["members"]) for values in of(open_records, "aggregated")
    )
    assert most > 2


def test_lies_about_examples_move_a_weighted_mean_and_lies_about_the_version_are_refused():
    weighted = {"share": WEIGHERS.build({"kind": "examples"})}
    honest = simulated(build({"kind": "lying", "examples": 10, "steps": 0}), **weighted)[0].vector
    liar, records = simulated("lying", **weighted)
    truth = simulated()[0].vector
    assert np.linalg.norm(liar.vector - truth) > 1.5 * np.linalg.norm(honest - truth)
    assert not of(records, "refused")

    @dataclass(frozen=True)
    class Elsewhere:
        omniscient: ClassVar[bool] = False

        def forge(self, scene):
            return scene.own

        def lie(self, update):
            return replace(update, base_version=update.base_version + 1)

    _, records = simulated(Elsewhere())
    assert {values["reason"] for values in of(records, "refused")} == {"BAD_REPORT"}
    assert sorted(values["client"] for values in of(records, "evicted")) == of(records, "hostile")[0]["clients"]


def test_sybils_send_copies_of_one_update_and_a_replayed_one_is_the_first():
    for attack, same in (("sybil", 2), ("replay", 1)):
        deltas = {}
        trainer = trainer_from({})
        plan = federation(layout=trainer.layout, expected=8, seed=3, stop=Stop(versions=3))
        adversary = Adversary(build({"kind": attack}), 2)
        run = Simulation(plan, trainer, SHARDS, SPEEDS.build({"kind": "exponential"}), adversary=adversary)
        handle = run._machine.handle

        def spy(event, handle=handle, deltas=deltas):
            if update := getattr(event, "update", None):
                deltas.setdefault(update.client, []).append(update.delta.tobytes())
            return handle(event)

        run._machine.handle = spy
        run.run()
        one, other = (deltas[name] for name in run._crew.names)
        assert len(one) == len(other) == 3
        assert (one == other) == (same == 2)
        assert (len(set(one)) == 1) == (attack == "replay")


@pytest.mark.parametrize(("way", "says"), [("raises", "raised ValueError"), ("short", "forged shape")])
def test_a_users_attack_that_breaks_is_named(way, says):
    with pytest.raises(StrategyError, match=f"Attack Broken {says}"):
        simulated(Broken(way))


def test_no_honest_client_left_is_refused():
    with pytest.raises(ExperimentError, match="leave an honest one"):
        simulated("none", clients=8)


# ---- poisoned data -------------------------------------------------------------------------------


def small_data():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 255, (60, 4, 4)).astype(np.uint8)
    return Dataset(x, np.arange(60) % 3, x[:6], np.arange(6) % 3, ("a", "b", "c"), {"who": np.arange(60)})


def plan_with(table, *more):
    text = f"[simulation]\nattack = {table}\n[data]\npartition = {{ kind = 'iid', clients = 5 }}"
    return wiring.settled(experiments.parse(text, more))


def test_poisoned_copies_lie_behind_the_data_and_only_hostile_shards_point_there():
    plan, dataset = plan_with("{ kind = 'label-flip', clients = 2 }"), small_data()
    parts = wiring.shards(plan, dataset)
    changed, shifted = hostile_clients.poisoned(plan, dataset, parts)
    hostile = hostile_clients.adversary(plan).chosen(5, 0)
    assert np.array_equal(changed.x_train[:60], dataset.x_train)
    assert np.array_equal(changed.y_train[:60], dataset.y_train)
    assert changed.x_train.dtype == np.uint8
    for index, (before, after) in enumerate(zip(parts, shifted)):
        if index in hostile:
            assert after.min() >= 60
            assert np.array_equal(changed.x_train[after], dataset.x_train[before])
            assert np.array_equal(changed.y_train[after], 2 - dataset.y_train[before])
            assert np.array_equal(changed.columns["who"][after], before)
        else:
            assert np.array_equal(before, after)
    assert hostile_clients.poisoned(plan_with("{ kind = 'alie' }"), dataset, parts) == (dataset, parts)


@dataclass(frozen=True)
class Halved(Broken):
    """A user's attack that loses examples, or its mind."""

    def poison(self, x, y, classes, seed):
        return (x[::2], y[::2]) if self.way == "halves" else {}[self.way]


@pytest.mark.parametrize(("way", "says"), [("halves", "labels of"), ("raises", "raised KeyError")])
def test_a_users_poison_that_breaks_is_named(way, says):
    plan, dataset = plan_with(f"{{ kind = 'tests.test_attacks:Halved', way = '{way}' }}"), small_data()
    with pytest.raises(StrategyError, match=f"test_attacks:Halved' .*{says}"):
        hostile_clients.poisoned(plan, dataset, wiring.shards(plan, dataset))


class OfLabels(FunctionTrainer):
    """Pulls the model towards how often each class is among a client's labels."""

    def __init__(self, _, dataset):
        def step(vector, task, shard):
            shares = np.bincount(dataset.y_train[shard], minlength=3) / len(shard)
            return vector + np.float32(0.1) * (shares - vector)

        super().__init__(np.zeros(3), step)


@pytest.mark.slow
def test_poison_reaches_the_trainer_in_this_process_and_in_workers(tmp_path):
    np.savez(tmp_path / "d.npz", x_train=np.zeros((60, 4, 4), np.uint8), y_train=np.arange(60) // 25)
    quick = [
        f"data.dataset={tmp_path / 'd.npz'}",
        "experiment.stop.versions=3",
        "server.scheduler={ kind = 'fedavg', steps = 3 }",
        "client.trainer=tests.test_attacks:OfLabels",
    ]

    def model(kind, processes=0):
        made = fedge.simulate(plan_with(f"{{ kind = '{kind}' }}", *quick, f"simulation.processes={processes}"))
        return made.model["parameters"]

    none, flipped, apart = model("none"), model("label-flip"), model("label-flip", 2)
    assert not np.allclose(none, flipped)
    assert np.array_equal(flipped, apart)


# ---- a real client -------------------------------------------------------------------------------

WIRE = Limits(chunk_bytes=4096, max_reconnect_s=0.2, liveness_s=10.0, lease_s=30.0, stream_timeout_s=20.0)


def served(folder, clients, versions=3):
    """(final machine, records, {name: summary or error}) of a run with these trainers over gRPC."""
    trainer = next(iter(clients.values()))
    plan = Federation(
        Layout.of({"parameters": trainer.initial()}), FedAvg(steps=2), Equal(), Constant(), Mean(), Sgd(),
        expected=len(clients), limits=WIRE, stop=Stop(versions=versions),
    )  # fmt: skip
    up, address, records, ended, told = threading.Event(), [], [], [], {}

    async def main():
        ended.append(
            await serve(
                plan, trainer.initial(), listen="127.0.0.1:0", state_dir=folder, on_record=records.append,
                on_listening=lambda at: (address.append(at), up.set()),
            )
        )  # fmt: skip

    def client(name):
        try:
            told[name] = run_client(address[0], name, clients[name], SHARDS[0], limits=WIRE)
        except FedgeError as error:
            told[name] = error

    threads = [threading.Thread(target=lambda: asyncio.run(main()))]
    threads[0].start()
    assert up.wait(20)
    for name in clients:
        threads.append(threading.Thread(target=client, args=(name,)))
        threads[-1].start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return ended[0], records, told


def plus_one():
    return FunctionTrainer(np.zeros(SIZE), lambda vector, task, shard: vector + 1)


def test_a_real_client_sends_nan_is_refused_and_shut_out_and_the_run_goes_on(tmp_path):
    machine, records, told = served(tmp_path, {"good": plus_one(), "bad": testing.hostile(plus_one(), "nan")})
    assert isinstance(told["bad"], RefusedClient)
    assert told["good"].finished == "versions"
    assert "NOT_FINITE" in {values["reason"] for values in of(records, "refused") + of(records, "failed")}
    assert [values["client"] for values in of(records, "evicted")] == ["bad"]
    np.testing.assert_allclose(machine.broadcast.vector, np.full(SIZE, 3.0))


def test_a_real_client_lies_and_flips_its_update(tmp_path):
    bad = testing.hostile(plus_one(), {"kind": "lying", "scale": 0.5, "steps": 0})
    machine, records, _ = served(tmp_path, {"good": plus_one(), "bad": bad})
    assert {v["examples"] for v in of(records, "arrived") if v["client"] == "bad"} == {1_000_000_000}
    np.testing.assert_allclose(machine.broadcast.vector, np.full(SIZE, 3 * (1 - 0.5) / 2))


def test_a_hostile_trainer_keeps_the_contract_of_a_trainer():
    def step(vector, task, shard):
        return vector + task.steps

    wrapped = testing.hostile(FunctionTrainer(np.zeros(SIZE), step), build({"kind": "replay"}))
    out, base = np.empty(SIZE, np.float32), np.zeros(SIZE, np.float32)
    made = [
        wrapped.train(Task(str(n), "a", 0, n), Broadcast(0, base), SHARDS[0], {}, out if n == 2 else None)
        for n in (1, 2)
    ]
    assert made[1].delta is out
    np.testing.assert_array_equal(out, np.full(SIZE, -1.0))
    assert wrapped.layout == FunctionTrainer(np.zeros(SIZE), step).layout
    assert all(one.task_id != other.task_id for one, other in pairwise(made))
    with pytest.raises(ExperimentError, match="poisons examples"):
        testing.hostile(plus_one(), "label-flip")
    with pytest.raises(ExperimentError, match="no kind 'nam'"):
        testing.hostile(plus_one(), "nam")
