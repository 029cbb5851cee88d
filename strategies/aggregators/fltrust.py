"""FLTrust (Cao, Fang, Liu, Gong, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS 2021):
trust in the direction of an update trained on clean data, x_0.

    t_i = max(0, cos(x_i, x_0));  out = sum(t_i |x_0| x_i / |x_i|) / sum(t)     over all others than x_0

x_0 is the update of the client named `root`, which trains like any other, on data the server's owner vouches for. As in
the paper it judges and does not take part; where it trusts nobody, which the paper leaves open, it is the result.

No majority is needed: any number of hostile rows moves the result by no more than |x_0|, and never against x_0.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Weights


@dataclass(frozen=True, slots=True)
class FLTrust:
    """Trusts the client `root`, which must be in every group (or cached); survives any number of hostile others."""

    root: str = ""
    honours_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.root:
            raise ExperimentError(
                "server.aggregator.root: name the client whose updates are trusted; to provide the server's own data, "
                "run a client on the server's machine with them and give its name here."
            )

    def least(self, byzantine: int) -> int:
        """1, the root's."""
        return 1

    def lacks(self, clients: Collection[str]) -> str:
        """The root's update, where it is not among them."""
        return "" if self.root in clients else f"the update of the root client {self.root!r}"

    def coefficients(self, evidence: Evidence) -> Weights:
        """Trust over length, [n]. Raises ExperimentError where a pre-aggregator has merged the root's row away."""
        if self.root not in evidence.clients:
            raise ExperimentError(
                f"server.aggregator.pre: root {self.root!r} is lost behind what merges rows; leave that out."
            )
        at, norms = evidence.clients.index(self.root), evidence.norms
        inverse = np.divide(1.0, norms, out=np.zeros(evidence.rows), where=norms > 0)
        trust = np.maximum(evidence.gram[at] * inverse * inverse[at], 0.0)
        trust[at] = 0.0
        if not trust.any():
            trust[at] = 1.0
        coefficients: Weights = trust / trust.sum() * norms[at] * inverse
        return coefficients
