"""The server's half of normalised averaging, FedNova (Wang et al. 2020, arXiv 2007.07481, equation 8).

    w <- w - rate tau_eff sum_i p_i d_i / a_i,    p_i = n_i / sum n,    tau_eff = sum_i p_i a_i

The weigher of the same name gives update i the weight n_i / a_i, so the aggregate is their weighted mean and only a
scalar is left to do here. With equal a_i it is FedAvg. Must be used with that weigher: others already average deltas
that were never divided by their work.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedge.core.errors import ExperimentError
from fedge.core.params import Array, Vector
from fedge.core.task import DELTA
from fedge.strategies.contracts import Group
from fedge.strategies.optimizers.sgd import descend, positive_rate
from fedge.strategies.weighers.fednova import local_work


@dataclass(frozen=True, slots=True)
class FedNova:
    """`momentum` is that of the clients' SGD and the same as the weigher's."""

    rate: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        positive_rate(self.rate)
        if not 0 <= self.momentum < 1:
            raise ExperimentError(f"server.optimizer.momentum: must be at least 0 and below 1, not {self.momentum}.")

    def init(self, vector: Vector) -> None:
        """Nothing to remember."""

    def step(
        self, state: None, vector: Vector, aggregate: Mapping[str, Vector], group: Group
    ) -> tuple[None, Vector, Mapping[str, Array]]:
        """One step of the effective length."""
        return state, descend(vector, aggregate[DELTA], self.rate * self._scale(group)), {}

    def _scale(self, group: Group) -> float:
        """What turns sum(w d) / sum(w), w = n / a, into tau_eff sum(n d / a) / sum(n)."""
        work = [local_work(member.steps, self.momentum) for member in group.members]
        examples = [weight * each for weight, each in zip(group.weights, work)]
        total = sum(examples)
        if not total:
            return 1.0  # every weight is 0, and so is the aggregate
        effective = sum(n * each for n, each in zip(examples, work)) / total
        return effective * sum(group.weights) / total
