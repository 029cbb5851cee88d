"""The server's half of FedDyn (Acar et al. 2021, arXiv 2111.04263, algorithm 1), with H = h / alpha.

    H <- H + |P| / N mean(delta),    w <- w - mean(delta) - H

Dividing h by alpha takes alpha out of the server's half: only the client hook `feddyn` has it. The paper's means are
plain: use the weigher `equal`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedge.core.params import Array, Vector
from fedge.core.task import DELTA
from fedge.strategies.blocks import accumulate
from fedge.strategies.contracts import Group


@dataclass(slots=True)
class Drift:
    """H, how far the clients have pulled so far, summed over steps; float32 [d]."""

    drift: Vector


@dataclass(frozen=True, slots=True)
class FedDyn:
    """Needs the client hook `feddyn`."""

    def init(self, vector: Vector) -> Drift:
        """Begin with H = 0."""
        return Drift(np.zeros_like(vector))

    def step(
        self, state: Drift, vector: Vector, aggregate: Mapping[str, Vector], group: Group
    ) -> tuple[Drift, Vector, Mapping[str, Array]]:
        """One step by the mean and by H."""
        delta = aggregate[DELTA]
        accumulate(state.drift, delta, min(1.0, len(group.members) / group.expected))
        out = np.subtract(vector, delta)
        return state, np.subtract(out, state.drift, out=out), {}
