"""FoolsGold (Fung, Yoon, Beschastnikh, "The Limitations of Federated Learning in Sybil Settings", RAID 2020): clients
that always send the same are one attacker under many names.

    s_ij = max(0, cos(x_i, x_j));  v_i = max_j s_ij;  s_ij <- s_ij v_i / v_j where v_j > v_i     (pardoning)
    a_i  = 1 - max_j s_ij, over the largest of them;  a_i <- ln(a_i / (1 - a_i)) + 1/2, within [0, 1]
    out  = sum(a_i x_i) / sum(a)

The paper compares the sums of all that clients ever sent, and leaves out the division by sum(a), so that its step grows
with the number of clients. Here the rows are what is compared: with `momentum` they are a history that fades. Where all
rows have a twin nobody can be told from anybody, and all count alike; the paper's formula is 0 / 0 there.

It is for attackers in numbers. It knows no f and does not look at lengths: one hostile row unlike all others passes in
full, and the more alike the honest rows are, the more it counts against them; put `clip` in front. A row of zeros has
no direction and counts 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Weights

TWIN = 1e-6  # below the cosine of 1: as good as equal


@dataclass(frozen=True, slots=True)
class FoolsGold:
    """Needs an honest row."""

    honours_weights: ClassVar[bool] = False

    def least(self, byzantine: int) -> int:
        """More than f."""
        return byzantine + 1

    def coefficients(self, evidence: Evidence) -> Weights:
        """Each row's share a / sum(a), [n]."""
        norms = evidence.norms
        inverse = np.divide(1.0, norms, out=np.zeros(evidence.rows), where=norms > 0)
        alike = np.clip(evidence.gram * inverse[:, None] * inverse, 0.0, 1.0)
        np.fill_diagonal(alike, 0.0)
        nearest = alike.max(axis=1)
        others = np.maximum(nearest, np.finfo(float).tiny)
        alike *= np.minimum(1.0, nearest[:, None] / others)
        apart = 1.0 - alike.max(axis=1)
        apart[(apart < TWIN) | (norms == 0)] = 0.0  # a row of zeros is like no other, and says nothing
        if not apart.any():
            return np.full(evidence.rows, 1.0 / evidence.rows)
        apart /= apart.max()
        with np.errstate(divide="ignore"):  # the largest is 1 and its logarithm infinite, which is cut to 1
            counts = np.clip(np.log(apart / (1.0 - apart)) + 0.5, 0.0, 1.0)
        shares: Weights = counts / counts.sum()
        return shares
