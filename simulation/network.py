"""The network between coordinator and clients in virtual time: transfers, outages, clients that join late or leave.

Pure functions of (seed, client); must never look at a clock. A client computes on through an outage and transfers
wait for its end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from fedge.core.random import generator


@dataclass(frozen=True, slots=True)
class Network:
    """Settings for all clients alike; times in seconds, drawn per client from the seed.

    `up_s` and `down_s` are the means of exponential times between and during outages; None: no outages. The fraction
    `drop_out` of the clients leaves for good, each at a time within `drop_out_by_s`.
    """

    bandwidth_bps: float | None = None
    latency_s: float = 0.0
    up_s: float | None = None
    down_s: float | None = None
    drop_out: float = 0.0
    drop_out_by_s: float = 600.0
    join_over_s: float = 0.0

    def joins_at(self, client: int, seed: int) -> float:
        """When the client first appears."""
        return float(generator(seed, "join", client).uniform(0, self.join_over_s)) if self.join_over_s else 0.0

    def drop_outs(self, clients: int, seed: int) -> dict[int, float]:
        """When each client that leaves for good does, by its index; those that stay are not in it."""
        leaving = generator(seed, "drop-out").permutation(clients)[: round(self.drop_out * clients)]
        span_s = self.drop_out_by_s
        return {client: float(generator(seed, "drop-out", client).uniform(0, span_s)) for client in leaving.tolist()}

    def outages(self, client: int, seed: int) -> Iterator[tuple[float, float]]:
        """(begin, end) of each outage, without end; nothing where there are none."""
        if not self.up_s or not self.down_s:
            return
        random, now = generator(seed, "outage", client), 0.0
        while True:
            begin = now + float(random.exponential(self.up_s))
            now = begin + float(random.exponential(self.down_s))
            yield begin, now

    def transfer_s(self, nbytes: int) -> float:
        """How long a message of `nbytes` takes on a line that is up."""
        return self.latency_s + (8 * nbytes / self.bandwidth_bps if self.bandwidth_bps else 0.0)


class Line:
    """One client's connection over time; asked about times that never go back."""

    def __init__(self, network: Network, client: int, seed: int) -> None:
        self._network = network
        self._outages = network.outages(client, seed)
        self._next = next(self._outages, (inf, inf))

    def transfer(self, start: float, nbytes: int) -> float:
        """When a message begun at `start` is through: transfers stand still during an outage and go on after it."""
        at, left = start, self._network.transfer_s(nbytes)
        while True:
            begin, end = self._next
            if at + left <= begin:
                return at + left
            left -= max(0.0, begin - at)
            at = max(at, end)
            self._next = next(self._outages, (inf, inf))
