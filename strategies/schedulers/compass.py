"""FedCompass: as many local steps for each client as make its group arrive together (Li et al., "FedCompass: Efficient
Cross-Silo Federated Learning on Heterogeneous Client Devices using a Computing Power-Aware Scheduler", 2024).

    speed S_i    seconds per local step asked for, smoothed with weight `momentum` on the newest sample
    join         the open group g with the most steps q = floor((T_exp(g) - now) / S_i), min_steps <= q <= max_steps
    else create  with as many steps as let the fastest client of some open group do one more full round meanwhile
    T_latest     now + latest_factor * (T_exp - now): the group closes without who is not there by then

    w <- w - alpha * sum_j b_j s(tau_j) delta_j          over the group and the late updates waiting for one
    b_j = S_j^balance / sum over the fleet of S_i^balance

With `balance` 0 every update weighs 1/N, as published: then who is ten times faster pushes the model ten times as hard.
With 1 everybody pushes equally hard per second; 1/2 lies between, and is ours (docs/schedulers.md has the figures).

A first arrival, whose speed nobody knew, is aggregated alone. What published implementations get wrong and this one
does not: a late update waits in its own pool and counts once; a group whose clients are all gone is forgotten; late
updates are aggregated at the latest time even where their group brings nothing; who claims to have done fewer steps
than asked for is not taken to be slow, which would buy it a larger share; who is alive is decided by leases, not by
T_latest; and as one machine handles one event at a time, joining a group cannot race with closing it.
"""

from dataclasses import dataclass, field
from math import floor

from fedge.core.errors import ExperimentError
from fedge.strategies.contracts import (
    Arrival,
    Arrived,
    Close,
    Closed,
    Fleet,
    Keep,
    Lost,
    Note,
    Order,
    Ready,
    Signal,
    Ticked,
    Train,
    Wake,
)

LATE = "late"
SHORTEST_S = 1e-9  # per step: a speed of zero would promise infinitely many


@dataclass(slots=True)
class ArrivalGroup:
    """Clients meant to arrive together: when (expected, at the latest), who is still awaited, and who is there.

    `share` sums S_j^balance over those who are.
    """

    expected_at: float
    latest_at: float
    awaited: dict[str, None] = field(default_factory=dict)
    arrived: list[str] = field(default_factory=list)
    share: float = 0.0


@dataclass(slots=True)
class State:
    """Speeds in seconds per step, the open groups by pool name, each client's group, and the share of the late."""

    speeds: dict[str, float] = field(default_factory=dict)
    groups: dict[str, ArrivalGroup] = field(default_factory=dict)
    group_of: dict[str, str] = field(default_factory=dict)
    late: float = 0.0
    formed: int = 0


@dataclass(frozen=True, slots=True)
class Compass:
    """Between `min_steps` and `max_steps` local steps per task; `alpha` scales the server's step.

    The published form has alpha 0.9, balance 0, polynomial staleness and plain server steps. An experiment that says
    nothing else gets the values here, no discount and server momentum.
    """

    min_steps: int = 20
    max_steps: int = 100
    alpha: float = 1.0
    momentum: float = 0.9
    latest_factor: float = 1.2
    balance: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise ExperimentError(f"server.scheduler: min_steps {self.min_steps} must be in 1..{self.max_steps}.")
        if self.latest_factor < 1:
            raise ExperimentError(f"server.scheduler: latest_factor {self.latest_factor} must be at least 1.")
        if not 0 <= self.balance <= 1:
            raise ExperimentError(f"server.scheduler: balance {self.balance} must be in 0..1.")

    def init(self) -> State:
        """No groups, no speeds."""
        return State()

    def step(self, state: State, signal: Signal, fleet: Fleet) -> tuple[State, list[Order]]:
        """Assign, collect, close."""
        match signal:
            case Ready(client):
                return state, self._assign(state, client, fleet)
            case Arrived(arrival):
                return state, self._arrived(state, arrival, fleet)
            case Lost(client):
                return state, self._lost(state, client, fleet)
            case Ticked():
                return state, self._close_due(state, fleet)
            case Closed(_, members):
                back = sorted(
                    {member.client for member in members} & fleet.idle.keys(), key=lambda c: (state.speeds[c], c)
                )
                waiting = {name for group in state.groups.values() for name in group.arrived}
                return state, [order for c in back if c not in waiting for order in self._assign(state, c, fleet)]
        return state, []

    # ---- arrivals ------------------------------------------------------------------------------

    def _arrived(self, state: State, arrival: Arrival, fleet: Fleet) -> list[Order]:
        client, sample = arrival.client, max(arrival.duration_s / arrival.asked, SHORTEST_S)
        first = client not in state.speeds
        state.speeds[client] = sample if first else (1 - self.momentum) * state.speeds[client] + self.momentum * sample
        share = self._share(state, client)
        name = None if arrival.overdue else state.group_of.pop(client, None)
        group = state.groups.get(name) if name else None
        if group is not None and name is not None and fleet.now <= group.latest_at:
            del group.awaited[client]
            group.arrived.append(client)
            group.share += share
            return [Keep(name, share=share), *self._close_if_whole(state, name, fleet)]
        if first:
            alone = f"first-{client}"
            return [Keep(alone, share=share), self._closing(state, alone, share, fleet)]
        state.late += share
        again = self._assign(state, client, fleet) if client in fleet.idle else []
        return [Keep(LATE, late=True, share=share), *again]

    def _lost(self, state: State, client: str, fleet: Fleet) -> list[Order]:
        name = state.group_of.pop(client, "")
        group = state.groups.get(name)
        if group is None or client not in group.awaited:
            return []
        del group.awaited[client]
        return self._close_if_whole(state, name, fleet)

    def _close_due(self, state: State, fleet: Fleet) -> list[Order]:
        due = [name for name, group in state.groups.items() if group.latest_at <= fleet.now]
        return [order for name in due for order in self._close(state, name, fleet)]

    def _close_if_whole(self, state: State, name: str, fleet: Fleet) -> list[Order]:
        return [] if state.groups[name].awaited else self._close(state, name, fleet)

    def _close(self, state: State, name: str, fleet: Fleet) -> list[Order]:
        """Forget the group; whoever it still awaits will be late. Aggregate what has come, if anything has."""
        share = state.groups.pop(name).share
        return [self._closing(state, name, share, fleet)] if share or state.late else []

    def _closing(self, state: State, name: str, share: float, fleet: Fleet) -> Close:
        """All waiting late updates go along. Clients whose speed is not known yet count as the average."""
        closing, state.late = share + state.late, 0.0
        known = sum(self._share(state, client) for client in state.speeds)
        return Close((LATE, name), self.alpha * closing / (known * fleet.expected / len(state.speeds)))

    def _share(self, state: State, client: str) -> float:
        return float(state.speeds[client] ** self.balance)

    # ---- assignment ----------------------------------------------------------------------------

    def _assign(self, state: State, client: str, fleet: Fleet) -> list[Order]:
        speed = state.speeds.get(client)
        if speed is None:
            return [Train(client, self.max_steps)]
        joined = self._join(state, speed, fleet.now)
        name, steps = joined or (f"group-{state.formed}", self._steps_to_create(state, speed, fleet.now))
        orders: list[Order] = [Train(client, steps)]
        if joined is None:
            expected = fleet.now + steps * speed
            latest = fleet.now + self.latest_factor * steps * speed
            state.groups[name] = ArrivalGroup(expected, latest)
            state.formed += 1
            orders.append(Wake(latest))
        group = state.groups[name]
        group.awaited[client] = None
        state.group_of[client] = name
        seen = {"group": name, "client": client, "expected_t": group.expected_at, "latest_t": group.latest_at}
        return [*orders, Note("group", seen)]

    def _join(self, state: State, speed: float, now: float) -> tuple[str, int] | None:
        fits = [(floor((group.expected_at - now) / speed), name) for name, group in state.groups.items()]
        fits = [(steps, name) for steps, name in fits if self.min_steps <= steps <= self.max_steps]
        if not fits:
            return None
        steps, name = max(fits, key=lambda fit: fit[0])
        return name, steps

    def _steps_to_create(self, state: State, speed: float, now: float) -> int:
        """Meet some open group again after its fastest client's next full round."""
        meetings = []
        for group in state.groups.values():
            if now < group.latest_at:
                fastest = min(state.speeds[name] for name in (*group.awaited, *group.arrived))
                meetings.append(floor((group.latest_at + fastest * self.max_steps - now) / speed))
        within = [steps for steps in meetings if steps <= self.max_steps]
        return max(self.min_steps, *within) if within else self.max_steps
