"""Centered clipping (Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021,
arXiv 2012.10333).

    v <- v + sum of w_i (x_i - v) min(1, tau / |x_i - v|),   starting from v = 0

Rows are what clients moved the model by, so v = 0 is the model as it stands; the paper starts from the last aggregate.
Here tau = `radius` times the weighted median of |x_i - v|, found anew in each step: a number in the units of the rows
(byzfl has tau = 100) clips nothing or everything, depending on the model and the learning rate.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.aggregators.geometric_median import away, middle
from fedge.strategies.gram import Weights


@dataclass(frozen=True, slots=True)
class CenteredClipping:
    """Needs n >= 2 f + 1."""

    iterations: int = 3
    radius: float = 1.0
    honours_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ExperimentError(f"server.aggregator.iterations: must be at least 1, not {self.iterations}.")
        if not 0 < self.radius < float("inf"):
            raise ExperimentError(
                f"server.aggregator.radius: must be above 0 and finite, not {self.radius:g}; it multiplies the median "
                "distance."
            )

    def least(self, byzantine: int) -> int:
        """2 f + 1."""
        return 2 * byzantine + 1

    def coefficients(self, evidence: Evidence) -> Weights:
        """C >= 0 [n], adding up to at most 1; what is missing to 1 stays at v = 0."""
        found = np.zeros(evidence.rows)
        for _ in range(self.iterations):
            apart = away(evidence.gram, found)
            radius = self.radius * middle(apart, evidence.weights)
            if radius == 0:  # v lies on half of the rows, and the rest may not pull at all
                break
            pull = evidence.weights * (radius / np.maximum(apart, radius))
            found = (1.0 - pull.sum()) * found + pull
        return found
