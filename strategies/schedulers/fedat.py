"""FedAT: synchronous rounds inside tiers of similar speed, asynchronous across them (Chai et al., "FedAT: A
High-Performance and Communication-Efficient Federated Learning System with Asynchronous Tiers", 2021).

The first round waits for everybody and measures; then each tier runs at its own pace, in pool "tier-0" (fastest), ...
The weighting across tiers (slower tiers count as much as fast ones are frequent) is the server optimizer `fedat`.
Tiers are not formed anew: a client that joins later is put into the slowest.
"""

from dataclasses import dataclass, field

from fedge.strategies.contracts import (
    Arrival,
    Arrived,
    Close,
    Closed,
    Discard,
    Fleet,
    Keep,
    Lost,
    Order,
    Ready,
    Signal,
    Train,
)
from fedge.strategies.schedulers.tiers import split

PROFILE = "profile"


@dataclass(slots=True)
class State:
    """Durations measured so far, each client's pool once tiers exist, and per pool whom it awaits and how many came."""

    durations: dict[str, float] = field(default_factory=dict)
    pool: dict[str, str] = field(default_factory=dict)
    awaited: dict[str, dict[str, None]] = field(default_factory=dict)
    arrived: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FedAT:
    """`tiers` is M, `steps` the local steps of a task."""

    steps: int = 100
    tiers: int = 3

    def init(self) -> State:
        """Nobody measured yet."""
        return State()

    def step(self, state: State, signal: Signal, fleet: Fleet) -> tuple[State, list[Order]]:
        """A synchronous round per pool."""
        match signal:
            case Ready(client):
                return state, self._ready(state, client, fleet)
            case Arrived(arrival):
                return state, self._arrived(state, arrival)
            case Lost(client):
                pool = state.pool.get(client, PROFILE)
                if client in state.awaited.get(pool, {}):
                    del state.awaited[pool][client]
                    return state, self._close_if_whole(state, pool)
            case Closed(pools) if pools == (PROFILE,):
                tiers = split(state.durations, self.tiers)
                state.pool = {name: f"tier-{rank}" for rank, tier in enumerate(tiers) for name in tier}
                return state, [
                    order for rank in range(len(tiers)) for order in self._send(state, f"tier-{rank}", fleet)
                ]
            case Closed(pools):
                return state, [order for pool in pools for order in self._send(state, pool, fleet)]
        return state, []

    def _ready(self, state: State, client: str, fleet: Fleet) -> list[Order]:
        if not state.pool:  # still profiling
            waiting = not state.awaited.get(PROFILE) and len(fleet.idle) >= fleet.expected
            return self._send(state, PROFILE, fleet) if waiting else []
        pool = state.pool.setdefault(client, max(state.pool.values()))
        return [] if state.awaited.get(pool) else self._send(state, pool, fleet)

    def _arrived(self, state: State, arrival: Arrival) -> list[Order]:
        pool = state.pool.get(arrival.client, PROFILE)
        if arrival.overdue or arrival.client not in state.awaited.get(pool, {}):
            return [Discard("Its tier went on without it.")]
        state.durations[arrival.client] = arrival.duration_s
        del state.awaited[pool][arrival.client]
        state.arrived[pool] = state.arrived.get(pool, 0) + 1
        return [Keep(pool), *self._close_if_whole(state, pool)]

    def _close_if_whole(self, state: State, pool: str) -> list[Order]:
        return [Close((pool,))] if state.arrived.get(pool) and not state.awaited[pool] else []

    def _send(self, state: State, pool: str, fleet: Fleet) -> list[Order]:
        members = [name for name in sorted(fleet.idle) if state.pool.get(name, PROFILE) == pool]
        state.awaited[pool], state.arrived[pool] = dict.fromkeys(members), 0
        return [Train(client, self.steps) for client in members]
