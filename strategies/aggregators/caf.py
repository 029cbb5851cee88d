"""CAF, the covariance-bound agnostic filter (Allouah, Guerraoui, Stephan, "Towards Trustworthy Federated Learning with
Untrusted Participants", ICML 2025).

    c = 1;  while sum(c) > n - 2 f:
        mu = sum(c_i x_i) / sum(c);  lambda, v = the largest eigenvalue of the covariance weighted by c, its direction
        c_i <- c_i (1 - t_i / max_j t_j)     where t_i = <x_i - mu, v>^2
    out = the mu with the smallest lambda

The eigenvectors are exact: the covariance has the rows' span, so n x n inner products hold it all. byzfl takes one step
of the power method from a random vector instead, so its lambda is off by a random factor. Here max_j is over rows that
still count; byzfl's is over all, so that a far row it has dropped already stops it from ever dropping another: it then
runs for ever. Without hostile rows the result is the mean, and where the rows left coincide it is that row; byzfl
returns nothing for either.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights


def widest(gram: Matrix, counts: Weights) -> tuple[float, Weights]:
    """The largest eigenvalue of the covariance of rows weighted by `counts` [n], and every row's squared projection on
    its eigenvector, [n].
    """
    shares = counts / counts.sum()
    along = gram @ shares
    centred = gram - along[:, None] - along + shares @ along
    counted = np.flatnonzero(shares)
    roots = np.sqrt(shares[counted])
    values, vectors = np.linalg.eigh(roots[:, None] * centred[np.ix_(counted, counted)] * roots)
    value = max(float(values[-1]), 0.0)
    if value == 0.0:
        return 0.0, np.zeros(len(gram))
    projections: Weights = (centred[:, counted] @ (roots * vectors[:, -1])) ** 2 / value
    return value, projections


@dataclass(frozen=True, slots=True)
class CovarianceFilter:
    """Needs n >= 2 f + 1."""

    honours_weights: ClassVar[bool] = False

    def least(self, byzantine: int) -> int:
        """2 f + 1."""
        return 2 * byzantine + 1

    def coefficients(self, evidence: Evidence) -> Weights:
        """The c / sum(c) whose largest eigenvalue was smallest, [n]."""
        counts, best, smallest = np.ones(evidence.rows), np.ones(evidence.rows), np.inf
        while counts.sum() > evidence.rows - 2 * evidence.byzantine:
            value, projections = widest(evidence.gram, counts)
            if value < smallest:
                smallest, best = value, counts
            largest = projections[counts > 0].max()
            if not largest > 0:
                break
            counts = counts * np.maximum(0.0, 1.0 - projections / largest)  # at least one more is 0 now
        shares: Weights = best / best.sum()
        return shares
