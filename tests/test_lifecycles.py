"""The tables are the law: every pair is either in a table or raises, and docs/lifecycles.md is drawn from them."""

import itertools
from pathlib import Path

import pytest

from fedge.server.machine.lifecycles import CLIENT, POOL, TASK, IllegalTransitionError, advance
from tools.draw_lifecycles import page

TABLES = {"client": CLIENT, "task": TASK, "pool": POOL}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_pair_advances_or_raises(table):
    states = {state for state, _ in table} | set(table.values())
    events = {event for _, event in table}
    for state, event in itertools.product(states, events):
        if (state, event) in table:
            assert advance(table, state, event) in states
        else:
            with pytest.raises(IllegalTransitionError, match=event):
                advance(table, state, event)


def test_a_spent_task_never_counts_again():
    for spent in ("counted", "refused", "failed"):
        assert not [event for state, event in TASK if state == spent]


def test_an_evicted_client_never_returns():
    assert not [event for state, event in CLIENT if state == "evicted"]


def test_the_page_is_current():
    assert Path("docs/lifecycles.md").read_text() == page(), "run: python tools/draw_lifecycles.py"
