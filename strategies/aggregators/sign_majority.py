"""The majority of signs by coordinate (Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: Compressed Optimisation
for Non-Convex Problems", ICML 2018; Bernstein, Zhao, Azizzadenesheli, Anandkumar, "signSGD with Majority Vote is
Communication Efficient and Fault Tolerant", ICLR 2019), with a length of its own.

    sign(sum_i weight_i sign(x_i)) * median_i |x_i|      0 where the votes are equal

In the papers each coordinate moves by the learning rate. Here it moves by the (weighted) median of the magnitudes, so
that the result is an update like any other: it scales with the rows, and no minority makes it longer than an honest
row's value.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.params import Vector
from fedge.strategies.aggregators.median import median
from fedge.strategies.columns import Columns
from fedge.strategies.gram import Weights

EQUAL = 1e-6  # votes that differ by less of the weight are equal but for rounding


@dataclass(frozen=True, slots=True)
class SignMajority:
    """Needs n >= 2 f + 1, and less than half of the weight with the hostile rows."""

    honours_weights: ClassVar[bool] = True

    def least(self, byzantine: int) -> int:
        """2 f + 1."""
        return 2 * byzantine + 1

    def reduce(self, columns: Columns, byzantine: int, weights: Weights) -> Vector:
        """float32 [c] from [c, n]."""
        votes = np.sign(columns) @ weights.astype(np.float32)
        decided = np.sign(votes) * (np.abs(votes) > EQUAL)
        length: Vector = decided * median(np.abs(columns, out=columns), weights)
        return length
