"""The share of normalised averaging, FedNova (Wang et al. 2020, arXiv 2007.07481): examples per unit of local work.

Goes with the server optimizer of the same name, which scales the mean back. Owns a_i, the sum of the factors with
which a client's gradients enter its delta.
"""

from dataclasses import dataclass

from fedge.core.errors import ExperimentError
from fedge.strategies.contracts import Arrival


def local_work(steps: int, momentum: float) -> float:
    """a_i, the 1-norm of the step coefficients: `steps` for plain SGD, more where gradients linger in a momentum."""
    if not momentum:
        return float(steps)
    return (steps - momentum * (1.0 - momentum**steps) / (1.0 - momentum)) / (1.0 - momentum)


@dataclass(frozen=True, slots=True)
class FedNova:
    """min(examples, cap) / a_i. `momentum` is that of the clients' SGD, in [0, 1)."""

    momentum: float = 0.0
    cap: int = 10_000

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or self.cap < 1:
            raise ExperimentError("server.weigher: momentum must be at least 0 and below 1, and cap at least 1.")

    def weigh(self, arrival: Arrival) -> float:
        """Above 0 for an update of at least one step."""
        return min(arrival.examples, self.cap) / local_work(arrival.steps, self.momentum)
