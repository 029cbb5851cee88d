"""FedBuff: aggregate whenever K updates have come (Nguyen et al., "Federated Learning with Buffered Asynchronous
Aggregation", 2022).

    w <- w - eta_g / K * sum over the buffer of s(tau_i) delta_i

Clients never wait: each is sent off again, on the newest version, as soon as it has delivered.
"""

from dataclasses import dataclass

from fedge.strategies.contracts import Arrived, Close, Closed, Fleet, Keep, Order, Ready, Signal, Train


@dataclass(slots=True)
class State:
    """How many updates the buffer holds."""

    held: int = 0


@dataclass(frozen=True, slots=True)
class FedBuff:
    """`buffer` is K, `steps` the local steps of a task, `rate` is eta_g."""

    steps: int = 100
    buffer: int = 3
    rate: float = 1.0

    def init(self) -> State:
        """An empty buffer."""
        return State()

    def step(self, state: State, signal: Signal, fleet: Fleet) -> tuple[State, list[Order]]:
        """Fill the buffer; close it when full."""
        match signal:
            case Ready(client):
                return state, [Train(client, self.steps)]
            case Arrived(arrival):
                orders: list[Order] = [Keep("buffer")]
                state.held += 1
                if state.held >= self.buffer:
                    orders.append(Close(("buffer",), self.rate))
                if arrival.client in fleet.idle:
                    orders.append(Train(arrival.client, self.steps))
                return state, orders
            case Closed():
                state.held = 0
        return state, []
