"""Plain steps: w <- w - rate * delta. With rate 1 and a weighted mean this is FedAvg (arXiv 1602.05629).

Owns the one step that the other optimizers end with. Must never change the vectors it is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Array, Vector
from fedge.core.task import DELTA
from fedge.strategies.contracts import Group


def positive_rate(rate: float) -> None:
    """Raises ExperimentError unless the server's learning rate is a number above 0."""
    if not 0 < rate < float("inf"):
        raise ExperimentError(f"server.optimizer.rate: must be a number above 0, not {rate}.")


def descend(vector: Vector, direction: Vector, rate: float) -> Vector:
    """A new vector [d], vector - rate * direction."""
    if rate == 1.0:
        return np.subtract(vector, direction)
    out: Vector = np.multiply(direction, -rate)
    return np.add(out, vector, out=out)


@dataclass(frozen=True, slots=True)
class Sgd:
    """w - rate * delta."""

    rate: float = 1.0

    def __post_init__(self) -> None:
        positive_rate(self.rate)

    def init(self, vector: Vector) -> None:
        """Nothing to remember."""

    def step(
        self,
        state: None,
        vector: Vector,
        aggregate: Mapping[str, Vector],
        group: Group,
    ) -> tuple[None, Vector, Mapping[str, Array]]:
        """One step down the pseudo-gradient."""
        return state, descend(vector, aggregate[DELTA], self.rate), {}
