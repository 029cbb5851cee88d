"""Adaptive robust clipping (Allouah, Guerraoui, Gupta, Jellouli, Rizk, Stephan, "Boosting Robustness by Clipping
Gradients in Distributed Learning", 2024, arXiv 2405.14432).

    k = floor(2 (f / n) (n - f)); the k longest rows are scaled down to the norm of the next

With n > 2 f, k is at least f, so that norm is at most the longest honest row's; and at f = 0 nothing is clipped.
"""

from dataclasses import dataclass

import numpy as np

from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights
from fedge.strategies.preaggregators.clip import shortened


@dataclass(frozen=True, slots=True)
class AdaptiveRobustClipping:
    """How many rows are clipped follows from n and f; there is nothing to set."""

    def least(self, needed: int, byzantine: int) -> int:
        """As many rows as come out, and a majority of honest ones."""
        return max(needed, 2 * byzantine + 1)

    def mix(self, evidence: Evidence) -> tuple[Matrix, Weights]:
        """(B [n, n], the weights as they were)."""
        count, f = evidence.rows, evidence.byzantine
        clipped = 2 * f * (count - f) // count
        norms = evidence.norms
        return shortened(norms, float(np.sort(norms)[count - clipped - 1])), evidence.weights
