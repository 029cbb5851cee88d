"""Which rank holds what of every layer: a range of key/value heads (with their query heads) and one of FFN columns.

Owns the division of whole granules in proportion to speeds. Must never measure, nor look at weights.
"""

import heapq
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from fedge.core.errors import ExperimentError
from fedge.edge.llm.models.config import Config
from fedge.edge.llm.shards.about import FFN_GRANULE, Share
from fedge.edge.llm.shards.layout import bytes_of
from fedge.edge.llm.shards.quant import HEADS, PER_WEIGHT, Kind

__all__ = ["FFN_GRANULE", "Share", "balanced", "bytes_of", "cost_of_head", "even", "proportional"]


def even(config: Config, ranks: int) -> tuple[Share, ...]:
    """`balanced` for ranks of one speed."""
    return balanced(config, [1.0] * ranks)


def balanced(config: Config, speeds: Sequence[float]) -> tuple[Share, ...]:
    """Shares with the least time per token for ranks that multiply at these speeds, in any unit.

    Ranks wait for each other after attention and again after the FFN, and all of them for the head: so each part is
    divided by itself, and no other division ends earlier. Raises ExperimentError.
    """
    _check(speeds)
    none = [0.0] * len(speeds)
    return _shares(config, _fill(none, speeds, 1.0, config.kv_heads), _fill(none, speeds, 1.0, _granules(config)))


def proportional(config: Config, speeds: Sequence[float], head_cost: float = 1.0) -> tuple[Share, ...]:
    """Shares whose bytes are in proportion to these speeds: for ranks that wait for their disks, or lack memory.

    A disk reads on while its rank waits for others, so only all bytes of a token together count. Rank 0 also reads the
    head, whose weights cost `head_cost` times what a layer's do. Key/value heads follow the speeds alone where the FFN
    can still even out the rest: their number decides who holds the cache. The slowest rank takes at most one granule
    of the FFN longer than in the best division. Raises ExperimentError.
    """
    _check(speeds)
    head, kv_head, granule = costs(config, head_cost)
    count = _granules(config)
    loads = [head] + [0.0] * (len(speeds) - 1)
    together = (head + kv_head * config.kv_heads + granule * count) / sum(speeds)
    heads = _fill([0.0] * len(speeds), speeds, kv_head, config.kv_heads)
    times = [(load + kv_head * n) / speed for load, n, speed in zip(loads, heads, speeds)]
    if max(times) > together:
        heads = _fill(loads, speeds, kv_head, config.kv_heads)
    loads = [load + kv_head * n for load, n in zip(loads, heads)]
    return _shares(config, heads, _fill(loads, speeds, granule, count))


def cost_of_head(kind: Kind) -> float:
    """Bytes of a weight of the head over those of one of the layers."""
    return PER_WEIGHT[HEADS[kind]] / PER_WEIGHT[kind]


def costs(config: Config, head_cost: float = 1.0) -> tuple[float, float, float]:
    """Weights multiplied per token by the head, by one key/value head and by one granule of the FFN, in all layers."""
    head = head_cost * config.vocab * config.hidden
    kv_head = 2.0 * config.layers * (config.group + 1) * config.head_dim * config.hidden
    return head, kv_head, 3.0 * config.layers * FFN_GRANULE * config.hidden


def _shares(config: Config, heads: list[int], granules: list[int]) -> tuple[Share, ...]:
    cuts = [min(cut * FFN_GRANULE, config.ffn) for cut in accumulate(granules, initial=0)]
    return tuple(Share(kv, ffn) for kv, ffn in zip(pairwise(accumulate(heads, initial=0)), pairwise(cuts)))


def _check(speeds: Sequence[float]) -> None:
    if not speeds or not all(math.isfinite(speed) and speed > 0 for speed in speeds):
        raise ExperimentError(f"Speeds are {list(speeds)}; give at least one, each a positive number.")


def _granules(config: Config) -> int:
    return -(-config.ffn // FFN_GRANULE)


def _fill(loads: Sequence[float], speeds: Sequence[float], cost: float, count: int) -> list[int]:
    """How many of `count` equal items each rank gets: one after another goes to who would be done with it first.

    With equal items no other division ends earlier.
    """
    queue = [((load + cost) / speed, rank) for rank, (load, speed) in enumerate(zip(loads, speeds))]
    heapq.heapify(queue)
    given = [0] * len(speeds)
    for _ in range(count):
        _, rank = queue[0]
        given[rank] += 1
        heapq.heapreplace(queue, ((loads[rank] + cost * (given[rank] + 1)) / speeds[rank], rank))
    return given
