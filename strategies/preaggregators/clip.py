"""Clipping at the median norm: a row changes the result by its direction, and by its length only up to the usual one.

    x_i <- x_i min(1, factor * median of |x_j| / |x_i|)

byzfl's Clipping takes an absolute bound instead, which must fit the model and the learning rate.
"""

from dataclasses import dataclass

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights


def shortened(norms: Weights, limit: float) -> Matrix:
    """Diagonal [n, n]: what scales every row that is longer than `limit` down to it."""
    scale = np.divide(limit, norms, out=np.ones_like(norms), where=norms > limit)
    return np.diag(scale)


@dataclass(frozen=True, slots=True)
class Clip:
    """No row stays longer than `factor` times the median norm."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.factor < float("inf"):
            raise ExperimentError(
                f"server.aggregator.pre.clip.factor: must be above 0 and finite, not {self.factor:g}; it multiplies "
                "the median norm."
            )

    def least(self, needed: int, byzantine: int) -> int:
        """As many rows as come out; and a majority of honest ones, or the median norm would be a hostile row's."""
        return max(needed, 2 * byzantine + 1)

    def mix(self, evidence: Evidence) -> tuple[Matrix, Weights]:
        """(B [n, n], the weights as they were)."""
        norms = evidence.norms
        return shortened(norms, self.factor * float(np.median(norms))), evidence.weights
