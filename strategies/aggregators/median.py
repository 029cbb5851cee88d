"""The median by coordinate (Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018), weighted where the weights differ.

    the value at which the weights, added up in ascending order of the values, first reach 1/2;
    where they reach it exactly, the mean of that value and the next

So equal weights give the mean of the two middle values for an even n, as in byzfl and Flower; torch.median, and with it
fedlib and the published code of gradient splitting, take the lower one.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.params import Vector
from fedge.strategies.columns import Columns, middle
from fedge.strategies.gram import Weights

EXACTLY = 1e-9  # a sum of weights this close to 1/2 is 1/2


@dataclass(frozen=True, slots=True)
class Median:
    """Needs n >= 2 f + 1, and less than half of the weight with the hostile rows."""

    honours_weights: ClassVar[bool] = True

    def least(self, byzantine: int) -> int:
        """2 f + 1."""
        return 2 * byzantine + 1

    def reduce(self, columns: Columns, byzantine: int, weights: Weights) -> Vector:
        """float32 [c] from [c, n]."""
        return median(columns, weights)


def median(columns: Columns, weights: Weights) -> Vector:
    """The weighted median of each coordinate, [c]; `columns` [c, n] may be overwritten, `weights` add up to 1."""
    if (weights == weights[0]).all():
        columns.sort(axis=1)
        return middle(columns)
    order = np.argsort(columns, axis=1)
    reached, lines = np.cumsum(weights[order], axis=1), np.arange(len(columns))
    places = [np.count_nonzero(reached < half, axis=1) for half in (0.5 - EXACTLY, 0.5 + EXACTLY)]
    low, high = (columns[lines, order[lines, place]] for place in places)
    found: Vector = np.where(low == high, low, 0.5 * low + 0.5 * high)
    return found
