"""A pool: updates folded as they arrive, one aggregator state per named vector, until a scheduler closes it.

Owns the arithmetic around an aggregator: weights, the mean discount for staleness, the step; and that a client has one
row in a group wherever rows are kept, so that sending more often gains nothing. Must never decide when.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedge.core.errors import StrategyError
from fedge.core.params import Vector
from fedge.core.task import DELTA, Update
from fedge.strategies.boundary import asked, plugged
from fedge.strategies.contracts import Aggregator, Arrival, KeepsRows, Outcome, Verdict


@dataclass(slots=True)
class Pool:
    """Members in order of arrival, their shares before and weights after the discount for staleness, and the folds of
    their vectors by blob name. `step` adds up what was asked of groups that were too small.
    """

    members: list[Arrival] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    step: float = 0.0
    state: str = "empty"
    folds: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Closing:
    """What a pool came to: aggregates by blob name with the delta scaled, the delta's norm before that, the scale, the
    verdicts on the deltas, and what the aggregator remembers, by blob name.
    """

    aggregate: dict[str, Vector]
    norm: float
    scale: float
    verdicts: dict[str, Verdict]
    memory: dict[str, Any]


def fold(
    pool: Pool, aggregator: Aggregator, update: Update, arrival: Arrival, weights: tuple[float, float, float]
) -> list[Arrival]:
    """Add one update; the members it supersedes. `weights` are the weigher's share, the discount for staleness, and the
    scheduler's share, by which it balances who comes often: it is no weight for a rule that keeps rows, where everybody
    has one row anyway and nobody may gain by its pace. Raises StrategyError for weights out of range, and where the
    aggregator raises, here as below.
    """
    share, discount, pace = weights
    share *= 1.0 if isinstance(aggregator, KeepsRows) else pace
    if not (math.isfinite(share) and share >= 0 and 0 <= discount <= 1):
        raise StrategyError(f"a weigher gave share {share} and discount {discount}; need >= 0 and 0..1")
    for name, row in update.blobs.items():
        flat = np.asarray(row).reshape(-1)
        held = pool.folds.get(name)
        held = asked(aggregator, "init", flat.size) if held is None else held
        pool.folds[name] = asked(aggregator, "fold", held, flat, share * discount)
    pool.members.append(arrival)
    pool.shares.append(share)
    pool.weights.append(share * discount)
    return _one_each(pool, aggregator)


def merged(pools: Sequence[Pool], aggregator: Aggregator) -> tuple[Pool, list[Arrival]]:
    """All of them as one, and the members that were superseded; they are used up."""
    whole, *others = pools
    for pool in others:
        whole.members += pool.members
        whole.shares += pool.shares
        whole.weights += pool.weights
        whole.step += pool.step
        for name, part in pool.folds.items():
            held = whole.folds.get(name)
            whole.folds[name] = part if held is None else asked(aggregator, "merge", held, part)
    return whole, _one_each(whole, aggregator)


def _one_each(pool: Pool, aggregator: Aggregator) -> list[Arrival]:
    """Drop all but each client's newest row: that of the latest version, and among those the last to arrive."""
    if not isinstance(aggregator, KeepsRows):
        return []
    newest: dict[str, int] = {}
    for index, member in enumerate(pool.members):
        before = newest.get(member.client)
        if before is None or member.version >= pool.members[before].version:
            newest[member.client] = index
    old = sorted(set(range(len(pool.members))) - set(newest.values()), reverse=True)
    for index in old:
        pool.folds = {name: asked(aggregator, "drop", held, index) for name, held in pool.folds.items()}
        del pool.shares[index], pool.weights[index]
    return [pool.members.pop(index) for index in old]


def finish(pool: Pool, aggregator: Aggregator, memory: dict[str, Any], seed: int, size: int, longest: float) -> Closing:
    """The aggregate of a pool, which is used up. Raises StrategyError unless it has `size` finite elements and is no
    longer than `longest`, which is as long as all rows together may be.

    The scale is the pool's step times the weighted mean discount, so that a stale group moves the model less but its
    rows reach the rule unshrunk.
    """
    clients = [member.client for member in pool.members]
    outcomes = {
        name: asked(aggregator, "finish", held, clients, memory.get(name) or aggregator.memory(), seed)
        for name, held in pool.folds.items()
    }
    for outcome in outcomes.values():
        _check(outcome, aggregator, size, longest)
    share = math.fsum(pool.shares)
    scale = pool.step * (math.fsum(pool.weights) / share if share else 0.0)
    aggregate = {name: outcome.vector for name, outcome in outcomes.items()}
    delta = aggregate[DELTA]
    norm = math.sqrt(max(0.0, float(np.dot(delta, delta))))
    if scale != 1.0:
        aggregate[DELTA] = np.multiply(delta, np.float32(scale), out=delta if delta.flags.writeable else None)
    remembered = {name: outcome.memory for name, outcome in outcomes.items()}
    return Closing(aggregate, norm, scale, dict(outcomes[DELTA].verdicts), remembered)


def _check(outcome: Outcome, aggregator: Aggregator, size: int, longest: float) -> None:
    who = type(getattr(aggregator, "rule", aggregator)).__name__
    with plugged(who), np.errstate(all="ignore"):
        shape, square = outcome.vector.shape, float(np.dot(outcome.vector, outcome.vector))
    if shape != (size,):
        raise StrategyError(f"{who} made an aggregate of shape {shape} of updates of shape {(size,)}; mend it.")
    if not square <= longest**2:  # NaN is not, either
        raise StrategyError(
            f"{who} made an aggregate of norm {math.sqrt(square):.3g} where all updates together may have "
            f"{longest:.3g}; mend its coefficients."
        )
