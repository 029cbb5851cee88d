"""MeaMed, the mean around the median (Xie, Koyejo, Gupta, "Generalized Byzantine-tolerant SGD", 2018,
arXiv 1802.10116).

    of each coordinate, the mean of the n - f values nearest to the median

As in byzfl.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedge.core.params import Vector
from fedge.strategies.columns import Columns, middle, nearest_mean
from fedge.strategies.gram import Weights


@dataclass(frozen=True, slots=True)
class MeaMed:
    """Needs n >= 2 f + 1."""

    honours_weights: ClassVar[bool] = False

    def least(self, byzantine: int) -> int:
        """2 f + 1."""
        return 2 * byzantine + 1

    def reduce(self, columns: Columns, byzantine: int, weights: Weights) -> Vector:
        """float32 [c] from [c, n]."""
        columns.sort(axis=1)
        return nearest_mean(columns, middle(columns), columns.shape[1] - byzantine)
