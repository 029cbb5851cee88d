"""Phocas (Xie, Koyejo, Gupta, "Phocas: dimensional Byzantine-resilient stochastic gradient descent", 2018,
arXiv 1805.09682).

    of each coordinate, the mean of the n - f values nearest to the trimmed mean (f cut on each side)
"""

from dataclasses import dataclass
from typing import ClassVar

from fedge.core.params import Vector
from fedge.strategies.columns import Columns, nearest_mean, trimmed
from fedge.strategies.gram import Weights


@dataclass(frozen=True, slots=True)
class Phocas:
    """Needs n >= 2 f + 1."""

    honours_weights: ClassVar[bool] = False

    def least(self, byzantine: int) -> int:
        """2 f + 1."""
        return 2 * byzantine + 1

    def reduce(self, columns: Columns, byzantine: int, weights: Weights) -> Vector:
        """float32 [c] from [c, n]."""
        columns.sort(axis=1)
        centre = trimmed(columns, byzantine)
        return nearest_mean(columns, centre, columns.shape[1] - byzantine)
