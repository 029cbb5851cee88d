"""The geometric median, smoothed (Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", IEEE
Transactions on Signal Processing, 2022, arXiv 1912.13445: RFA), by Weiszfeld's iteration.

    z = argmin sum of w_i |x_i - z|
    z <- sum of b_i x_i / sum of b_i,   b_i = w_i / max(nu, |x_i - z|)

It withstands hostile rows of less than half the weight. Here nu = `smoothing` times the median distance from the
medoid (the row with the smallest weighted sum of distances), so that scaling all rows scales the result, and the
iteration starts from the rows averaged around the medoid with none pulling harder than the median one: an outlier of
any size is harmless from the first step on. byzfl starts from 0, takes 3 steps, and has an absolute nu of 0.1.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights

STILL = 1e-9  # the coefficients add up to 1: with less change than this in all of them, the iteration ends


def away(gram: Matrix, coefficients: Weights) -> Weights:
    """|x_i - coefficients @ rows|, [n]."""
    along = gram @ coefficients
    found: Weights = np.sqrt(np.maximum(np.diag(gram) - 2 * along + coefficients @ along, 0.0))
    return found


def middle(values: Weights, weights: Weights) -> float:
    """The (lower) weighted median: the smallest value that with those below it has half of the weight, which is 1."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    half = 0.5 - 1e-9  # a sum of weights may fall short by a rounding
    return float(values[order[np.searchsorted(below, half)]])


@dataclass(frozen=True, slots=True)
class GeometricMedian:
    """Needs n >= 2 f + 1; at most `iterations` steps, fewer where it stands still earlier.

    `smoothing` is a share of the median distance: a row nearer than that pulls no harder. Distances are known to some
    1e-4 of the rows' length, so a much smaller share gains nothing.
    """

    iterations: int = 1000
    smoothing: float = 1e-3
    honours_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ExperimentError(f"server.aggregator.iterations: must be at least 1, not {self.iterations}.")
        if not 0 < self.smoothing <= 1:
            raise ExperimentError(
                f"server.aggregator.smoothing: must be above 0 and at most 1, not {self.smoothing:g}; it is a share of "
                "the median distance."
            )

    def least(self, byzantine: int) -> int:
        """2 f + 1."""
        return 2 * byzantine + 1

    def coefficients(self, evidence: Evidence) -> Weights:
        """C >= 0 [n], adding up to 1."""
        weights = evidence.weights
        medoid = int(np.argmin(np.sqrt(evidence.distances) @ weights))
        gram = _around(evidence.gram, medoid)
        apart = np.sqrt(np.maximum(np.diag(gram), 0.0))
        radius = middle(apart, weights)
        if radius == 0:  # half of the weight lies in one point, which is the median
            return _shares(weights * (apart == 0))
        found = _shares(weights / np.maximum(apart, radius))
        for _ in range(self.iterations):
            before = found
            found = _shares(weights / np.maximum(away(gram, before), self.smoothing * radius))
            if np.abs(found - before).sum() < STILL:
                break
        return found


def _around(gram: Matrix, row: int) -> Matrix:
    """The inner products of all rows less this one."""
    along = gram[row]
    moved: Matrix = gram - along[:, None] - along[None, :] + along[row]
    return moved


def _shares(values: Weights) -> Weights:
    share: Weights = values / values.sum()
    return share
