"""FedAsync: every arrival is a new version (Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", 2019).

    w <- (1 - alpha s(tau)) w + alpha s(tau) w_i        which is w - alpha s(tau) delta_i up to the client's drift

The mixing form needs the client's model; fedge moves along the delta, the pseudo-gradient against the client's base.
s(tau) is the staleness weigher and starts anew for each update (a published implementation decays alpha for good).
"""

from dataclasses import dataclass

from fedge.strategies.contracts import Arrived, Close, Fleet, Keep, Order, Ready, Signal, Train


@dataclass(frozen=True, slots=True)
class FedAsync:
    """`steps` local steps per task; each update moves the model by `alpha` times its delta."""

    steps: int = 100
    alpha: float = 0.6

    def init(self) -> dict[str, int]:
        """Nothing to remember."""
        return {}

    def step(self, state: dict[str, int], signal: Signal, fleet: Fleet) -> tuple[dict[str, int], list[Order]]:
        """Aggregate at once, and send the client off again on the result."""
        match signal:
            case Ready(client):
                return state, [Train(client, self.steps)]
            case Arrived(arrival):
                orders: list[Order] = [Keep("each"), Close(("each",), self.alpha)]
                if arrival.client in fleet.idle:
                    orders.append(Train(arrival.client, self.steps))
                return state, orders
        return state, []
