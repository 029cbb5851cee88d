"""Client sampling of FedAvg: a fixed number of clients, drawn without replacement (McMahan et al., 2017, section 2)."""

from dataclasses import dataclass

from fedge.core.errors import ExperimentError
from fedge.core.random import generator
from fedge.strategies.contracts import Fleet


@dataclass(frozen=True, slots=True)
class Uniform:
    """`clients` per round, each idle client with the same probability."""

    clients: int

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ExperimentError(f"server.selector.clients is {self.clients}; a round needs at least 1.")

    def select(self, fleet: Fleet, round_: int) -> list[str]:
        """A sample that depends on the seed, the round and who is idle, and on nothing else."""
        names = sorted(fleet.idle)
        if len(names) <= self.clients:
            return names
        chosen = generator(fleet.seed, "select", round_).choice(len(names), self.clients, replace=False)
        return [names[index] for index in sorted(chosen)]
