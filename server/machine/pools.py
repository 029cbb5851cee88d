"""A pool: updates folded as they arrive, one aggregator state per named vector, until a scheduler closes it.

Owns the arithmetic around an aggregator: weights, the mean discount for staleness, the step. Must never decide when.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedge.core.errors import StrategyError
from fedge.core.params import Array, Vector
from fedge.core.task import DELTA, Update
from fedge.strategies.contracts import Aggregator, Arrival


@dataclass(slots=True)
class Pool:
    """Members in order of arrival, their weights, and the folds of their vectors by blob name.

    `share` and `weight` are sums over the members before and after the discount for staleness.
    """

    members: list[Arrival] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    share: float = 0.0
    weight: float = 0.0
    state: str = "empty"
    folds: dict[str, Any] = field(default_factory=dict)


def fold(pool: Pool, aggregator: Aggregator, update: Update, arrival: Arrival, share: float, discount: float) -> None:
    """Add one update with weight share * discount. Raises StrategyError for weights out of range."""
    if not (math.isfinite(share) and share >= 0 and 0 <= discount <= 1):
        raise StrategyError(f"a weigher gave share {share} and discount {discount}; need >= 0 and 0..1")
    weight = share * discount
    for name, row in update.blobs.items():
        flat = np.asarray(row).reshape(-1)
        held = pool.folds.get(name)
        pool.folds[name] = aggregator.fold(aggregator.init(flat.size) if held is None else held, flat, weight)
    pool.members.append(arrival)
    pool.weights.append(weight)
    pool.share += share
    pool.weight += weight


def merged(pools: Iterable[Pool], aggregator: Aggregator) -> Pool:
    """All of them as one; they are used up."""
    pools = iter(pools)
    whole = next(pools)
    for pool in pools:
        whole.members += pool.members
        whole.weights += pool.weights
        whole.share += pool.share
        whole.weight += pool.weight
        for name, part in pool.folds.items():
            whole.folds[name] = aggregator.merge(whole.folds[name], part) if name in whole.folds else part
    return whole


def finish(pool: Pool, aggregator: Aggregator, step: float) -> tuple[dict[str, Vector], float, float]:
    """(aggregates by blob name with the delta scaled, its norm before scaling, the scale).

    The scale is `step` times the weighted mean discount, so that a stale group moves the model less but its rows
    reach the rule unshrunk.
    """
    aggregate: dict[str, Array] = {name: aggregator.finish(held) for name, held in pool.folds.items()}
    scale = step * (pool.weight / pool.share if pool.share else 0.0)
    delta = aggregate[DELTA]
    norm = math.sqrt(max(0.0, float(np.dot(delta, delta))))
    if scale != 1.0:
        aggregate[DELTA] = np.multiply(delta, np.float32(scale), out=delta if delta.flags.writeable else None)
    return aggregate, norm, scale
