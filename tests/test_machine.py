"""The machine as its shells meet it: what counts, what is refused, who is evicted; that a snapshot is everything."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import ModelError, StrategyError
from fedge.core.limits import Limits
from fedge.server.machine import Machine, Stop
from fedge.server.machine.events import (
    Ack,
    Arrived,
    Dispatch,
    Evaluated,
    Evict,
    Failed,
    Finished,
    Joined,
    Left,
    Refuse,
    Ticked,
)
from fedge.strategies import aggregators
from fedge.strategies.aggregators.mean import Mean
from fedge.strategies.aggregators.robust import Robust
from fedge.strategies.contracts import Keep, Train
from fedge.strategies.optimizers import OPTIMIZERS
from fedge.strategies.schedulers import SCHEDULERS
from fedge.strategies.schedulers.compass import Compass
from tests.machines import SIZE, Table, federation, update_for


def test_a_round_moves_the_model_by_the_mean_delta():
    table = Table(federation())
    table.join("a", "b")
    table.deliver("a", 1.0, 1.0)
    assert not table.published()
    table.deliver("b", 2.0, 3.0)
    assert table.kinds()[:3] == ["Ack", "arrived", "Publish"]
    np.testing.assert_array_equal(table.machine.broadcast.vector, np.full(SIZE, -2.0))
    assert set(table.tasks) == {"a", "b"}  # the next round has begun


def test_a_repeated_delivery_is_acknowledged_and_changes_nothing():
    table = Table(federation())
    table.join("a", "b")
    update = update_for(table.tasks["a"])
    table.feed(Arrived(1.0, update))
    before = table.machine.snapshot()
    assert table.feed(Arrived(1.0, update)) == [Ack("a", update.task_id, repeated=True)]
    assert table.machine.snapshot() == before


BAD = {
    "UNKNOWN_TASK": {"task_id": "0" * 32},
    "NOT_YOUR_TASK": {"client": "b"},
    "WRONG_MANIFEST": {"blobs": {"delta": np.zeros(SIZE + 1, np.float32)}},
    "NOT_FINITE": {"blobs": {"delta": np.array([0, np.nan, 0, 0], np.float32)}},
    "NORM_TOO_LARGE": {"blobs": {"delta": np.full(SIZE, 1e30, np.float32)}},
    "BAD_EXAMPLES": {"examples": -5},
    "BAD_REPORT": {"steps": 11},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_updates_are_refused_and_leave_the_model_alone(reason):
    table = Table(federation())
    table.join("a", "b")
    effects = table.deliver("a", 1.0, **BAD[reason])
    refused = [effect for effect in effects if isinstance(effect, Refuse)]
    assert [effect.reason for effect in refused] == [reason]
    assert table.machine.updates == 0
    if reason not in ("UNKNOWN_TASK", "NOT_YOUR_TASK"):  # the round goes on without it
        table.deliver("b", 2.0, 5.0)
        np.testing.assert_array_equal(table.machine.broadcast.vector, np.full(SIZE, -5.0))


@pytest.mark.parametrize("examples", [0, -1, float("nan"), 10**12, 2.5, True, None])
def test_a_count_of_examples_must_be_a_whole_number_within_the_limits(examples):
    table = Table(federation())
    table.join("a", "b")
    effects = table.deliver("a", 1.0, examples=examples)
    assert [effect.reason for effect in effects if isinstance(effect, Refuse)] == ["BAD_EXAMPLES"]


def test_a_client_that_keeps_failing_is_evicted_and_stays_out():
    table = Table(federation(expected=1, limits=Limits(max_refusals=2)))
    table.join("a")
    table.feed(Failed(1.0, "a", table.tasks["a"].id, "TrainerError"))
    assert "a" in table.tasks  # one failure: another task
    table.feed(Failed(2.0, "a", table.tasks["a"].id, "TrainerError"))
    assert any(isinstance(effect, Evict) for effect in table.effects)
    assert [type(effect) for effect in table.join("a", now=3.0)] == [Evict]


def test_who_is_shut_out_is_not_waited_for():
    table = Table(federation(expected=3, limits=Limits(max_refusals=1), scheduler=Compass(balance=0.0)))
    table.join("a", "b", "c")
    table.feed(Failed(1.0, "a", table.tasks["a"].id, "TrainerError"))
    table.deliver("b", 10.0, 1.0)
    np.testing.assert_allclose(table.machine.broadcast.vector, -1 / 2)  # a share of two clients, not of three
    again = Table(table.plan, Machine.restore(table.plan, table.machine.snapshot()))
    again.tasks = dict(table.tasks)
    again.deliver("c", 10.0, 1.0)
    np.testing.assert_allclose(again.machine.broadcast.vector, -1.0)


def test_another_models_layout_is_refused_on_joining():
    table = Table(federation())
    effects = table.feed(Joined(0.0, "a", 10, "f" * 64))
    assert [effect.reason for effect in effects if isinstance(effect, Refuse)] == ["BAD_MODEL"]
    assert "a" not in table.machine.clients


def test_a_lease_that_runs_out_lets_the_round_go_on_and_the_late_update_is_refused_by_fedavg():
    table = Table(federation(limits=Limits(lease_s=10.0)))
    table.join("a", "b")
    late = table.tasks["b"]
    table.deliver("a", 1.0, 2.0)
    assert 10.0 in table.wakes
    table.tick(10.0)
    assert table.machine.broadcast.version == 1
    assert table.machine.clients["b"].state == "overdue"
    table.feed(Arrived(11.0, update_for(late)))
    assert [effect.reason for effect in table.effects if isinstance(effect, Refuse)] == ["TOO_STALE"]


def test_a_client_that_left_may_come_back_and_its_update_counts_where_staleness_may():
    table = Table(federation(scheduler=SCHEDULERS.build({"kind": "fedasync"})))
    table.join("a", "b")
    held = table.tasks["a"]
    table.feed(Left(1.0, "a"))
    table.feed(Arrived(2.0, update_for(held)))
    assert table.machine.counted(held.id)
    table.join("a", now=3.0)
    assert table.tasks["a"].id != held.id


def test_a_reconnect_keeps_the_task():
    table = Table(federation())
    table.join("a", "b")
    held = table.tasks["a"]
    assert not table.join("a", now=1.0)
    assert table.machine.task_of("a") == held


@pytest.mark.parametrize(
    ("stop", "reason"),
    [(Stop(updates=4), "updates"), (Stop(versions=2), "versions"), (Stop(seconds=3.5), "seconds")],
)
def test_stop_criteria(stop, reason):
    table = Table(federation(stop=stop))
    table.join("a", "b")
    for now in range(1, 10):
        if table.machine.finished:
            break
        for name in ("a", "b"):
            if name in table.tasks:
                table.deliver(name, float(now))
    assert table.machine.finished == reason
    assert not any(isinstance(effect, Dispatch) for effect in table.effects)
    assert sum(isinstance(effect, Finished) for effect in table.seen) == 1


def test_the_target_ends_the_run_and_nothing_counts_after():
    table = Table(federation(stop=Stop(target=0.8)))
    table.join("a", "b")
    table.feed(Evaluated(1.0, 0, {"accuracy": 0.79}))
    assert not table.machine.finished
    table.feed(Evaluated(1.0, 0, {"accuracy": 0.8}))
    assert table.machine.finished == "target"
    table.deliver("a", 2.0)
    assert [effect.reason for effect in table.effects if isinstance(effect, Refuse)] == ["TASK_SPENT"]


def one_by_one(byzantine=1, alpha=1.0, **settings):
    """FedAsync, which closes a group with every update, in front of a trimmed mean: it needs 2 f + 1 clients."""
    aggregator = aggregators.build({"kind": "trimmed-mean", "byzantine": byzantine, **settings})
    scheduler = SCHEDULERS.build({"kind": "fedasync", "alpha": alpha})
    return federation(scheduler=scheduler, aggregator=aggregator, expected=3)


def test_a_rule_that_needs_more_rows_holds_the_group_and_merges_it():
    table = Table(one_by_one())
    table.join("a", "b", "c")
    table.deliver("a", 1.0, 1.0)
    table.deliver("b", 2.0, 5.0)
    assert table.machine.broadcast.version == 0
    held = [effect for effect in table.seen if getattr(effect, "kind", "") == "held"]
    assert [record.values["missing"] for record in held] == ["2 more clients", "1 more clients"]
    table.deliver("c", 3.0, 100.0)
    assert table.machine.broadcast.version == 1
    np.testing.assert_array_equal(table.machine.broadcast.vector, np.full(SIZE, -5.0))  # the middle one


def test_steps_of_held_groups_add_up_to_one_at_most():
    for alpha, wanted in ((0.25, 0.75), (0.6, 1.0), (2.0, 2.0)):
        table = Table(one_by_one(alpha=alpha))
        table.join("a", "b", "c")
        for now, name in enumerate("abc", 1):
            table.deliver(name, float(now), 4.0)
        np.testing.assert_allclose(table.machine.broadcast.vector, np.full(SIZE, -4.0 * wanted), rtol=1e-6)


def test_a_flooding_client_has_one_row_in_a_group_its_newest():
    table = Table(one_by_one())
    table.join("a", "b", "c")
    for now in range(1, 20):
        table.deliver("a", float(now), 1000.0 + now)
    assert table.machine.broadcast.version == 0
    table.deliver("b", 20.0, 1.0)
    table.deliver("c", 21.0, 3.0)
    np.testing.assert_array_equal(table.machine.broadcast.vector, np.full(SIZE, -3.0))
    old = [effect.values for effect in table.seen if getattr(effect, "kind", "") == "superseded"]
    assert len(old) == 18
    assert {values["client"] for values in old} == {"a"}
    (group,) = (effect.values for effect in table.effects if getattr(effect, "kind", "") == "aggregated")
    assert [member["client"] for member in group["members"]] == ["a", "b", "c"]
    assert table.machine.updates == 3


def test_a_run_whose_rule_can_never_be_satisfied_ends_as_starved():
    table = Table(replace(one_by_one(), limits=Limits(max_refusals=1)))
    table.join("a", "b", "c")
    table.deliver("a", 1.0, float("nan"))  # shut out: two of three are left, and the rule needs three
    assert table.machine.finished == "starved"

    table = Table(replace(one_by_one(), limits=Limits(max_held_groups=5)))
    table.join("a", "b")  # the third never comes
    for now in range(1, 7):
        assert not table.machine.finished
        table.deliver("a", float(now))
    assert table.machine.finished == "starved"


def test_who_left_for_good_is_not_waited_for_and_the_end_says_what_was_needed():
    table = Table(one_by_one())
    table.join("a", "b", "c")
    table.feed(Left(1.0, "a", "gone"))  # may come back
    assert not table.machine.finished
    table.feed(Left(2.0, "a", "gone", for_good=True))
    assert table.effects[-1].values == {"reason": "starved", "needs": 3, "left": 2}

    table = Table(one_by_one())
    table.join("a", "b", "c")
    table.deliver("a", 1.0)
    table.feed(Left(2.0, "a", "gone", for_good=True))
    assert not table.machine.finished  # its row is here, and the others may bring theirs
    table.deliver("b", 3.0)
    table.deliver("c", 4.0)
    assert table.machine.broadcast.version == 1
    table.deliver("b", 5.0)
    assert table.machine.finished == "starved"  # the next group will not have it


def test_groups_that_bring_no_new_client_are_soon_too_many_but_who_never_came_is_waited_for():
    table = Table(replace(one_by_one(), limits=Limits(max_held_unchanged=3)))
    table.join("a", "b")
    for now in range(1, 9):
        table.deliver("a", float(now))
        assert not table.machine.finished
    table.join("c", now=9.0)
    for now in range(10, 13):
        table.deliver("a", float(now))
    assert not table.machine.finished
    assert table.machine.held == (11, 2)
    table.deliver("b", 13.0)  # somebody new: it counts anew
    for now in range(14, 17):
        assert not table.machine.finished
        table.deliver("a", float(now))
    table.deliver("a", 17.0)
    assert table.machine.finished == "starved"


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        (lambda found: 1 / 0, r"Own.coefficients\(\) raised ZeroDivisionError"),
        (lambda found: found[:1], r"Own.coefficients\(\) gave float64 of shape \(1,\); give numbers of shape \(3,\)"),
        (lambda found: "much", r"Own.coefficients\(\) gave"),
        (lambda found: None, r"Own.coefficients\(\) gave object"),
        (lambda found: found * np.nan, r"Own.coefficients\(\) gave NaN or infinite values"),
        (
            lambda found: found * 1e30,
            r"Own made an aggregate of norm inf where all updates together may have 3e\+08",
        ),
    ],
)
def test_a_rule_that_breaks_is_named_and_blames_no_client(gives, says):
    class Own:
        honours_weights = True

        def least(self, byzantine):
            return 3

        def coefficients(self, evidence):
            return gives(evidence.weights)

    table = Table(replace(one_by_one(), aggregator=Robust(Own())))
    table.join("a", "b", "c")
    table.deliver("a", 1.0)
    table.deliver("b", 2.0)
    with pytest.raises(StrategyError, match=says):
        table.deliver("c", 3.0)


def test_a_whole_aggregator_that_breaks_is_named():
    class Own(Mean):
        def finish(self, state, clients, memory, seed):
            return super().finish(state, clients, memory, seed) if clients == "never" else None

    table = Table(federation(aggregator=Own(), expected=1))
    table.join("a")
    with pytest.raises(StrategyError, match="Own raised AttributeError"):
        table.deliver("a", 1.0)


def test_the_last_rows_of_absent_clients_stand_in_for_them():
    table = Table(one_by_one(cache=True))
    table.join("a", "b", "c")
    for now, (name, value) in enumerate((("a", 1.0), ("b", 2.0), ("c", 9.0)), 1):
        table.deliver(name, float(now), value)
    before = table.machine.broadcast.vector.copy()
    np.testing.assert_array_equal(before, np.full(SIZE, -2.0))
    table.deliver("a", 4.0, 5.0)  # alone, and yet a median of 5, 2 and 9
    np.testing.assert_array_equal(table.machine.broadcast.vector, before - 5.0)
    (group,) = (effect.values for effect in table.effects if getattr(effect, "kind", "") == "aggregated")
    assert [member["client"] for member in group["members"]] == ["a"]
    assert [row["client"] for row in group["absent"]] == ["b", "c"]


def test_a_restored_machine_remembers_rows_and_goes_on_to_the_bit():
    plan = one_by_one(cache=True, momentum=0.5)
    table = Table(plan)
    table.join("a", "b", "c")
    for now, (name, value) in enumerate((("a", 1.0), ("b", 2.0), ("c", 9.0), ("a", 3.0)), 1):
        table.deliver(name, float(now), value)
    again = Table(plan, Machine.restore(plan, table.machine.snapshot()))
    again.tasks = dict(table.tasks)
    for other in (table, again):
        other.deliver("b", 9.0, 7.0)
    assert np.array_equal(table.machine.broadcast.vector, again.machine.broadcast.vector)
    assert table.machine.snapshot() == again.machine.snapshot()


def test_verdicts_are_in_the_record():
    aggregator = aggregators.build({"kind": "multi-krum", "byzantine": 1})
    table = Table(federation(aggregator=aggregator, expected=5))
    names = ["a", "b", "c", "d", "e"]
    table.join(*names)
    for name, value in zip(names, (1.0, 1.1, 0.9, 1.0, 50.0)):
        table.deliver(name, 1.0, value)
    (group,) = (effect.values for effect in table.effects if getattr(effect, "kind", "") == "aggregated")
    said = {member["client"]: member for member in group["members"]}
    assert [name for name in names if said[name]["rejected"]] == ["e"]
    assert said["e"]["coefficient"] == 0.0
    assert said["a"]["coefficient"] == 0.25
    assert said["e"]["score"] > 100 * said["a"]["score"]


def test_float_buffers_are_averaged_whatever_the_optimizer():
    plan = federation(optimizer=OPTIMIZERS.build({"kind": "adam"}))
    plan = replace(plan, layout=replace(plan.layout, trainable=SIZE - 1))
    table = Table(plan)
    table.join("a", "b")
    table.deliver("a", 1.0, 1.0)
    table.deliver("b", 1.0, 3.0)
    assert table.machine.broadcast.vector[-1] == -2.0
    assert table.machine.broadcast.vector[0] != -2.0


class Broken:
    def __init__(self, orders):
        self.orders = orders

    def init(self):
        return {}

    def step(self, state, signal, fleet):
        if isinstance(self.orders, Exception):
            raise self.orders
        return state, self.orders


@pytest.mark.parametrize(
    ("orders", "says"),
    [(ValueError("oh"), "Broken raised"), ([Train("nobody", 3)], "nobody"), ([Keep("x")], "1 verdicts")],
)
def test_a_broken_scheduler_is_named(orders, says):
    table = Table(federation(scheduler=Broken(orders)))
    with pytest.raises(StrategyError, match=says):
        table.join("a")


def test_an_initial_vector_of_another_size_is_refused():
    with pytest.raises(ModelError, match="shape"):
        Machine(federation(), np.zeros(SIZE + 1, np.float32))


KINDS = ["fedavg", "dbw", "fedasync", "fedbuff", "fedat", "tifl", "compass"]


@st.composite
def lives(draw):
    """A scheduler and a script: which client does what, and how much later."""
    kind = draw(st.sampled_from(KINDS))
    act = st.tuples(
        st.sampled_from(["deliver"] * 6 + ["fail", "leave", "join", "tick", "poison", "again", "old", "old poison"]),
        st.integers(0, 3),
        st.floats(0.0, 30.0),
    )
    return kind, draw(st.lists(act, max_size=60))


def play(table, script, *, start=0):
    """Carry out the script; returns the task ids whose updates were acknowledged as new."""
    now, acked, last, old = float(start), [], {}, {}
    table.join("c0", "c1", "c2", "c3", now=now)
    for what, who, wait in script:
        name = f"c{who}"
        now += wait
        for due in sorted(at for at in table.wakes if at <= now):
            table.feed(Ticked(due))
        table.wakes = [at for at in table.wakes if at > now]
        if what == "deliver" and name in table.tasks:
            last[name] = update_for(table.tasks.pop(name), 0.5)
            table.feed(Arrived(now, last[name]))
        elif what == "poison" and name in table.tasks:
            bad = {"delta": np.full(SIZE, np.inf, np.float32)}
            table.feed(Arrived(now, update_for(table.tasks.pop(name), blobs=bad)))
        elif what == "again" and name in last:
            table.feed(Arrived(now, last[name]))
        elif what == "fail" and name in table.tasks:
            table.feed(Failed(now, name, table.tasks.pop(name).id, "x"))
        elif what == "leave":
            if name in table.tasks:
                old[name] = table.tasks.pop(name)
            table.feed(Left(now, name))
        elif what == "old" and name in old:
            table.feed(Arrived(now, update_for(old.pop(name), 0.5)))
        elif what == "old poison" and name in old:
            table.feed(Arrived(now, update_for(old.pop(name), examples=-1)))
        elif what == "join":
            table.join(name, now=now)
        else:
            table.feed(Ticked(now))
        acked += [effect.task_id for effect in table.effects if isinstance(effect, Ack) and not effect.repeated]
    return acked


def plan_for(kind, **changes):
    optimizer = OPTIMIZERS.build({"kind": "fedat" if kind == "fedat" else "sgd"})
    limits = Limits(lease_s=45.0, max_refusals=2, remembered_tasks=20)
    scheduler = SCHEDULERS.build({"kind": kind})
    return federation(scheduler=scheduler, optimizer=optimizer, expected=4, limits=limits, **changes)


@settings(max_examples=150, deadline=None)
@given(lives())
def test_whatever_clients_do_updates_count_at_most_once_and_a_snapshot_is_everything(life):
    kind, script = life
    plan = plan_for(kind)
    table = Table(plan)
    half = len(script) // 2
    acked = play(table, script[:half])
    assert len(acked) == len(set(acked))
    assert all(table.machine.counted(id_) for id_ in acked[-5:])  # older ones may be forgotten
    assert np.isfinite(table.machine.broadcast.vector).all()
    twin = Table(plan, Machine.restore(plan, table.machine.snapshot()))
    twin.tasks, twin.wakes = dict(table.tasks), list(table.wakes)
    later = table.machine.now
    play(table, script[half:], start=later)
    play(twin, script[half:], start=later)
    assert table.machine.snapshot() == twin.machine.snapshot()


@settings(max_examples=100, deadline=None)
@given(lives())
def test_no_acknowledged_update_is_lost(life):
    """Everything acknowledged is in the model or waits in a pool that a later close will take."""
    kind, script = life
    table = Table(plan_for(kind))
    acked = play(table, script)
    waiting = sum(len(pool.members) for pool in table.machine._state.pools.values())
    assert table.machine.updates + waiting == len(acked)
