"""A share by the number of examples, as in FedAvg (McMahan et al. 2017, arXiv 1602.05629).

The count is the client's own claim, so it is capped: a liar gains no more than `cap` examples would give it.
"""

from dataclasses import dataclass

from fedge.core.errors import ExperimentError
from fedge.strategies.contracts import Arrival


@dataclass(frozen=True, slots=True)
class Examples:
    """min(examples, cap). Set `cap` to the largest honest shard; the default suits shards of up to 10 000 examples."""

    cap: int = 10_000

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise ExperimentError(f"server.weigher.cap: must be at least 1, not {self.cap}.")

    def weigh(self, arrival: Arrival) -> float:
        """The examples claimed, as far as the cap allows."""
        return float(min(arrival.examples, self.cap))
