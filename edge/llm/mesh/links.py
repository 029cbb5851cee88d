"""How fast the links between ranks are: the slowest pair's round trip and bandwidth, known alike to all ranks.

Owns the probes. All ranks get the same figures to the bit, since they choose the collective by them, each for itself.
Must never choose.
"""

import struct
import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from fedge.edge.llm.mesh.collectives import Group
from fedge.edge.llm.mesh.frames import END, FLOAT32, PROBE, Link, take_turns

ROUNDS = 9  # small round trips per pair
SMALL_BYTES = 64
FIRST_BYTES = 1 << 16
LARGE_BYTES = 1 << 20
FAST_S = 0.02  # a link that needs longer for FIRST_BYTES there and back is not asked for LARGE_BYTES
_FIGURES = struct.Struct("<dd")


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """The worst of all pairs: a small message there and back, and bits per second one way."""

    round_trip_s: float
    bandwidth_bps: float


def measure(group: Group) -> LinkSpeed:
    """Probe all pairs, one after the other where they share a rank. All ranks call it at once. Raises RankLost."""
    round_trip_s, bandwidth_bps = 0.0, float("inf")
    for low in range(group.size):
        for high in range(low + 1, group.size):
            if group.rank == low:
                speed = _ping(group.links[high])
                round_trip_s = max(round_trip_s, speed.round_trip_s)
                bandwidth_bps = min(bandwidth_bps, speed.bandwidth_bps)
            elif group.rank == high:
                _echo(group.links[low])
    return _agree(group, LinkSpeed(round_trip_s, bandwidth_bps))


def _ping(link: Link) -> LinkSpeed:
    times = [_there_and_back(link, SMALL_BYTES) for _ in range(ROUNDS)]
    round_trip_s, size = median(times), FIRST_BYTES
    _there_and_back(link, size)  # the first one also finds out how much may be under way
    spent_s = _there_and_back(link, size)
    if spent_s < FAST_S:
        size = LARGE_BYTES
        spent_s = _there_and_back(link, size)
    link.post(END, FLOAT32)
    return LinkSpeed(round_trip_s, 2 * 8 * size / max(spent_s - round_trip_s, 1e-9))


def _there_and_back(link: Link, size: int) -> float:
    begun = time.perf_counter()
    _send(link, np.zeros(size, np.uint8).data)
    link.receive((PROBE, FLOAT32, size))
    return time.perf_counter() - begun


def _echo(link: Link) -> None:
    """Send back what comes, until the end."""
    while True:
        data = link.receive()
        if link.kind == END:
            return
        if link.kind != PROBE or data.nbytes > LARGE_BYTES:
            raise link.broken(f"kind {link.kind} of {data.nbytes} bytes instead of a probe")
        _send(link, data.data)


def _agree(group: Group, own: LinkSpeed) -> LinkSpeed:
    """The worst of all ranks' figures, by way of rank 0."""
    if group.rank:
        head = group.links[0]
        _send(head, memoryview(_FIGURES.pack(own.round_trip_s, own.bandwidth_bps)))
        return LinkSpeed(*_FIGURES.unpack(head.receive((PROBE, FLOAT32, _FIGURES.size)).data))
    figures = [(own.round_trip_s, own.bandwidth_bps)]
    figures += [_FIGURES.unpack(link.receive((PROBE, FLOAT32, _FIGURES.size)).data) for link in group.others]
    worst = LinkSpeed(max(one[0] for one in figures), min(one[1] for one in figures))
    for link in group.others:
        _send(link, memoryview(_FIGURES.pack(worst.round_trip_s, worst.bandwidth_bps)))
    return worst


def _send(link: Link, data: memoryview) -> None:
    link.post(PROBE, FLOAT32, data)
    if link.pending:
        take_turns([link])
