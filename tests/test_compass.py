"""FedCompass, and each defect of published implementations shown absent. Times are by hand: a does a step in 0.1 s."""

import numpy as np
import pytest

from fedge.core.errors import ExperimentError
from fedge.server.machine.events import Arrived, Left
from fedge.strategies.schedulers.compass import Compass
from fedge.strategies.weighers.staleness import Polynomial
from tests.machines import Table, federation, update_for

STEPS = Compass(min_steps=20, max_steps=100, alpha=1.0, latest_factor=1.5, balance=0.0)


def fleet(*names, **changes):
    table = Table(federation(**{"scheduler": STEPS, "expected": len(names), **changes}))
    table.join(*names)
    return table


def known(**changes):
    """a (0.1 s a step) and b (0.2 s a step) have delivered once; a's second task began at 10, b's at 20."""
    table = fleet("a", "b", **changes)
    table.deliver("a", 10.0)
    table.deliver("b", 20.0)
    return table


def staggered(**changes):
    """b (0.2 s a step) joins at 0 and a (0.1 s) at 10. At 20 both deliver; a's next task makes a group due at 30."""
    table = Table(federation(**{"scheduler": STEPS, "expected": 2, **changes}))
    table.join("b")
    table.join("a", now=10.0)
    table.deliver("a", 20.0, 0.0)
    table.deliver("b", 20.0 + 1e-6, 0.0)
    return table


def groups(table):
    return table.machine._state.scheduler.groups


def test_first_arrivals_are_aggregated_alone_with_a_share_of_one_in_n():
    table = fleet("a", "b")
    assert {task.steps for task in table.tasks.values()} == {100}
    table.deliver("a", 10.0, 1.0)
    np.testing.assert_allclose(table.machine.broadcast.vector, -0.5)


def test_a_slower_client_joins_with_the_steps_that_arrive_with_the_group():
    table = staggered()
    assert table.tasks["a"].steps == 100
    assert table.tasks["b"].steps == 49
    (group,) = groups(table).values()
    assert set(group.awaited) == {"a", "b"}
    assert group.expected_at == pytest.approx(30.0)
    assert group.latest_at == pytest.approx(35.0)


def test_who_claims_fewer_steps_than_asked_for_does_not_count_as_slow():
    table = fleet("a", "b", scheduler=Compass(min_steps=20, max_steps=100, balance=1.0))
    table.deliver("a", 10.0, 0.0)
    table.deliver("b", 10.0 + 1e-6, 0.0, steps=1)
    assert table.tasks["b"].steps == 99  # it joins a's group like any client as fast as a
    table.deliver("a", 20.0, 1.0)
    table.deliver("b", 20.0, 1.0)
    np.testing.assert_allclose(table.machine.broadcast.vector, -1.0, rtol=1e-5)


def test_a_group_closes_when_all_are_there_and_moves_by_its_share():
    table = staggered()
    table.deliver("a", 30.0, 1.0)
    version = table.machine.broadcast.version
    assert not table.published()
    table.deliver("b", 30.1, 3.0)
    assert table.machine.broadcast.version == version + 1
    np.testing.assert_allclose(table.machine.broadcast.vector, -2.0)  # alpha/N * (1 + 3)


def test_who_cannot_join_creates_a_group_that_meets_another_later():
    """b (20 s for 100 steps) at 20: a's group is due at 20, its next full round would end at T_latest + 10 = 35."""
    table = known()
    assert table.tasks["b"].steps == 75  # (35 - 20) / 0.2
    assert len(groups(table)) == 2


def late_federation():
    """a has arrived in its group; b, awaited by the same group, is late: the group closed without it at 35."""
    table = staggered(staleness=Polynomial())
    late = table.tasks.pop("b")
    table.deliver("a", 30.0, 0.0)
    table.tick(35.0)
    return table, late


def test_late_updates_of_one_client_are_all_kept_and_each_counts_once():
    table, late = late_federation()
    before = table.machine.updates
    table.feed(Arrived(36.0, update_for(late, 1.0)))
    assert "arrived" in table.kinds()
    second = table.tasks.pop("b")
    assert second.id != late.id
    table.tick(10_000.0)  # closes everything that is open: b's second comes late again
    table.feed(Arrived(10_001.0, update_for(second, 1.0)))
    table.tick(20_000.0)
    assert table.machine.updates == before + 2
    assert not table.machine._state.pools


def test_late_updates_are_aggregated_even_where_their_group_brings_nothing():
    table, late = late_federation()
    version = table.machine.broadcast.version
    table.feed(Arrived(36.0, update_for(late, 1.0)))
    assert table.machine.broadcast.version == version
    table.tick(max(table.wakes))  # nobody else has come by then
    assert table.machine.broadcast.version == version + 1


def test_a_dead_client_leaves_no_zombie_group():
    table = fleet("a", "b")
    table.deliver("a", 10.0)
    assert len(groups(table)) == 1
    table.feed(Left(11.0, "a"))
    assert not groups(table)


def test_a_client_that_dies_does_not_hold_up_who_has_arrived():
    table = staggered()
    table.deliver("a", 30.0, 1.0)
    version = table.machine.broadcast.version
    table.feed(Left(30.5, "b"))
    assert table.machine.broadcast.version == version + 1


def test_staler_updates_weigh_less():
    table = known(staleness=Polynomial())
    table.deliver("a", 20.5, 0.0)
    table.deliver("a", 40.0, 0.0)
    stale = table.tasks["b"].version
    before = table.machine.broadcast.vector[0]
    table.deliver("b", 41.0, 1.0)
    table.tick(max(table.wakes))
    moved = before - table.machine.broadcast.vector[0]
    assert table.machine.broadcast.version - stale > 1
    assert 0 < moved < 0.5  # less than alpha / N


def test_nobody_joins_a_group_that_has_closed():
    table, late = late_federation()
    assert set(groups(table)) == {"group-1"}  # a's next; group-0 is forgotten
    table.feed(Arrived(36.0, update_for(late)))
    assert "group-0" not in groups(table)


def test_an_early_close_leaves_nothing_for_its_timer():
    table = known()
    table.deliver("a", 15.0)
    wakes, snapshot = list(table.wakes), table.machine.broadcast.version
    table.tick(min(at for at in wakes if at > 15.0))
    assert table.machine.broadcast.version == snapshot


def test_balance_weighs_a_slow_client_by_its_seconds_per_step():
    """b is nine times slower than a: with balance 1/2 it weighs three times as much; the fleet's shares sum to 1."""
    table = fleet("a", "b", scheduler=Compass(min_steps=20, max_steps=100, alpha=1.0, balance=0.5))
    table.deliver("a", 10.0)
    table.deliver("b", 90.0)
    closed = [effect.values for effect in table.seen if getattr(effect, "kind", "") == "aggregated"]
    assert [record["step"] for record in closed] == pytest.approx([0.5, 0.75])  # b's speed was not known at first
    assert closed[1]["members"][0]["weight"] / closed[0]["members"][0]["weight"] == pytest.approx(3.0)


@pytest.mark.parametrize("settings", [{"min_steps": 0}, {"min_steps": 200}, {"latest_factor": 0.9}, {"balance": 2.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ExperimentError, match="server.scheduler"):
        Compass(**settings)
