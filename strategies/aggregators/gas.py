"""GAS, gradient splitting (Liu et al., "Byzantine-Robust Learning on Heterogeneous Data via Gradient Splitting",
ICML 2023): another rule judges parts of the rows, where a hostile row cannot hide in the whole.

    split the d coordinates at random into equal parts; for each part q, a_q = base(x_1^q, ..., x_n^q)
    score(i) = sum over q of |x_i^q - a_q|;     the mean of the n - f rows with the smallest score

The published code splits the weights of models, takes f from the truth, and its Bulyan averages distances instead of
values; here rows are updates, and the base is the rule of that name. Coordinates stay together in runs where that
changes little (parts.py). Pre-aggregators work on each part by itself.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import ExperimentError
from fedge.core.lanes import halves
from fedge.core.params import Vector
from fedge.core.registry import Registry
from fedge.strategies.aggregators import AGGREGATORS
from fedge.strategies.aggregators.evidence import Demanding, Evidence, Mixing, behind
from fedge.strategies.gram import CLOSE, Matrix, Weights, distances
from fedge.strategies.parts import Parts

Panel = NDArray[np.float32]  # [n, parts, coordinates]
Stack = NDArray[np.float64]  # one matrix or vector per part


_BASES = Registry("server.aggregator.base", AGGREGATORS.entries)


@dataclass(frozen=True, slots=True)
class GradientSplitting:
    """`base` is the kind of a rule, with its own settings left as they are; `splits` counts the parts, d at most."""

    base: str = "multi-krum"
    splits: int = 1000
    honours_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ExperimentError(f"server.aggregator.splits: must be at least 1, not {self.splits}.")
        if not any(hasattr(self._rule(), form) for form in ("coefficients", "reduce")):
            raise ExperimentError(f"server.aggregator.base: {self.base!r} cannot judge parts; take e.g. 'multi-krum'.")

    def _rule(self) -> Any:
        return _BASES.build({"kind": self.base})

    def least(self, byzantine: int) -> int:
        """As the base."""
        return int(self._rule().least(byzantine))

    def lacks(self, clients: Collection[str]) -> str:
        """What the base misses."""
        rule = self._rule()
        return rule.lacks(clients) if isinstance(rule, Demanding) else ""

    def choose(self, rows: Sequence[Vector], evidence: Evidence, pre: Sequence[Mixing]) -> Weights:
        """1 / (n - f) for the n - f rows with the smallest scores, the first in the order of names where they tie."""
        rule = self._rule()
        judge = Judge(rule, (*pre, *([rule] if isinstance(rule, Mixing) else [])), evidence)
        parts = Parts.random(rows[0].size, self.splits, evidence.seed)
        scores = np.zeros(evidence.rows)
        for low, high in parts.batches():
            scores += judge.away(rows, parts, low, high).sum(axis=0)
        keep = evidence.rows - evidence.byzantine
        chosen = np.zeros(evidence.rows)
        chosen[np.argsort(scores, kind="stable")[:keep]] = 1.0 / keep
        return chosen


@dataclass(frozen=True, slots=True)
class Judge:
    """The base rule, behind the mixings `steps`, on one part of the rows after the other."""

    rule: Any
    steps: tuple[Mixing, ...]
    evidence: Evidence

    def away(self, rows: Sequence[Vector], parts: Parts, low: int, high: int) -> Stack:
        """|x_i^q - a_q| for the parts q of a batch, [parts, n]."""
        by_gram = hasattr(self.rule, "coefficients")
        grams = np.zeros((high - low, len(rows), len(rows)))
        if by_gram or self.steps:
            exact = _close(self.evidence)
            for panel in parts.panels(rows, low, high):
                grams += _products(panel, exact)
        if by_gram:
            squares = _off_sums(grams, self._coefficients(grams))
        else:
            seen = [self._behind(one) for one in grams] if self.steps else []
            squares = np.zeros((high - low, len(rows)))
            for panel in parts.panels(rows, low, high):
                off = panel - self._reduced(panel, seen)
                squares += np.einsum("ipc,ipc->pi", off, off)
        return np.sqrt(np.maximum(squares, 0.0))

    def _behind(self, gram: Matrix) -> tuple[Evidence, Matrix]:
        """A part with these products as seen behind the steps, and by which matrix."""
        return behind(self.steps, replace(self.evidence, gram=gram))

    def _coefficients(self, grams: Stack) -> Stack:
        """C [parts, n]; the aggregate of each part is c @ rows."""
        if not self.steps and hasattr(self.rule, "by_distance"):
            return np.asarray(self.rule.by_distance(distances(grams), self.evidence.byzantine))
        return np.array([self.rule.coefficients(seen) @ mixing for seen, mixing in map(self._behind, grams)])

    def _reduced(self, panel: Panel, views: Sequence[tuple[Evidence, Matrix]]) -> NDArray[np.float32]:
        """The aggregates [parts, c], by the values of each coordinate."""
        f = self.evidence.byzantine
        if not views:
            flat, weights = panel.reshape(len(panel), -1), self.evidence.weights
            found = halves(
                lambda low, high: self.rule.reduce(flat[:, low:high].T.copy(), f, weights),
                flat.shape[1],
                1 << 10,
            )
            return np.concatenate(found).reshape(panel.shape[1:])
        mixed = [matrix.astype(np.float32) @ panel[:, part] for part, (_, matrix) in enumerate(views)]
        columns_of = map(np.ascontiguousarray, (rows.T for rows in mixed))
        return np.stack([self.rule.reduce(columns, f, seen.weights) for columns, (seen, _) in zip(columns_of, views)])


def _close(evidence: Evidence) -> bool:
    """Whether some rows are so close that products in float32 cannot tell them apart."""
    norms, apart = np.diag(evidence.gram), evidence.distances
    return bool(((apart > 0) & (apart < CLOSE * (norms[:, None] + norms))).any())


def _products(panel: Panel, exact: bool) -> Stack:
    """The inner products of the rows by part, [parts, n, n]."""
    by_part: NDArray[Any] = panel.transpose(1, 0, 2).astype(np.float64 if exact else np.float32, copy=False)

    def lane(start: int, stop: int) -> Stack:
        values = by_part[start:stop]
        found: Stack = (values @ values.transpose(0, 2, 1)).astype(np.float64)
        return found

    return np.concatenate(halves(lane, len(by_part), 1))


def _off_sums(grams: Stack, coefficients: Stack) -> Stack:
    """|x_i - c @ rows|^2 of each part, [parts, n]."""
    along = (grams @ coefficients[:, :, None])[:, :, 0]
    square = (coefficients * along).sum(axis=1, keepdims=True)
    found: Stack = np.diagonal(grams, axis1=1, axis2=2) - 2.0 * along + square
    return found
