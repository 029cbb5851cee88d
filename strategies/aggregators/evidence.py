"""What a robust rule may see, and the four forms a rule can take.

Rows [n, d] are update deltas. Most rules need only their inner products (the Gram family), some the sorted values of
each coordinate, gradient splitting both by parts. A pre-aggregator is a matrix in front of any of them.

Owns these words. Must never hold a rule, or a row.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedge.core.params import Vector
from fedge.strategies.boundary import asked, named, numbers, plugged
from fedge.strategies.gram import Matrix, Weights, distances


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of n rows when a group closes.

    `gram` [n, n] holds their inner products, `weights` [n] add up to 1, `clients` are whose rows they are, in
    alphabetical order (after a pre-aggregator that merges rows, what stands for each), at most `byzantine` (f) of them
    hostile. `seed` is this group's own.
    """

    gram: Matrix
    weights: Weights
    byzantine: int
    clients: tuple[str, ...]
    seed: int = 0

    @property
    def rows(self) -> int:
        """N."""
        return len(self.clients)

    @property
    def norms(self) -> Weights:
        """|x_i|, [n]."""
        return np.sqrt(np.maximum(np.diag(self.gram), 0.0))

    @property
    def distances(self) -> Matrix:
        """|x_i - x_j|^2, [n, n]."""
        return distances(self.gram)

    def mixed(self, matrix: Matrix, weights: Weights) -> "Evidence":
        """The evidence on the rows `matrix @ rows`, with these weights."""
        same = len(matrix) == self.rows
        clients = self.clients if same else tuple(f"mix-{index:03d}" for index in range(len(matrix)))
        return Evidence(matrix @ self.gram @ matrix.T, weights, self.byzantine, clients, self.seed)


class GramRule(Protocol):
    """A rule that decides by inner products alone."""

    honours_weights: ClassVar[bool]

    def least(self, byzantine: int) -> int:
        """The fewest rows with which it withstands that many hostile ones."""

    def coefficients(self, evidence: Evidence) -> Weights:
        """C [n]; the aggregate is c @ rows."""


class CoordinateRule(Protocol):
    """A rule that treats every coordinate by itself."""

    honours_weights: ClassVar[bool]

    def least(self, byzantine: int) -> int:
        """The fewest rows with which it withstands that many hostile ones."""

    def reduce(self, columns: NDArray[np.float32], byzantine: int, weights: Weights) -> Vector:
        """One value per coordinate, float32 [c], from all rows' values [c, n]; `columns` may be overwritten."""


@runtime_checkable
class Mixing(Protocol):
    """Rows to rows by a matrix, which costs nothing in front of a Gram rule. A rule may begin with one of its own."""

    def mix(self, evidence: Evidence) -> tuple[Matrix, Weights]:
        """(B [m, n], weights [m] that add up to 1); the rows behind it are B @ rows."""


class PreAggregator(Mixing, Protocol):
    """A mixing that is set in front of any rule."""

    def least(self, needed: int, byzantine: int) -> int:
        """The fewest rows in front of it when `needed` are wanted behind it."""


class SplitRule(Protocol):
    """A rule that decides by the parts of the rows, and so must read them once more."""

    honours_weights: ClassVar[bool]

    def least(self, byzantine: int) -> int:
        """The fewest rows with which it withstands that many hostile ones."""

    def choose(self, rows: Sequence[Vector], evidence: Evidence, pre: Sequence[PreAggregator]) -> Weights:
        """C [n]; the aggregate is c @ rows."""


@runtime_checkable
class Demanding(Protocol):
    """A rule or pre-aggregator for which not any clients will do."""

    def lacks(self, clients: Collection[str]) -> str:
        """What is missing among these, in words; empty where nothing is."""


def behind(steps: Iterable[Mixing], evidence: Evidence) -> tuple[Evidence, Matrix]:
    """What is seen behind these steps, and the one matrix [m, n] that all of them come to. Raises StrategyError where
    one of them breaks.
    """
    seen, mixing = evidence, np.eye(evidence.rows)
    for step in steps:
        matrix, weights = _mixed(step, seen)
        seen, mixing = seen.mixed(matrix, weights), matrix @ mixing
    return seen, mixing


def _mixed(step: Mixing, seen: Evidence) -> tuple[Matrix, Weights]:
    found = asked(step, "mix", seen)
    with plugged(named(step, "mix")):
        matrix, weights = found
        count = len(matrix)
    return numbers(step, "mix", matrix, (count, seen.rows)), numbers(step, "mix", weights, (count,))
