"""Mimic (Karimireddy, He, Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022).

    sent = x_i,   i = argmax_i |z (x_i - mean)|,   z the first principal direction of the honest rows

Copies of one honest client pass every test for outliers, and what the others alone have learnt is outweighed. The
paper finds z over the first rounds and then keeps to one client; here i is found anew each time, or given.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Vector
from fedge.strategies import gram
from fedge.strategies.attacks.moments import mean
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class Mimic:
    """`client` counts the honest ones from 0 (byzfl's epsilon); -1: the one furthest out."""

    client: int = -1
    omniscient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.client < -1:
            raise ExperimentError(f"simulation.attack.client: must be -1 or the place of a client, not {self.client}.")

    def check(self, honest: int) -> None:
        """Raises ExperimentError for a place that none of so many honest clients has."""
        if self.client >= honest:
            raise ExperimentError(
                f"simulation.attack.client is {self.client}, and the {honest} honest clients have the places 0 to "
                f"{honest - 1}; name one of them, or -1."
            )

    def forge(self, scene: Scene) -> Vector:
        """A copy of that client's update."""
        rows = scene.honest
        if self.client >= 0:
            return rows[min(self.client, len(rows) - 1)].copy()
        apart = gram.distances(gram.gram(rows, mean(rows)))
        # Of the rows without their mean: inner products -1/2 J D J, and as first eigenvector the places along z.
        centring = np.eye(len(rows)) - 1.0 / len(rows)
        places = np.linalg.eigh(-0.5 * centring @ apart @ centring)[1][:, -1]
        return rows[int(np.abs(places).argmax())].copy()
