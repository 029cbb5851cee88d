"""Bucketing (Karimireddy, He, Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022,
arXiv 2006.09365).

    the rows in random order, s at a time; every bucket becomes its mean

Means of s differ less among themselves than rows do, and f hostile rows still spoil at most f of the ceil(n / s) means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.random import generator
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights


def means(buckets: Sequence[int], weights: Weights) -> tuple[Matrix, Weights]:
    """(B [m, n], weights [m]): the weighted mean of each bucket's rows, and their weight together.

    `buckets` [n] names each row's; they come out in the order in which their first rows come in.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(buckets))}
    matrix = np.zeros((len(places), len(buckets)))
    matrix[[places[name] for name in buckets], np.arange(len(buckets))] = 1.0
    shares, sizes = matrix @ weights, matrix.sum(axis=1)
    weighed = shares[:, None] > 0  # rows without weight that are among themselves count alike
    return np.where(weighed, matrix * weights, matrix) / np.where(weighed, shares[:, None], sizes[:, None]), shares


@dataclass(frozen=True, slots=True)
class Bucketing:
    """Buckets of `size` (s) rows, the last one perhaps of fewer."""

    size: int = 2

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ExperimentError(f"server.aggregator.pre.bucketing.size: must be at least 1 row, not {self.size}.")

    def least(self, needed: int, byzantine: int) -> int:
        """One row more than fill all but the last of the buckets that are needed."""
        return self.size * (needed - 1) + 1

    def mix(self, evidence: Evidence) -> tuple[Matrix, Weights]:
        """(B [ceil(n / s), n], the weight in each bucket); the order is drawn anew for each group."""
        drawn = generator(evidence.seed, "bucketing").permutation(evidence.rows)
        return means((drawn // self.size).tolist(), evidence.weights)
