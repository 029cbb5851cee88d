"""Hostile clients at work: in a simulation, where they change no honest byte, in poisoned data, and over gRPC."""

import asyncio
import threading
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest

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
from fedge.core.task import Broadcast, Task
from fedge.server.coordinator import serve
from fedge.server.machine import Federation, Stop
from fedge.simulation import SPEEDS, Adversary, Simulation
from fedge.strategies import aggregators
from fedge.strategies.aggregators.mean import Mean
from fedge.strategies.attacks import ATTACKS, build
from fedge.strategies.optimizers.sgd import Sgd
from fedge.strategies.schedulers import SCHEDULERS
from fedge.strategies.schedulers.fedavg import FedAvg
from fedge.strategies.weighers import WEIGHERS
from fedge.strategies.weighers.equal import Equal
from fedge.strategies.weighers.staleness import Constant
from tests.machines import federation


@dataclass(frozen=True)
class Broken:
    """A user's attack with a fault."""

    way: str = "raises"
    omniscient: ClassVar[bool] = False

    def forge(self, scene):
        if self.way == "raises":
            raise ValueError("no idea")
        return scene.own[1:]


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
    spec = ("tests.test_adversary:trainer_from", {})
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
    changed, shifted = hostile_clients.poisoned(plan, dataset, parts, wiring.client_names(5))
    hostile = hostile_clients.adversary(plan).chosen(wiring.client_names(5), 0)
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
    assert hostile_clients.poisoned(plan_with("{ kind = 'alie' }"), dataset, parts, wiring.client_names(5)) == (
        dataset,
        parts,
    )


@dataclass(frozen=True)
class Halved(Broken):
    """A user's attack that loses examples, or its mind."""

    def poison(self, x, y, classes, seed):
        return (x[::2], y[::2]) if self.way == "halves" else {}[self.way]


@pytest.mark.parametrize(("way", "says"), [("halves", "labels of"), ("raises", "raised KeyError")])
def test_a_users_poison_that_breaks_is_named(way, says):
    plan, dataset = plan_with(f"{{ kind = 'tests.test_adversary:Halved', way = '{way}' }}"), small_data()
    with pytest.raises(StrategyError, match=f"test_adversary:Halved' .*{says}"):
        hostile_clients.poisoned(plan, dataset, wiring.shards(plan, dataset), wiring.client_names(5))


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
        "client.trainer=tests.test_adversary:OfLabels",
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


def test_whom_others_are_compared_with_is_never_hostile():
    table = "attack = { kind = 'sign-flip', clients = 4 }"
    for root in wiring.client_names(5):
        rule = f"aggregator = {{ kind = 'fltrust', root = '{root}' }}"
        plan = experiments.parse(
            f"[data]\npartition = {{ kind = 'iid', clients = 5 }}\n[server]\n{rule}\n[simulation]\n{table}"
        )
        drawn = hostile_clients.adversary(plan).chosen(wiring.client_names(5), 0)
        assert [f"client-{index:03d}" for index in range(5) if index not in drawn] == [root]


def test_a_place_that_no_honest_client_has_is_refused():
    adversary = Adversary(build({"kind": "mimic", "client": 6}), 2)
    with pytest.raises(
        ExperimentError, match="is 6, and the 6 honest clients have the places 0 to 5; name one of them"
    ):
        adversary.chosen(wiring.client_names(8), 0)
    assert len(adversary.chosen(wiring.client_names(9), 0)) == 2


@pytest.mark.parametrize(
    ("rule", "clients", "remark"),
    [
        (
            "kind = 'mean', byzantine = 2",
            2,
            "'mean' withstands no hostile client although byzantine is 2; take 'robust'",
        ),
        ("kind = 'mean', byzantine = 2, pre = ['nnm']", 2, ""),
        ("kind = 'mean'", 2, ""),
        ("kind = 'median', byzantine = 2", 6, "clients is 6, and server.aggregator withstands byzantine = 2 only"),
        ("kind = 'median', byzantine = 2", 2, ""),
        ("kind = 'fltrust', root = 'client-000'", 6, ""),
    ],
)
def test_protection_that_protects_nobody_is_remarked_on(rule, clients, remark):
    partition = "[data]\npartition = { kind = 'iid', clients = 8 }"
    attack = f"[simulation]\nattack = {{ kind = 'sign-flip', clients = {clients} }}"
    plan = wiring.settled(experiments.parse(f"{partition}\n[server]\naggregator = {{ {rule} }}\n{attack}"))
    found = hostile_clients.remarks(plan)
    assert len(found) == bool(remark)
    assert remark in "".join(found)
