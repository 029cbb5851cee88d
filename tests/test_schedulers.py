"""Each scheduler against its paper, by hand: short vectors, known times, known answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core.errors import ExperimentError
from fedge.core.task import Task
from fedge.server.machine.events import Left, Refuse
from fedge.strategies.contracts import Arrival, Closed, Fleet
from fedge.strategies.optimizers.fedat import FedAt
from fedge.strategies.schedulers.dbw import DynamicBackupWorkers, State
from fedge.strategies.schedulers.fedasync import FedAsync
from fedge.strategies.schedulers.fedat import FedAT
from fedge.strategies.schedulers.fedavg import FedAvg
from fedge.strategies.schedulers.fedbuff import FedBuff
from fedge.strategies.schedulers.tiers import split
from fedge.strategies.schedulers.tifl import TiFL
from fedge.strategies.selectors.uniform import Uniform
from fedge.strategies.weighers.examples import Examples
from fedge.strategies.weighers.staleness import Polynomial
from tests.machines import SIZE, Table, federation

NAMES = [f"c{index}" for index in range(6)]


def model(table):
    return float(table.machine.broadcast.vector[0])


def refused(table):
    return [effect.reason for effect in table.effects if isinstance(effect, Refuse)]


# ---- FedAvg ------------------------------------------------------------------------------------


def test_fedavg_is_the_plain_loop():
    """The obvious reference: w <- sum n_i w_i / n with w_i = w - delta_i, round by round."""
    plan = federation(scheduler=FedAvg(steps=5), share=Examples(), expected=3)
    table = Table(plan)
    table.join("a", "b", "c")
    random, reference = np.random.default_rng(0), np.zeros(SIZE)
    for now in range(1, 6):
        deltas, sizes = random.normal(size=3), random.integers(1, 100, 3)
        for name, delta, examples in zip("abc", deltas, sizes):
            table.deliver(name, float(now), delta, examples=int(examples))
        locals_ = [reference - np.float32(delta) for delta in deltas]
        reference = sum(n * local for n, local in zip(sizes, locals_)) / sizes.sum()
    np.testing.assert_allclose(table.machine.broadcast.vector, reference, rtol=1e-5)
    assert table.machine.broadcast.version == 5


def test_a_round_samples_as_many_clients_as_told_and_others_wait():
    table = Table(federation(scheduler=FedAvg(selector=Uniform(2)), expected=6))
    table.join(*NAMES)
    first = set(table.tasks)
    assert len(first) == 2
    for name in sorted(first):
        table.deliver(name, 1.0)
    assert table.machine.broadcast.version == 1
    assert len(table.tasks) == 2


def test_a_round_begins_with_the_clients_it_was_told_to_wait_for():
    table = Table(federation(scheduler=FedAvg(min_clients=2), expected=6))
    table.join("a")
    assert not table.tasks
    table.join("b")
    assert set(table.tasks) == {"a", "b"}


def test_a_client_lost_in_a_round_does_not_hold_it_up():
    table = Table(federation(expected=2))
    table.join("a", "b")
    table.deliver("a", 1.0, 4.0)
    table.feed(Left(2.0, "b"))
    assert model(table) == -4.0
    assert set(table.tasks) >= {"a"}


@given(st.integers(0, 2**31), st.integers(1, 50), st.sets(st.sampled_from(NAMES), min_size=1))
def test_sampling_depends_on_seed_round_and_names_alone(seed, round_, idle):
    fleet = Fleet(seed, 6, idle=dict.fromkeys(sorted(idle)))
    back = Fleet(seed, 6, now=99.0, idle=dict.fromkeys(sorted(idle, reverse=True)))
    chosen = Uniform(3).select(fleet, round_)
    assert chosen == Uniform(3).select(back, round_)
    assert set(chosen) <= idle
    assert len(chosen) == len(set(chosen)) == min(3, len(idle))


def test_a_round_of_nobody_is_refused():
    with pytest.raises(ExperimentError, match="at least 1"):
        Uniform(0)


# ---- FedAsync, FedBuff -------------------------------------------------------------------------


def test_fedasync_moves_by_alpha_times_the_discount_and_the_discount_starts_anew():
    table = Table(federation(scheduler=FedAsync(alpha=0.5), staleness=Polynomial(0.5)))
    table.join("a", "b")
    table.deliver("a", 1.0, 1.0)
    assert model(table) == pytest.approx(-0.5)
    table.deliver("b", 2.0, 1.0)  # one version behind
    assert model(table) == pytest.approx(-0.5 - 0.5 * 2**-0.5)
    table.deliver("b", 3.0, 1.0)  # fresh again: a full alpha
    assert model(table) == pytest.approx(-1.0 - 0.5 * 2**-0.5)


def test_fedbuff_divides_by_the_buffer_not_by_the_discounts():
    table = Table(federation(scheduler=FedBuff(buffer=2), staleness=Polynomial(0.5), expected=3))
    table.join("a", "b", "c")
    table.deliver("a", 1.0, 1.0)
    table.deliver("b", 1.0, 1.0)
    assert model(table) == pytest.approx(-1.0)
    table.deliver("c", 2.0, 1.0)  # staleness 1
    table.deliver("a", 3.0, 1.0)  # it was sent off before the buffer closed: staleness 1
    assert model(table) == pytest.approx(-1.0 - (2**-0.5 + 2**-0.5) / 2)


# ---- tiers -------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(min_size=1, max_size=4), st.floats(0.1, 100), min_size=1), st.integers(1, 6))
def test_tiers_are_a_partition_from_fast_to_slow(durations, count):
    tiers = split(durations, count)
    assert sorted(name for tier in tiers for name in tier) == sorted(durations)
    assert max(map(len, tiers)) - min(map(len, tiers)) <= 1
    slowest = [max(durations[name] for name in tier) for tier in tiers]
    fastest = [min(durations[name] for name in tier) for tier in tiers]
    assert all(slow <= fast for slow, fast in zip(slowest, fastest[1:]))


def test_fedat_weighs_a_tier_by_how_often_its_mirror_reports():
    """Two tiers, fast {a, b} and slow {c, d}: reference by the paper's cross-tier average."""
    table = Table(federation(scheduler=FedAT(tiers=2), optimizer=FedAt(2), expected=4))
    table.join("a", "b", "c", "d")
    for name, now in (("a", 1.0), ("b", 1.1), ("c", 5.0), ("d", 5.1)):
        table.deliver(name, now, 0.0)
    assert set(table.tasks) == {"a", "b", "c", "d"}
    table.deliver("a", 6.0, 2.0)
    table.deliver("b", 6.1, 4.0)  # the fast tier's model is -3; the slow one has not reported
    assert model(table) == pytest.approx(-3.0)
    table.deliver("c", 10.0, 1.0)
    table.deliver("d", 10.1, 1.0)  # the slow tier's model is -1; one report each
    assert model(table) == pytest.approx((-3.0 - 1.0) / 2)
    table.deliver("a", 11.0, 0.0)
    table.deliver("b", 11.1, 0.0)  # fast again, from -3: two reports make the slow tier weigh 2/3
    assert model(table) == pytest.approx((1 * -3.0 + 2 * -1.0) / 3)


def test_tifl_trains_one_tier_a_round_and_spends_its_credits():
    table = Table(federation(scheduler=TiFL(tiers=3, clients=2, credits=2), expected=6))
    table.join(*NAMES)
    for index, name in enumerate(NAMES):
        table.deliver(name, 1.0 + index)
    drawn = []
    for now in range(10, 22, 2):
        pair = tuple(sorted(table.tasks))
        drawn.append(pair)
        for name in pair:
            table.deliver(name, float(now))
    tiers = {("c0", "c1"), ("c2", "c3"), ("c4", "c5")}
    assert set(drawn) == tiers
    assert all(drawn.count(tier) == 2 for tier in tiers)  # six rounds, two credits each


# ---- DBW ---------------------------------------------------------------------------------------


TAKES_S = {"c0": 1.0, "c1": 2.0, "c2": 3.0, "c3": 4.0, "c4": 10.0}


def rounds(noise, *, count=12):
    """DBW with five clients, each slower than the one before; `noise` sets the spread between their deltas."""
    table = Table(federation(scheduler=DynamicBackupWorkers(steps=10, rate=0.1), expected=5))
    table.join(*NAMES[:5])
    random, due, loss = np.random.default_rng(0), {}, 2.0
    for name, task in table.tasks.items():
        due[name] = (TAKES_S[name], task)
    while table.machine.broadcast.version < count:
        name = min(due, key=lambda each: due[each][0])
        now, task = due.pop(name)
        loss *= 0.995
        table.deliver(name, now, 0.1 + noise * random.normal(), metrics={"loss_start": loss})
        for each, given_ in table.tasks.items():
            if each not in due or due[each][1] is not given_:
                due[each] = (now + TAKES_S[each], given_)
    return table


def test_dbw_stops_waiting_for_a_straggler_when_clients_agree():
    table = rounds(noise=0.001)
    assert table.machine._state.scheduler.k < 5
    assert "refused" in {getattr(effect, "kind", "") for effect in table.seen}  # the backup's update came too late


@pytest.mark.parametrize(("mean_norm", "k"), [(1.0, 1), (0.95, 4), (0.2**0.5, 5)])
def test_dbw_waits_for_more_clients_the_more_they_disagree(mean_norm, k):
    """Five unit deltas whose mean has this norm: alike, nearly alike, orthogonal. eta is 1, the loss fell by 0.01.

    Nearly alike, by hand: V = 0.122, |g|^2 = 0.878, L = 1.92, G(k) = 0.0335 - 0.117 / k; G(4) / 4 > G(5) / 10.
    """
    scheduler = DynamicBackupWorkers(steps=10, rate=0.1)
    members = tuple(Arrival(name, name, 0, 0, 10, 10, 10, 1.0, 1.0, {"loss_start": 0.99}) for name in TAKES_S)
    state = State(k=5, durations=dict(TAKES_S), loss=1.0)
    fleet = Fleet(0, 5, examples=dict.fromkeys(TAKES_S, 10))
    state, _ = scheduler.step(state, Closed(("round",), members, mean_norm), fleet)
    assert state.k == k


def test_every_task_says_how_many_steps():
    table = Table(federation(scheduler=FedAsync(steps=17)))
    table.join("a")
    (task,) = table.tasks.values()
    assert isinstance(task, Task)
    assert task.steps == 17
