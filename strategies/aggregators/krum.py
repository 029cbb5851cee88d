"""Krum and Multi-Krum (Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine Tolerant
Gradient Descent", NIPS 2017).

    score(i) = sum of the squared distances from x_i to its n - f - 2 nearest other rows
    Krum: the row with the smallest score.   Multi-Krum: the mean of the m rows with the smallest, m = n - f here.

Neighbours and squared distances as in the paper and in Flower; byzfl and Garfield take n - f - 1 neighbours, fedlib
squares the squares. Flower keeps m = 1 unless told otherwise, Garfield n - f - 2.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights


def scores(apart: Matrix, byzantine: int) -> Weights:
    """Krum's score of every row, [n], from the squared distances [n, n]; of several such matrices, [..., n]."""
    nearest = max(1, apart.shape[-1] - byzantine - 2)
    found: Weights = np.sort(apart, axis=-1)[..., 1 : nearest + 1].sum(axis=-1)
    return found


@dataclass(frozen=True, slots=True)
class Krum:
    """One row; needs n >= 2 f + 3."""

    honours_weights: ClassVar[bool] = False

    def least(self, byzantine: int) -> int:
        """2 f + 3."""
        return 2 * byzantine + 3

    def coefficients(self, evidence: Evidence) -> Weights:
        """1 for the chosen row, 0 for the rest; the first in the order of names where scores tie."""
        return self.by_distance(evidence.distances, evidence.byzantine)

    def by_distance(self, apart: Matrix, byzantine: int) -> Weights:
        """The same from the squared distances [..., n, n]."""
        return _best(apart, byzantine, 1)


@dataclass(frozen=True, slots=True)
class MultiKrum:
    """The mean of the `keep` best rows (0: n - f); needs n >= 2 f + 3."""

    keep: int = 0
    honours_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ExperimentError(f"server.aggregator.keep: must be at least 0, not {self.keep}.")

    def least(self, byzantine: int) -> int:
        """2 f + 3, and enough rows to keep."""
        return max(2 * byzantine + 3, self.keep + byzantine)

    def coefficients(self, evidence: Evidence) -> Weights:
        """1 / m for the m best rows."""
        return self.by_distance(evidence.distances, evidence.byzantine)

    def by_distance(self, apart: Matrix, byzantine: int) -> Weights:
        """The same from the squared distances [..., n, n]."""
        return _best(apart, byzantine, self.keep or apart.shape[-1] - byzantine)


def _best(apart: Matrix, byzantine: int, keep: int) -> Weights:
    found = scores(apart, byzantine)
    chosen = np.zeros(found.shape)
    np.put_along_axis(chosen, np.argsort(found, axis=-1, kind="stable")[..., :keep], 1.0 / keep, axis=-1)
    return chosen
