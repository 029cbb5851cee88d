"""The aggregator around every robust rule: it holds a group's rows, and what each rule asks of them.

    fold      keep the row, and add its inner products with those held: the time is spent while others still send
    finish    pre-aggregators and rule look at the n x n products; then one weighted sum over the rows

`cache` lets the last row of every absent client stand for it, so that f hostile clients are f of N in every group,
however few have come (delayed momentum aggregation), until it has been away for very long. `momentum` replaces a
client's row by the running average m <- momentum m + (1 - momentum) x of its updates, kept here, which shrinks the
honest rows' variance (Karimireddy, He, Jaggi 2021, arXiv 2012.10333). Either costs O(N d) memory, and the products are
then formed when the group closes.

Owns the order of rows (by client, so that the order of arrival changes no bit), the cap on weights, and the verdict on
each row. Must never hold a rule.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import ExperimentError
from fedge.core.lanes import plain_products
from fedge.core.params import Vector
from fedge.strategies import gram
from fedge.strategies.aggregators.evidence import Demanding, Evidence, Mixing, PreAggregator, behind
from fedge.strategies.boundary import asked, numbers, rows_asked
from fedge.strategies.columns import Columns, columnwise
from fedge.strategies.contracts import Outcome, Verdict
from fedge.strategies.gram import Matrix, Weights

TRACE = 0.1  # of an equal share: with a smaller coefficient a row counts as rejected
FORGOTTEN = 5  # times as many groups as there are clients, all missed: a row that old is no client's last word
FAR = 2.0  # times the median distance to the aggregate: what is further off does, where there are no coefficients


@dataclass(slots=True)
class Rows:
    """The rows of a group in the order they came, their weights, and their inner products [n, n]."""

    rows: list[Vector] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    gram: Matrix = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(slots=True)
class Memory:
    """The last row of each client, or the running average of its rows, the weight it had, and how many groups ago."""

    rows: dict[str, Vector] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    ages: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Robust:
    """`rule` behind the pre-aggregators `pre`; at most `byzantine` (f) of the rows of a group are hostile."""

    rule: Any
    byzantine: int = 0
    pre: tuple[PreAggregator, ...] = ()
    momentum: float = 0.0
    cache: bool = False

    associative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.byzantine < 0:
            raise ExperimentError(f"server.aggregator.byzantine: must be at least 0, not {self.byzantine}.")
        if not 0 <= self.momentum < 1:
            raise ExperimentError(f"server.aggregator.momentum: must be at least 0 and below 1, not {self.momentum}.")

    @property
    def honours_weights(self) -> bool:
        """As the rule does."""
        return bool(self.rule.honours_weights)

    def min_rows(self) -> int:
        """What the rule needs for f, in front of its pre-aggregators. Raises StrategyError where one breaks."""
        needed = max(1, rows_asked(self.rule, self.byzantine))
        for step in reversed(self.pre):
            needed = rows_asked(step, needed, self.byzantine)
        return needed

    def lacks(self, clients: Collection[str], memory: Any) -> str:
        """What a group of these clients misses; those remembered count where they are cached."""
        known = {*clients, *(memory.rows if self.cache else ())}
        if len(known) < self.min_rows():
            return f"{self.min_rows() - len(known)} more clients"
        demands = (asked(step, "lacks", known) for step in (*self.pre, self.rule) if isinstance(step, Demanding))
        return next((what for what in demands if what), "")

    def memory(self) -> Memory:
        """Nobody known."""
        return Memory()

    # ---- a group -------------------------------------------------------------------------------

    def init(self, size: int) -> Rows:
        """No rows."""
        return Rows()

    def of(self, table: NDArray[np.float32], weights: Weights) -> Rows:
        """All rows [n, d] at once."""
        products = gram.gram(table) if self._folds else np.zeros((0, 0))
        return Rows(list(table), weights.tolist(), products)

    def fold(self, state: Rows, row: Vector, weight: float) -> Rows:
        """Keep the row [size], where it is."""
        state.rows.append(row)
        state.weights.append(weight)
        if self._folds:
            state.gram = _grown(state.gram, gram.products(state.rows, row))
        return state

    def merge(self, state: Rows, other: Rows) -> Rows:
        """`state` with the rows of `other` after its own."""
        if self._folds:
            state.gram = _joined(state, other)
        state.rows += other.rows
        state.weights += other.weights
        return state

    def drop(self, state: Rows, index: int) -> Rows:
        """Without the row at `index`."""
        del state.rows[index], state.weights[index]
        if self._folds:
            state.gram = np.delete(np.delete(state.gram, index, 0), index, 1)
        return state

    @plain_products
    def finish(self, state: Rows, clients: Sequence[str], memory: Memory, seed: int) -> Outcome:
        """The aggregate over the rows of these (distinct) clients, and what became of each. Raises StrategyError where
        the rule or a pre-aggregator breaks.
        """
        if self._remembers:
            memory, state, clients = self._recalled(state, clients, memory)
        order = sorted(range(len(clients)), key=clients.__getitem__)
        rows = [state.rows[index] for index in order]
        names = tuple(clients[index] for index in order)
        products = np.zeros((len(rows), len(rows)))
        if self._compares:
            products = gram.precise(rows, state.gram[np.ix_(order, order)])
        weights = _capped(np.array([state.weights[index] for index in order]), self.byzantine)
        if not weights.any():
            return Outcome(np.zeros(rows[0].size, np.float32), {}, memory)
        vector, verdicts = self._decide(rows, Evidence(products, weights, self.byzantine, names, seed))
        judge = getattr(self.rule, "root", "")  # whom others are compared with is not judged itself
        return Outcome(vector, {name: verdict for name, verdict in verdicts.items() if name != judge}, memory)

    @property
    def _remembers(self) -> bool:
        return self.cache or self.momentum > 0

    @property
    def _compares(self) -> bool:
        """Whether inner products of rows are asked for; a coordinate rule by itself does without."""
        return bool(self.pre) or not hasattr(self.rule, "reduce") or isinstance(self.rule, Mixing)

    @property
    def _folds(self) -> bool:
        return self._compares and not self._remembers

    def _recalled(self, state: Rows, clients: Sequence[str], memory: Memory) -> tuple[Memory, Rows, Sequence[str]]:
        """The new memory, and the rows that take part."""
        for client, row, weight in zip(clients, state.rows, state.weights):
            before = memory.rows.get(client, row) if self.momentum else row
            memory.rows[client] = row if before is row else self._averaged(before, row)
            memory.weights[client], memory.ages[client] = weight, -1
        _age(memory)
        present = sorted(memory.rows) if self.cache else clients
        rows = [memory.rows[client] for client in present]
        products = gram.gram(rows) if self._compares else np.zeros((0, 0))
        return memory, Rows(rows, [memory.weights[client] for client in present], products), present

    def _averaged(self, before: Vector, row: Vector) -> Vector:
        average: Vector = np.float32(self.momentum) * before + np.float32(1 - self.momentum) * row
        return average

    def _decide(self, rows: Sequence[Vector], evidence: Evidence) -> tuple[Vector, Mapping[str, Verdict]]:
        rule = self.rule
        if hasattr(rule, "choose"):
            found = asked(rule, "choose", rows, evidence, self.pre)
            return _chosen(rows, evidence, numbers(rule, "choose", found, (len(rows),)))
        seen, mixing = behind((*self.pre, *([rule] if isinstance(rule, Mixing) else [])), evidence)
        if hasattr(rule, "coefficients"):
            found = numbers(rule, "coefficients", asked(rule, "coefficients", seen), (seen.rows,))
            return _chosen(rows, evidence, found @ mixing)
        plain = len(mixing) == evidence.rows and np.array_equal(mixing, np.eye(evidence.rows))

        def reduce(columns: Columns) -> Vector:
            found = asked(rule, "reduce", columns, self.byzantine, seen.weights)
            return numbers(rule, "reduce", found, columns.shape[:1])  # type: ignore[no-any-return]

        vector = columnwise(rows, reduce, None if plain else mixing)
        return vector, _verdicts(evidence, gram.away(rows, vector))


def _age(memory: Memory) -> None:
    """One group later; whoever has missed too many is forgotten, or it would push the model for ever."""
    memory.ages = {client: age + 1 for client, age in memory.ages.items()}
    for client in [one for one, age in memory.ages.items() if age > FORGOTTEN * len(memory.ages)]:
        del memory.rows[client], memory.weights[client], memory.ages[client]


# ---- small sums --------------------------------------------------------------------------------


def _grown(held: Matrix, products: Weights) -> Matrix:
    """The Gram matrix with one more row; `products` are those with all rows, the new one last."""
    count = len(products)
    grown = np.empty((count, count))
    grown[:-1, :-1] = held
    grown[-1], grown[:, -1] = products, products
    return grown


def _joined(state: Rows, other: Rows) -> Matrix:
    """The Gram matrix of both states' rows."""
    across = [gram.products(state.rows, row) for row in other.rows]
    corner = np.array(across).reshape(len(other.rows), len(state.rows))
    return np.block([[state.gram, corner.T], [corner, other.gram]])


def _capped(weights: Weights, byzantine: int) -> Weights:
    """The weights, adding up to 1, with the largest lowered until f of them stay clearly below one half.

    A weight may rest on what a client says of itself: f liars must not become a majority by it. The bound on the sum
    of the f largest lies midway between f / n, their share among equals, and 1/2.
    """
    total, count = weights.sum(), len(weights)
    if total <= 0:
        return np.zeros(count)
    shares: Weights = weights / total
    if not 0 < byzantine < count / 2:
        return shares
    allowed = (byzantine / count + 0.5) / 2
    ranked = np.sort(shares)[::-1]
    if ranked[:byzantine].sum() <= allowed:
        return shares
    # The k largest lowered to one cap c: f c = allowed (k c + the rest). The first k whose c is not below the next.
    for k in range(byzantine, count):
        cap = allowed * ranked[k:].sum() / (byzantine - allowed * k)
        if cap >= ranked[k]:
            break
    lowered = np.minimum(shares, cap)
    result: Weights = lowered / lowered.sum() if lowered.any() else np.full(count, 1.0 / count)
    return result


def _chosen(rows: Sequence[Vector], evidence: Evidence, coefficients: Weights) -> tuple[Vector, Mapping[str, Verdict]]:
    """The weighted sum, and verdicts by coefficient."""
    vector = gram.weighted_sum(rows, coefficients)
    along = evidence.gram @ coefficients
    squares = np.diag(evidence.gram) - 2 * along + float(coefficients @ along)
    return vector, _verdicts(evidence, np.sqrt(np.maximum(squares, 0.0)), coefficients)


def _verdicts(evidence: Evidence, away: Weights, coefficients: Weights | None = None) -> Mapping[str, Verdict]:
    """From |x_i - aggregate|, [n], over their median."""
    middle = float(np.median(away))
    scores = away / middle if middle > 0 else np.ones(evidence.rows)
    if coefficients is None:
        return {name: Verdict(score, score > FAR) for name, score in zip(evidence.clients, scores.tolist())}
    least = TRACE * np.abs(coefficients).sum() / evidence.rows
    pairs = zip(evidence.clients, scores.tolist(), coefficients.tolist())
    return {name: Verdict(score, abs(share) < least, share) for name, score, share in pairs}
