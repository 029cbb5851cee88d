"""DnC, divide and conquer (Shejwalkar, Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and
Defenses for Federated Learning", NDSS 2021).

    v = the direction of the largest variance of the rows;  s_i = <x_i - mean, v>^2
    out = the mean without the c f rows of the largest s

The paper does so on several random samples of the coordinates, as a decomposition of whole rows costs too much, and
keeps the rows that pass each time. In terms of inner products whole rows cost no more, and every pass is the same one.

The paper drops all c f rows at once (`at_once`). Two hostile rows evade that, however far off: one sets the direction,
the other stays in the middle of it. Here they go one by one, with mean and direction formed anew after each.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.caf import widest
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Weights


@dataclass(frozen=True, slots=True)
class DivideAndConquer:
    """Drops `fraction` (c) times f rows, rounded up."""

    fraction: float = 1.0
    at_once: bool = False
    honours_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction < math.inf:
            raise ExperimentError(f"server.aggregator.fraction: must be above 0, not {self.fraction}.")

    def least(self, byzantine: int) -> int:
        """2 f + 1, and one row that stays."""
        return max(2 * byzantine, self._dropped(byzantine)) + 1

    def coefficients(self, evidence: Evidence) -> Weights:
        """1 / (n - c f) for the rows that stay, [n]."""
        kept, dropped = np.ones(evidence.rows), self._dropped(evidence.byzantine)
        for _ in range(1 if self.at_once else dropped):
            _, scores = widest(evidence.gram, kept)
            worst = np.argsort(np.where(kept > 0, -scores, np.inf), kind="stable")
            kept[worst[: dropped if self.at_once else 1]] = 0.0
        shares: Weights = kept / kept.sum()
        return shares

    def _dropped(self, byzantine: int) -> int:
        return math.ceil(self.fraction * byzantine)
