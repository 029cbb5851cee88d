"""Bulyan (El Mhamdi, Guerraoui, Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018).

    selection    theta = n - 2 f rows: Krum's winner is taken out, again and again
    reduction    of each coordinate, the mean of the beta = theta - 2 f selected values nearest to their median

`multi-krum` selects the theta best of one round of scores instead, as Flower's strategy does; its `aggregate_bulyan`
repeats Krum, as here. Garfield selects averages of rows. With m rows left, Krum adds up the squared distances to the
m - f - 2 nearest, and to at least one.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedge.core.params import Vector
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.aggregators.krum import scores
from fedge.strategies.columns import Columns, middle, nearest_mean
from fedge.strategies.gram import Matrix, Weights


@dataclass(frozen=True, slots=True)
class Bulyan:
    """Needs n >= 4 f + 3."""

    selection: Literal["iterative", "multi-krum"] = "iterative"
    honours_weights: ClassVar[bool] = False

    def least(self, byzantine: int) -> int:
        """4 f + 3."""
        return 4 * byzantine + 3

    def mix(self, evidence: Evidence) -> tuple[Matrix, Weights]:
        """(which rows are selected [theta, n], equal weights)."""
        many = evidence.rows - 2 * evidence.byzantine
        if self.selection == "iterative":
            chosen = _winners(evidence.distances, evidence.byzantine, many)
        else:
            chosen = np.argsort(scores(evidence.distances, evidence.byzantine), kind="stable")[:many].tolist()
        return np.eye(evidence.rows)[sorted(chosen)], np.full(many, 1.0 / many)

    def reduce(self, columns: Columns, byzantine: int, weights: Weights) -> Vector:
        """float32 [c] from [c, theta]."""
        columns.sort(axis=1)
        return nearest_mean(columns, middle(columns), columns.shape[1] - 2 * byzantine)


def _winners(apart: Matrix, byzantine: int, many: int) -> list[int]:
    """Which rows win when Krum is asked `many` times, each time without the winners before."""
    left = np.arange(len(apart))
    chosen: list[int] = []
    while len(chosen) < many:
        best = int(scores(apart[np.ix_(left, left)], byzantine).argmin())
        chosen.append(int(left[best]))
        left = np.delete(left, best)
    return chosen
