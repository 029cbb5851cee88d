"""Mean and spread of the rows an attacker sees. Must never hold an attack."""

from collections.abc import Sequence

import numpy as np

from fedge.core.params import Vector
from fedge.strategies.columns import columnwise
from fedge.strategies.gram import weighted_sum


def mean(rows: Sequence[Vector]) -> Vector:
    """The mean of rows [n, d], float32 [d]."""
    return weighted_sum(rows, np.full(len(rows), 1.0 / len(rows)))


def deviation(rows: Sequence[Vector]) -> Vector:
    """The standard deviation of each coordinate over the n rows (divided by n), float32 [d]."""
    return columnwise(rows, lambda columns: columns.std(axis=1))
