"""TiFL: synchronous rounds, each with clients of one tier only (Chai et al., "TiFL: A Tier-based Federated Learning
System", 2020).

The first round waits for everybody and measures. Then a tier is drawn for each round, with probability in proportion to
its clients' last training loss, so that tiers the model serves badly come more often (the paper uses test accuracy,
which the coordinator need not have per tier), and no more often than its credits allow.
"""

from dataclasses import dataclass, field

from fedge.core.random import generator
from fedge.strategies.contracts import Arrived, Close, Closed, Discard, Fleet, Keep, Lost, Order, Ready, Signal, Train
from fedge.strategies.schedulers.tiers import split


@dataclass(slots=True)
class State:
    """The round and whom it awaits; per client its duration and loss; per tier its members and credits left."""

    round: int = 0
    awaited: dict[str, None] = field(default_factory=dict)
    arrived: int = 0
    durations: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    tiers: list[list[str]] = field(default_factory=list)
    credits: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TiFL:
    """`clients` per round out of one of `tiers` tiers; `credits` rounds per tier before all are filled up again."""

    steps: int = 100
    tiers: int = 3
    clients: int = 5
    credits: int = 10

    def init(self) -> State:
        """Nobody measured yet."""
        return State()

    def step(self, state: State, signal: Signal, fleet: Fleet) -> tuple[State, list[Order]]:
        """Collect the round; draw the next tier when it closes."""
        match signal:
            case Ready() if not state.awaited and (state.round or len(fleet.idle) >= fleet.expected):
                return state, self._begin(state, fleet)
            case Arrived(arrival):
                if arrival.overdue or arrival.client not in state.awaited:
                    return state, [Discard("The round is past it.")]
                del state.awaited[arrival.client]
                state.arrived += 1
                state.durations[arrival.client] = arrival.duration_s
                state.losses[arrival.client] = arrival.metrics.get("loss", 1.0)
                return state, [Keep("round"), *self._close_if_whole(state)]
            case Lost(client) if client in state.awaited:
                del state.awaited[client]
                return state, self._close_if_whole(state) or ([] if state.awaited else self._begin(state, fleet))
            case Closed():
                if not state.tiers:
                    state.tiers = split(state.durations, self.tiers)
                    state.credits = [self.credits] * len(state.tiers)
                state.arrived = 0
                return state, self._begin(state, fleet)
        return state, []

    def _close_if_whole(self, state: State) -> list[Order]:
        return [Close(("round",))] if state.arrived and not state.awaited else []

    def _begin(self, state: State, fleet: Fleet) -> list[Order]:
        state.round += 1
        chosen = sorted(fleet.idle) if not state.tiers else self._draw(state, fleet)
        state.awaited = dict.fromkeys(chosen)
        return [Train(client, self.steps) for client in chosen]

    def _draw(self, state: State, fleet: Fleet) -> list[str]:
        present = [[name for name in tier if name in fleet.idle] for tier in state.tiers]
        able = [rank for rank, tier in enumerate(present) if tier]
        if not able:
            return sorted(fleet.idle)[: self.clients]
        if not any(state.credits[rank] for rank in able):
            state.credits = [self.credits] * len(state.tiers)
        able = [rank for rank in able if state.credits[rank]]
        random = generator(fleet.seed, "tifl", state.round)
        weights = [sum(state.losses.get(name, 1.0) for name in present[rank]) / len(present[rank]) for rank in able]
        total = sum(weights)
        rank = able[random.choice(len(able), p=[weight / total for weight in weights] if total > 0 else None)]
        state.credits[rank] -= 1
        tier = present[rank]
        picked = random.choice(len(tier), min(self.clients, len(tier)), replace=False)
        return [tier[index] for index in sorted(picked)]
