"""Buckets by client (Yang, Li, "BASGD: Buffered Asynchronous SGD for Byzantine Learning", ICML 2021).

    client s belongs to bucket s mod B; every bucket becomes the mean of its updates, and no bucket may be empty

A client's bucket depends on its name alone, so f hostile clients reach at most f of the B buckets, however often they
send and however few others have come: behind it stand B rows of which at most f are spoilt, in every group. Clients
must not be able to choose or change their names.

s is the number that a name ends in. A name without one goes where its hash says, which fills B buckets for certain only
with many times B clients: number the clients, or take fewer buckets. The paper clears a bucket when the model moves, as
happens here when the group closes.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from fedge.core.errors import ExperimentError
from fedge.core.random import derive
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.gram import Matrix, Weights
from fedge.strategies.preaggregators.bucketing import means

_NUMBER = re.compile("[0-9]{1,9}$")


@dataclass(frozen=True, slots=True)
class Buckets:
    """`buckets` (B) of them, at least as many as rows are needed behind it; 10 for 3 hostile clients in the paper."""

    buckets: int = 10

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise ExperimentError(f"server.aggregator.pre.basgd.buckets: must be at least 1, not {self.buckets}.")

    def least(self, needed: int, byzantine: int) -> int:
        """One client per bucket. Raises ExperimentError where there are fewer buckets than rows needed behind them."""
        if self.buckets < needed:
            raise ExperimentError(
                f"server.aggregator.pre.basgd.buckets: with byzantine = {byzantine} the rule behind it needs {needed} "
                f"rows, and {self.buckets} buckets give no more than {self.buckets}; set buckets to at least {needed}."
            )
        return self.buckets

    def lacks(self, clients: Collection[str]) -> str:
        """How many buckets are empty with these clients."""
        empty = self.buckets - len({self.bucket(client) for client in clients})
        return f"updates for {empty} of {self.buckets} buckets" if empty else ""

    def mix(self, evidence: Evidence) -> tuple[Matrix, Weights]:
        """(B [at most `buckets`, n], the weight in each bucket); a bucket without rows has none here either."""
        return means([self.bucket(client) for client in evidence.clients], evidence.weights)

    def bucket(self, client: str) -> int:
        """Which bucket a client of this name belongs to, from 0."""
        number = _NUMBER.search(client)
        return (int(number[0]) if number else derive(0, "bucket", client)) % self.buckets
