"""The cross-tier average of FedAT (Chai et al. 2021, arXiv 2010.05958, section 4.2).

Tier m, from 0 (the fastest) to M - 1, closes groups of its own. Its model is the global model it last started from
minus its delta, and the global model is the average of the tiers' models, each weighted by how often the tier at the
other end, M - 1 - m, has reported: the slow tiers, which report seldom, weigh the most.

Where the paper lets tiers that have not reported yet stand in with the initial model, they are left out here, and the
others mirror each other; nothing would move before the slowest tier's first report otherwise. Goes with a scheduler
whose pools are "tier-0", "tier-1", ..., and "profile" for a round of all clients before there are tiers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedge.core.errors import ExperimentError, StrategyError
from fedge.core.params import Array, Vector
from fedge.core.task import DELTA
from fedge.strategies.blocks import accumulate
from fedge.strategies.contracts import Group

PROFILE = "profile"  # the pool of that round


@dataclass(slots=True)
class Tiers:
    """`start`, the model every tier first trains from; by tier, the model it trains from now, the one it last came to
    (float32 [d] each), and how often it has reported.
    """

    start: Vector
    bases: dict[int, Vector] = field(default_factory=dict)
    models: dict[int, Vector] = field(default_factory=dict)
    reports: dict[int, int] = field(default_factory=dict)


def _shares(reports: Mapping[int, int]) -> dict[int, float]:
    """The weight of each tier that has reported; they sum to 1."""
    tiers, total = sorted(reports), sum(reports.values())
    return {tier: reports[mirror] / total for tier, mirror in zip(tiers, reversed(tiers))}


@dataclass(frozen=True, slots=True)
class FedAt:
    """`tiers` is M and the same as the scheduler's, which may form fewer."""

    tiers: int = 3

    def __post_init__(self) -> None:
        if self.tiers < 1:
            raise ExperimentError(f"server.optimizer.tiers: must be at least 1, not {self.tiers}.")

    def init(self, vector: Vector) -> Tiers:
        """No tier has reported."""
        return Tiers(vector.copy())

    def step(
        self,
        state: Tiers,
        vector: Vector,
        aggregate: Mapping[str, Vector],
        group: Group,
    ) -> tuple[Tiers, Vector, Mapping[str, Array]]:
        """The average after one tier's report. Raises StrategyError where the group is not that of one tier."""
        delta = aggregate[DELTA]
        if group.pools == (PROFILE,):
            out = np.subtract(vector, delta)
            return Tiers(out), out, {}
        tier = self._tier(group.pools)
        state.models[tier] = np.subtract(state.bases.get(tier, state.start), delta)
        state.reports[tier] = state.reports.get(tier, 0) + 1
        out = np.zeros_like(vector)
        for each, share in _shares(state.reports).items():
            accumulate(out, state.models[each], share)
        state.bases[tier] = out
        return state, out, {}

    def _tier(self, pools: tuple[str, ...]) -> int:
        known = {(f"tier-{tier}",): tier for tier in range(self.tiers)}
        if pools not in known:
            raise StrategyError(
                f"The optimizer 'fedat' got the pools {', '.join(pools)}; it needs the scheduler 'fedat' with as many "
                f"tiers as its own {self.tiers}."
            )
        return known[pools]
