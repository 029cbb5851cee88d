"""The trimmed mean by coordinate (Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards
Optimal Statistical Rates", ICML 2018).

    without the f smallest and the f largest values of each coordinate, the mean of the rest

As in byzfl; Flower cuts int(beta n) on each side.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedge.core.params import Vector
from fedge.strategies.columns import Columns, trimmed
from fedge.strategies.gram import Weights


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """Needs n >= 2 f + 1."""

    honours_weights: ClassVar[bool] = False

    def least(self, byzantine: int) -> int:
        """2 f + 1."""
        return 2 * byzantine + 1

    def reduce(self, columns: Columns, byzantine: int, weights: Weights) -> Vector:
        """float32 [c] from [c, n]."""
        columns.sort(axis=1)
        return trimmed(columns, byzantine)
