"""The Flag Aggregator (Almasi, Mishra, Vamanan, Ravi, "Flag Aggregator: Scalable Distributed Training under Failures
and Augmented Losses using Convex Optimization", ICLR 2024): the subspace that explains most rows well, and the mean
projected on it.

    v_i   = |Y' y_i|^2 / |y_i|^2,    v_ij = |Y' (y_i - y_j)|^2 / |y_i - y_j|^2        Y' Y = 1, Y of rank m
    min_Y   sum_i sqrt(1 - v_i)  +  lambda / (n - 1)  sum_{i != j} sqrt(1 - v_ij)
    out   = Y Y' mean(y)

solved by reweighting: each step is a PCA in which a row counts (1 - v + eps)^(-1/2). It needs no vector of length d:
rows become coordinates in their own span, [n, n], and the n^2 pairs a graph Laplacian.

y are the unit rows here, and the result is scaled by the rows' median norm. The paper projects the rows as they are
(`unit` = False), and so is moved as far as the mean by a row that is long enough. The published code takes unit rows
too, but takes one step from a random start, which is a plain PCA.

The paper suggests lambda of the order of n, which is `pairwise` = 1. It is not the default: differences of rows do not
hold what all rows share, so the subspace fills up with noise. On attack-free rows (n = 20, noise 3.3 times the mean)
the result was at right angles to the honest mean.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights, distances

EPS = 1e-7  # of the share of a row that is not explained
NOTHING = 1e-12  # of the largest eigenvalue, or of the rows' squared norms: less is rounding


@dataclass(frozen=True, slots=True)
class FlagAggregator:
    """A subspace of `subspace` dimensions (0: half the rows and one), lambda = `pairwise` n, `iterations` steps."""

    subspace: int = 0
    pairwise: float = 0.0
    iterations: int = 5
    unit: bool = True
    honours_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.subspace < 0:
            raise ExperimentError(f"server.aggregator.subspace: must be at least 0, not {self.subspace}.")
        if not 0 <= self.pairwise < math.inf:
            raise ExperimentError(f"server.aggregator.pairwise: must be at least 0, not {self.pairwise}.")
        if self.iterations < 1:
            raise ExperimentError(f"server.aggregator.iterations: must be at least 1, not {self.iterations}.")

    def least(self, byzantine: int) -> int:
        """2 f + 1."""
        return 2 * byzantine + 1

    def coefficients(self, evidence: Evidence) -> Weights:
        """What each row adds to the projected mean, [n]; may be negative."""
        count, norms = evidence.rows, evidence.norms
        inverse = np.divide(1.0, norms, out=np.zeros(count), where=norms > 0)
        units = evidence.gram * inverse[:, None] * inverse
        lengths = np.ones(count) if self.unit else norms
        scale = float(np.median(norms)) if self.unit else 1.0
        return self._projected(units, lengths) * inverse * scale / count

    def _projected(self, units: Matrix, lengths: Weights) -> Weights:
        """The coefficients of the unit rows in the projection of sum(lengths * unit rows)."""
        count = len(units)
        rank = min(count, self.subspace or math.ceil((count + 1) / 2))
        strength = self.pairwise * count / max(1, count - 1)
        closeness = _inverse_distances(units, lengths)
        values, vectors = np.linalg.eigh(units)
        rows = vectors * np.sqrt(np.maximum(values, 0.0))  # coordinates of the unit rows: rows @ rows.T == units
        explained, pairs = np.zeros(count), np.zeros((count, count))
        for _ in range(self.iterations):
            edges = strength * _weights(pairs) * closeness
            laplacian = np.diag(edges.sum(axis=1)) - edges
            mixing = np.diag(_weights(explained)) + 2.0 * lengths[:, None] * laplacian * lengths
            values, vectors = np.linalg.eigh(rows.T @ mixing @ rows)
            kept = slice(max(count - rank, int(np.searchsorted(values, NOTHING * values[-1], "right"))), None)
            seen, values = rows @ vectors[:, kept], values[kept]
            within = seen @ seen.T
            explained = np.diag(within)
            pairs = distances(within * lengths[:, None] * lengths) * closeness
        coefficients: Weights = mixing @ (seen / values) @ (seen.T @ lengths)
        return coefficients


def _inverse_distances(units: Matrix, lengths: Weights) -> Matrix:
    """1 / |y_i - y_j|^2 for the rows y = lengths * units, and 0 where two of them coincide."""
    squares = lengths**2
    apart = distances(units * lengths[:, None] * lengths)
    distinct = apart > NOTHING * (squares[:, None] + squares)
    return np.divide(1.0, apart, out=np.zeros_like(apart), where=distinct)


def _weights(explained: Matrix) -> Matrix:
    """(1 - v + eps)^(-1/2)."""
    weights: Matrix = 1.0 / np.sqrt(1.0 - np.minimum(explained, 1.0) + EPS)
    return weights
