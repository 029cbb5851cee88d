"""The weighted mean of rows that are kept: what robust rules are compared with, and what a pre-aggregator or a cache
can stand in front of. Where neither does, `mean` needs no rows.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Weights


@dataclass(frozen=True, slots=True)
class Average:
    """c = weights. One hostile row moves it at will."""

    honours_weights: ClassVar[bool] = True

    def least(self, byzantine: int) -> int:
        """More rows than hostile ones; it withstands none by itself."""
        return byzantine + 1

    def coefficients(self, evidence: Evidence) -> Weights:
        """The weights, [n]."""
        return evidence.weights
