"""Nearest-neighbour mixing (Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, "Fixing by Mixing: A Recipe for
Optimal Byzantine ML under Heterogeneity", AISTATS 2023, arXiv 2302.01772).

    every row becomes the mean of its n - f nearest rows, itself among them
"""

from dataclasses import dataclass

import numpy as np

from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights


@dataclass(frozen=True, slots=True)
class NearestNeighbourMixing:
    """B[i, j] = 1 / (n - f) where j is one of the n - f nearest to i."""

    def least(self, needed: int, byzantine: int) -> int:
        """As many rows as come out, and a majority of honest ones among the neighbours."""
        return max(needed, 2 * byzantine + 1)

    def mix(self, evidence: Evidence) -> tuple[Matrix, Weights]:
        """(B [n, n], the weights as they were)."""
        count, keep = evidence.rows, evidence.rows - evidence.byzantine
        apart = evidence.distances
        np.fill_diagonal(apart, -1.0)  # nobody is nearer than oneself
        nearest = np.argsort(apart, axis=1, kind="stable")[:, :keep]
        matrix = np.zeros((count, count))
        np.put_along_axis(matrix, nearest, 1.0 / keep, axis=1)
        return matrix, evidence.weights
