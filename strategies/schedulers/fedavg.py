"""FedAvg: rounds that wait for everybody who was asked (McMahan et al., "Communication-Efficient Learning of Deep
Networks from Decentralized Data", 2017).

An update from an earlier round is refused as too stale. A client that is lost does not hold the round up.
"""

from dataclasses import dataclass, field

from fedge.strategies.contracts import (
    Arrived,
    Close,
    Closed,
    Discard,
    Fleet,
    Keep,
    Lost,
    Order,
    Ready,
    Selector,
    Signal,
    Train,
)
from fedge.strategies.selectors.all import All


@dataclass(slots=True)
class State:
    """The running round: its number, whom it still awaits, and how many have arrived."""

    round: int = 0
    awaited: dict[str, None] = field(default_factory=dict)
    arrived: int = 0


@dataclass(frozen=True, slots=True)
class FedAvg:
    """`steps` local steps per round; a round begins once `min_clients` (default: all expected) are idle."""

    steps: int = 100
    min_clients: int = 0
    selector: Selector = All()

    def init(self) -> State:
        """No round yet."""
        return State()

    def step(self, state: State, signal: Signal, fleet: Fleet) -> tuple[State, list[Order]]:
        """Collect the round; begin the next when it closes."""
        match signal:
            case Ready() if not state.awaited:
                return state, self._begin(state, fleet)
            case Arrived(arrival):
                if arrival.version != fleet.version or arrival.overdue:
                    return state, [Discard(f"It is of version {arrival.version}; the round is past it.")]
                state.awaited.pop(arrival.client, None)
                state.arrived += 1
                return state, [Keep("round"), *self._close_if_whole(state)]
            case Lost(client) if client in state.awaited:
                del state.awaited[client]
                return state, self._close_if_whole(state) or ([] if state.awaited else self._begin(state, fleet))
            case Closed():
                state.arrived = 0
                return state, self._begin(state, fleet)
        return state, []

    def _close_if_whole(self, state: State) -> list[Order]:
        return [Close(("round",))] if state.arrived and not state.awaited else []

    def _begin(self, state: State, fleet: Fleet) -> list[Order]:
        # Only the first round waits for the whole fleet: later ones go on with who is there.
        needed = (self.min_clients or fleet.expected) if state.round == 0 else max(1, self.min_clients)
        if len(fleet.idle) < needed:
            return []
        state.round += 1
        state.awaited = dict.fromkeys(self.selector.select(fleet, state.round))
        return [Train(client, self.steps) for client in state.awaited]
