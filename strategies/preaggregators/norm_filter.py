"""Leaving out rows that are far too long: what is scaled up to take over a mean betrays itself by its length.

    drop x_i where |x_i| > factor * median of |x_j|,   the f longest at most

A bound on lengths is old (Sun, Kairouz, Suresh, McMahan, "Can You Really Backdoor Federated Learning?", 2019, shorten
such rows instead). In front of `clip` it matters which: a backdoor that is shortened to the usual length passes, as its
direction is a plausible one.
"""

from dataclasses import dataclass

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights


@dataclass(frozen=True, slots=True)
class NormFilter:
    """Rows of up to `factor` times the median norm stay; honest ones differ, too, by their data and their steps."""

    factor: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.factor < float("inf"):
            raise ExperimentError(
                f"server.aggregator.pre.norm-filter.factor: must be at least 1 and finite, not {self.factor:g}."
            )

    def least(self, needed: int, byzantine: int) -> int:
        """As many as come out, and f more, all of which may be honest; and a majority of honest ones for the median."""
        return max(needed + byzantine, 2 * byzantine + 1)

    def mix(self, evidence: Evidence) -> tuple[Matrix, Weights]:
        """(B [m, n], a row of it for each row that stays; their weights)."""
        norms = evidence.norms
        longest = np.argsort(-norms, kind="stable")[: evidence.byzantine]
        dropped = longest[norms[longest] > self.factor * np.median(norms)]
        kept = np.setdiff1d(np.arange(evidence.rows), dropped)
        weights = evidence.weights[kept]
        total = weights.sum()
        return np.eye(evidence.rows)[kept], weights / total if total > 0 else np.full(len(kept), 1.0 / len(kept))
