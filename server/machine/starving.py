"""Whether a rule will never again have the clients it needs, and how a run stands that waits for them.

Must never change a state.
"""

from bisect import bisect_left

from fedge.core.task import DELTA
from fedge.server.machine.state import Federation, State

HELD = "held"  # the pool of groups too small for the rule


def left(plan: Federation, held: State) -> int:
    """Clients that are there or may still come."""
    out = sum(one.state == "evicted" or one.gone for one in held.clients.values())
    return max(plan.expected, len(held.clients)) - out


def starved(plan: Federation, held: State) -> bool:
    """Whether too few are left for the rule, or it has waited too long for them."""
    if held.held_in_row > plan.limits.max_held_groups or held.unchanged > plan.limits.max_held_unchanged:
        return True
    needed = plan.aggregator.min_rows()
    if needed <= 1 or left(plan, held) >= needed:
        return False
    # Rows that are kept or remembered are there although their clients are not.
    staying = {name for name, one in held.clients.items() if one.state != "evicted" and not one.gone}
    kept = {member.client for pool in held.pools.values() for member in pool.members}
    return bool(_lacks(plan, held, staying | kept, plan.expected - len(held.clients)))


def missing(plan: Federation, held: State) -> int:
    """How many more clients the groups that are held wait for; 0 where none are, or it is not a matter of number."""
    if HELD not in held.pools:
        return 0
    there = {member.client for member in held.pools[HELD].members}
    most = plan.aggregator.min_rows()
    found = bisect_left(range(most + 1), True, key=lambda more: not _lacks(plan, held, there, more))
    return found if found <= most else 0


def _lacks(plan: Federation, held: State, names: set[str], strangers: int) -> str:
    """What these clients and so many unknown ones lack."""
    remembered = held.memory.get(DELTA) or plan.aggregator.memory()
    return plan.aggregator.lacks([*names, *(f"\0{index}" for index in range(strangers))], remembered)
