"""A scheduler of one's own: aggregate a fixed time after the first arrival, so that who is nearly done still counts.

The grace period of Liu et al., "Asynchronous Local-SGD Training for Language Modeling", 2024. Who comes later opens
the next group.
"""

from dataclasses import dataclass

from fedge.strategies.contracts import Arrived, Close, Closed, Fleet, Keep, Order, Ready, Signal, Ticked, Train, Wake


@dataclass(slots=True)
class State:
    """How many updates the open group holds, and when it closes (seconds on the machine's clock)."""

    held: int = 0
    closes_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Grace:
    """`steps` local steps of a task; a group closes `grace_s` seconds after its first arrival."""

    steps: int = 50
    grace_s: float = 3.0

    def init(self) -> State:
        """No group yet."""
        return State()

    def step(self, state: State, signal: Signal, fleet: Fleet) -> tuple[State, list[Order]]:
        """Send whoever is ready; open, fill and close the group; send its clients off again together."""
        match signal:
            case Ready(client):
                return state, [Train(client, self.steps)]
            case Arrived():
                state.held += 1
                if state.held > 1:
                    return state, [Keep("group")]
                state.closes_at = fleet.now + self.grace_s
                return state, [Keep("group"), Wake(state.closes_at)]
            case Ticked() if state.held and fleet.now >= state.closes_at:
                return state, [Close(("group",))]
            case Closed(members=members):
                state.held = 0
                back = dict.fromkeys(member.client for member in members if member.client in fleet.idle)
                return state, [Train(client, self.steps) for client in back]
        return state, []
