"""DBW: wait for the fastest k of n clients, with k chosen anew each round (Xu, Neglia, Sebastianelli, "Dynamic Backup
Workers for Parallel Machine Learning", 2020).

    k* = argmax_k G(k) / T(k)
    G(k) = (eta - L eta^2 / 2) |g|^2 - (L eta^2 / 2) V / k         expected decrease of the loss
    T(k) = the k-th smallest predicted duration of the idle fleet

|g|^2 and V (variance between clients) are estimated from the norms of a group's updates and of their mean, with
g = delta / eta and eta = `rate` * steps; L from the decrease of the loss; all averaged over the last rounds. Our
reading for local steps: the paper has one gradient per round, and fits T(k) to a table of arrival times where we keep
each client's own. Updates of the backup workers (those that come after the k-th) are refused as too stale.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

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

SHORTEST_S = 1e-9  # a duration of zero would be worth infinitely much
WINDOW = 5  # rounds over which the estimates are averaged


@dataclass(slots=True)
class State:
    """The running round (k, who trains on it, how many came), predicted durations, and what L is estimated from."""

    k: int = 0
    awaited: dict[str, None] = field(default_factory=dict)
    arrived: int = 0
    durations: dict[str, float] = field(default_factory=dict)
    loss: float = inf
    samples: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DynamicBackupWorkers:
    """`steps` local steps per task at learning rate `rate`, which must be the clients' own."""

    steps: int = 100
    rate: float = 0.05

    def init(self) -> State:
        """No round yet."""
        return State()

    def step(self, state: State, signal: Signal, fleet: Fleet) -> tuple[State, list[Order]]:
        """Everybody trains on the current version; the round closes with the k-th arrival."""
        match signal:
            case Ready(client):
                if state.k == 0 and len(fleet.idle) < fleet.expected:
                    return state, []
                return state, self._send(state, fleet) if state.k == 0 else self._send_one(state, client)
            case Arrived(arrival):
                return state, self._arrived(state, arrival, fleet)
            case Lost(client):
                state.awaited.pop(client, None)
                return state, self._close_if_enough(state)
            case Closed(_, members, norm):
                self._learn(state, members, norm, fleet)
                return state, self._send(state, fleet)
        return state, []

    def _arrived(self, state: State, arrival: Arrival, fleet: Fleet) -> list[Order]:
        state.durations[arrival.client] = max(arrival.duration_s, SHORTEST_S)
        if arrival.staleness or arrival.overdue:
            again = self._send_one(state, arrival.client) if arrival.client in fleet.idle else []
            return [Discard(f"The round closed with its {state.k} fastest clients."), *again]
        state.awaited.pop(arrival.client, None)
        state.arrived += 1
        return [Keep("round"), *self._close_if_enough(state)]

    def _close_if_enough(self, state: State) -> list[Order]:
        enough = state.arrived >= state.k or not state.awaited
        return [Close(("round",))] if state.arrived and enough else []

    def _send(self, state: State, fleet: Fleet) -> list[Order]:
        state.k = min(state.k or fleet.expected, max(1, len(fleet.examples)))
        state.arrived = 0
        state.awaited = dict.fromkeys(sorted(fleet.idle))
        return [Train(client, self.steps) for client in state.awaited]

    def _send_one(self, state: State, client: str) -> list[Order]:
        state.awaited[client] = None
        return [Train(client, self.steps)]

    def _learn(self, state: State, members: tuple[Arrival, ...], norm: float, fleet: Fleet) -> None:
        loss = sum(member.metrics.get("loss_start", 0.0) for member in members) / len(members)
        before, state.loss = state.loss, loss
        times = sorted(state.durations[name] for name in fleet.examples if name in state.durations)
        if len(members) < 2 or not times:
            state.k = max(state.k, 2)  # a variance needs two
            return
        self._sample(state, members, norm, before - loss)
        if loss > 1.01 * before:
            state.k = min(len(times), state.k + 1)  # the paper's guard: a rising loss wants more clients
            return
        gain = self._gain(state)
        best = max(range(1, len(times) + 1), key=lambda k: (gain(k) / times[k - 1], k))
        state.k = best if gain(best) > 0 else len(times)

    def _sample(self, state: State, members: tuple[Arrival, ...], norm: float, decrease: float) -> None:
        """(|g|^2, V, L) of one round, each unbiased, so a single one may be below zero."""
        n, eta = len(members), self.rate * self.steps
        variance = (sum(member.norm**2 for member in members) - n * norm**2) / (n - 1) / eta**2
        gradient = norm**2 / eta**2 - variance / n
        smoothness = 2 * (eta * gradient - decrease) / norm**2 if norm and decrease < inf else 1 / eta
        state.samples = [*state.samples, (gradient, variance, smoothness)][-WINDOW:]

    def _gain(self, state: State) -> Callable[[int], float]:
        """G(k), from the means over the last rounds."""
        eta = self.rate * self.steps
        gradient, variance, smoothness = (max(0.0, sum(column) / len(column)) for column in zip(*state.samples))
        curve = smoothness * eta**2 / 2
        return lambda k: (eta - curve) * gradient - curve * variance / k
