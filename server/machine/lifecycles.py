"""The lifecycles of a client, a task and a pool, as tables: (state, event) -> state.

A pair that is not in a table is a fault of the caller: it raises and changes nothing. docs/lifecycles.md is drawn from
these tables. Must never hold anything but them and the look-up.
"""

from collections.abc import Mapping

from fedge.core.errors import OurFault

Table = Mapping[tuple[str, str], str]

CLIENT: Table = {
    ("absent", "joined"): "idle",
    ("idle", "joined"): "idle",
    ("idle", "dispatched"): "training",
    ("idle", "left"): "absent",
    ("idle", "evicted"): "evicted",
    ("training", "joined"): "training",  # a reconnect: it still holds its task
    ("training", "ended"): "idle",
    ("training", "expired"): "overdue",
    ("training", "left"): "absent",
    ("training", "evicted"): "evicted",
    ("overdue", "joined"): "idle",
    ("overdue", "ended"): "idle",
    ("overdue", "left"): "absent",
    ("overdue", "evicted"): "evicted",
    ("absent", "evicted"): "evicted",
}

TASK: Table = {
    ("leased", "counted"): "counted",
    ("leased", "refused"): "refused",
    ("leased", "failed"): "failed",
    ("leased", "expired"): "expired",  # the lease ran out or the client left: nobody waits any more
    ("expired", "counted"): "counted",  # it came after all, and late is not lost
    ("expired", "refused"): "refused",
    ("expired", "failed"): "failed",
}

POOL: Table = {
    ("empty", "kept"): "open",
    ("open", "kept"): "open",
    ("open", "closed"): "aggregated",
    ("open", "short"): "held",  # fewer rows than the rule needs: merged with the next that closes
    ("held", "closed"): "aggregated",
    ("held", "short"): "held",
}


class IllegalTransitionError(OurFault):
    """An event that cannot happen in this state."""

    reason = "ILLEGAL_TRANSITION"


def advance(table: Table, state: str, event: str) -> str:
    """The next state. Raises IllegalTransitionError for a pair that is not in the table."""
    try:
        return table[state, event]
    except KeyError:
        raise IllegalTransitionError(f"cannot handle {event!r} in state {state!r}") from None
