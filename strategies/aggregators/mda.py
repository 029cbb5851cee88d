"""Minimum-diameter averaging (El-Mhamdi, Guerraoui, Guirguis, Hoang, Rouault, "Genuinely Distributed Byzantine Machine
Learning", PODC 2020).

    diameter(S) = the largest distance between two rows of S
    the mean of the n - f rows whose diameter is smallest

Not all C(n, f) subsets need looking at. Whatever shrinks a set's diameter leaves out one of its two farthest rows, so
the search tree has 2 branches at each of f levels, and n plays no part in their number.

Of subsets with the same diameter (there often are some: one pair of rows decides it) the one with the smallest sum of
squared distances is taken, so that the order of rows does not matter; byzfl takes the first that it meets.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights

MAX_SUBSETS = 1 << 16  # the worst case takes half a second with 100 rows


@dataclass(frozen=True, slots=True)
class MinimumDiameterAveraging:
    """Needs n >= 2 f + 1, and 2^f subsets to be no more than MAX_SUBSETS."""

    honours_weights: ClassVar[bool] = False

    def least(self, byzantine: int) -> int:
        """2 f + 1. Raises ExperimentError where f is too large for the search."""
        most = MAX_SUBSETS.bit_length() - 1
        if byzantine > most:
            raise ExperimentError(
                f"server.aggregator 'mda' compares up to 2^f subsets, so its byzantine can be at most {most}, not "
                f"{byzantine}; 'multi-krum' behind pre = [\"nnm\"] has no such bound."
            )
        return 2 * byzantine + 1

    def coefficients(self, evidence: Evidence) -> Weights:
        """1 / (n - f) for the rows of the chosen subset, 0 for the rest."""
        kept = _tightest(evidence.distances, evidence.byzantine)
        share: Weights = kept / kept.sum()
        return share


def _tightest(apart: Matrix, leave_out: int) -> Weights:
    """1.0 for the rows that stay, [n]. Sets of rows are the bits of whole numbers."""
    first, second = np.triu_indices(len(apart), 1)
    order = np.argsort(-apart[first, second], kind="stable")
    pairs = [1 << i | 1 << j for i, j in zip(first[order].tolist(), second[order].tolist())]
    found = {0: 0}  # rows left out -> the farthest pair of the others comes at this place of `pairs` or later
    for _ in range(leave_out):
        grown: dict[int, int] = {}
        for gone, seen in found.items():
            place = _farthest(pairs, gone, seen)
            low = pairs[place] & -pairs[place]
            grown |= {gone | low: place, gone | pairs[place] ^ low: place}
        found = grown
    far = [*apart[first, second][order].tolist(), 0.0]  # 0: the diameter of one row alone
    diameters = {gone: far[_farthest(pairs, gone, place)] for gone, place in found.items()}
    least = min(diameters.values())
    tied = [gone for gone, diameter in diameters.items() if diameter == least]
    kept = np.array([[1.0 - (gone >> row & 1) for row in range(len(apart))] for gone in tied])
    best: Weights = kept[np.argmin(((kept @ apart) * kept).sum(axis=1))]
    return best


def _farthest(pairs: list[int], gone: int, place: int) -> int:
    """The first place from this one on whose pair has lost neither row; the number of pairs where none is left."""
    while place < len(pairs) and pairs[place] & gone:
        place += 1
    return place
