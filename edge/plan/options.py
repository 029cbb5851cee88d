"""Every way to run a cut model between a device and a cloud, and what each costs. Both ends are among them.

Owns the enumeration (device alone, or any boundary in any coding, with and without the exits on the way) and the
expectation over who leaves early. Must never choose.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedge.core.errors import DataError
from fedge.edge.bundle import INPUT, LARGE_BYTES, OUTPUT, Boundary, Bundle, Exit, Sent
from fedge.edge.exits.rules import NEVER
from fedge.edge.plan.link import Link
from fedge.edge.plan.profile import CodingCost, Profile, coding_key, piece_key
from fedge.edge.plan.scale import AS_PROFILED, Scale

RAW = "raw"


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run the model. Seconds are as profiled; `device_s` is the mean over samples that leave early or not,
    `worst_s` what a sample takes that never leaves. `boundary` and `coding` are None where nothing is sent.

    `sent` is the share of samples for which the cloud is asked; `carries_input`, whether a tensor of the input is among
    what crosses, as it also is at a cut that the input goes around. `bytes` go up, `reply_bytes` come down: those of
    large answers, which are packed to nobody knows how little, are not counted. Memory and accuracy are None where
    unknown.
    """

    pieces: tuple[tuple[str, str], ...]
    exits: tuple[str, ...]
    boundary: str | None
    coding: str | None
    device_s: float
    worst_s: float
    sent: float = 0.0
    encode_s: float = 0.0
    bytes: float = 0.0
    decode_s: float = 0.0
    tail_s: float = 0.0
    memory_bytes: int | None = None
    accuracy: float | None = None
    carries_input: bool = False
    reply_bytes: float = 0.0

    @property
    def link_bytes(self) -> float:
        """Bytes that take time on the link, there and back. A device knows one bandwidth, so both ways count alike."""
        return self.bytes + self.reply_bytes

    @property
    def name(self) -> str:
        """As people call it: 'local', 'input as jpeg90', 'relu_3 as u8, 1 exit'."""
        place = "local" if self.boundary is None else f"{self.boundary} as {self.coding}"
        return place + (f", {len(self.exits)} exit{'s' * (len(self.exits) > 1)}" if self.exits else "")

    def latency_s(self, link: Link, scale: Scale = AS_PROFILED) -> float:
        """Expected seconds per sample."""
        return scale.device * self.device_s + self.sent * self._sending_s(link, scale)

    def longest_s(self, link: Link, scale: Scale = AS_PROFILED) -> float:
        """Expected seconds of a sample that does not leave early: what a deadline is held against."""
        return scale.device * self.worst_s + (0.0 if self.boundary is None else self._sending_s(link, scale))

    def _sending_s(self, link: Link, scale: Scale) -> float:
        network_s = link.rtt_s + 8 * self.link_bytes / link.bandwidth_bps
        return scale.device * self.encode_s + network_s + scale.cloud * (self.decode_s + self.tail_s)


def build(bundle: Bundle, device: Profile, cloud: Profile | None) -> tuple[Option, ...]:
    """Every option that was measured: local first, then the raw input to the cloud, then the others along the line.

    No `cloud` leaves the local ones. An exit that no held-out sample took is not used. An option is left out where a
    profile lacks one of its pieces or codings. Raises DataError where profiles are of another bundle or lack one of the
    two ends, and where the statistics of exits are no probabilities.
    """
    if any(profile.version != bundle.version for profile in (device, cloud) if profile):
        raise DataError("A profile is of another bundle than the one to plan for; measure the machine again.")
    stats = _in_order(bundle)
    found: list[Option] = []
    for way in _ways(bundle, cloud):
        sending = _sending(bundle, device, cloud, way)
        heads = _heads(bundle, device, way.boundary or OUTPUT, stats)
        fresh = [_option(bundle, device, way, head, sending) for head in heads if way.boundary is None or sending]
        if way.needed and not fresh:
            raise DataError(f"The profiles lack {way.text}; measure device and cloud again.")
        found += fresh
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Way:
    """Where the device stops, and how what it has then travels."""

    boundary: str | None
    coding: str | None
    sent: Sent

    @property
    def needed(self) -> bool:
        """Whether this is one of the two ends, which every choice is compared with."""
        return self.boundary is None or (self.boundary, self.coding) == (INPUT, RAW)

    @property
    def text(self) -> str:
        return "the pieces from input to output" if self.boundary is None else "the cloud's piece input..output"


@dataclass(frozen=True, slots=True)
class _Head:
    pieces: tuple[tuple[str, str], ...]
    exits: tuple[Exit, ...]
    reached: tuple[float, ...]  # the share of samples for which each piece runs
    sent: float


def _ways(bundle: Bundle, cloud: Profile | None) -> list[_Way]:
    offered = {boundary.name: bundle.codings.get(boundary.name, {}) for boundary in bundle.boundaries[:-1]}
    known = (codings[RAW].accuracy for codings in offered.values() if RAW in codings)
    whole = next((accuracy for accuracy in known if accuracy is not None), None)  # raw changes nothing, wherever sent
    ways = [_Way(None, None, Sent(whole))]
    if cloud is None:
        return ways
    ways.append(_Way(INPUT, RAW, Sent(whole)))
    sendable = [(name, coding) for name, codings in offered.items() for coding in codings]
    return ways + [
        _Way(name, coding, offered[name][coding]) for name, coding in sendable if (name, coding) != (INPUT, RAW)
    ]


def _heads(bundle: Bundle, device: Profile, target: str, stats: Sequence[tuple[str, Exit]]) -> list[_Head]:
    """The pieces from the input to `target`: without exits, and with those on the way where there are any."""
    order = [boundary.name for boundary in bundle.boundaries]
    passed = [(place, stat) for place, stat in stats if order.index(place) <= order.index(target) and target != INPUT]
    used = _stops((place for place, _ in passed), target)
    # Pieces end at every exit's boundary, so also at those of exits that nobody takes.
    places = sorted({leave.boundary for leave in bundle.exits}, key=order.index)
    every = _stops((place for place in places if order.index(place) < order.index(target)), target)
    direct = _route(device, _stops((), target), used, every)
    heads = [] if direct is None else [_Head(direct, (), (1.0,) * len(direct), 1.0)]
    through = _route(device, used, every)
    if through is not None and passed:
        left = {end: sum(stat.share for place, stat in passed if place == end) for _, end in through}
        stays = [1.0]
        for _, end in through:
            stays.append(max(0.0, stays[-1] - left[end]))
        heads.append(_Head(through, tuple(stat for _, stat in passed), tuple(stays[:-1]), stays[-1]))
    return heads


def _stops(between: Iterable[str], target: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((INPUT, *between, target)))


def _route(device: Profile, *routes: Sequence[str]) -> tuple[tuple[str, str], ...] | None:
    """The pieces of the first of these routes of which all were measured."""
    found = (tuple(pairwise(stops)) for stops in routes)
    return next((legs for legs in found if all(piece_key(*leg) in device.pieces for leg in legs)), None)


def _option(
    bundle: Bundle, device: Profile, way: _Way, head: _Head, sending: tuple[CodingCost, float] | None
) -> Option:
    cost, tail_s = sending or (CodingCost(0.0, 0.0, 0.0), 0.0)
    seconds = [device.pieces[piece_key(*piece)] for piece in head.pieces]
    memory = [device.memory_bytes.get(piece_key(*piece)) for piece in head.pieces]
    gained = sum(stat.share * (stat.accuracy - stat.final_accuracy) for stat in head.exits)
    return Option(
        pieces=head.pieces,
        exits=tuple(stat.name for stat in head.exits),
        boundary=way.boundary,
        coding=way.coding,
        device_s=sum(share * each for share, each in zip(head.reached, seconds)),
        worst_s=sum(seconds),
        sent=head.sent if sending else 0.0,
        encode_s=cost.encode_s,
        bytes=cost.bytes,
        decode_s=cost.decode_s,
        tail_s=tail_s,
        memory_bytes=None if None in memory else sum(size or 0 for size in memory),
        accuracy=None if way.sent.accuracy is None else way.sent.accuracy + gained,
        carries_input=_carries_input(bundle, way.boundary),
        reply_bytes=_reply_bytes(bundle) if sending else 0.0,
    )


def _reply_bytes(bundle: Bundle) -> int:
    """Of one sample, as far as it is known before it comes."""
    size = raw_bytes(bundle.boundary(OUTPUT))
    return size if size < LARGE_BYTES else 0


def _carries_input(bundle: Bundle, boundary: str | None) -> bool:
    if boundary is None:
        return False
    sent = {tensor.name for tensor in bundle.boundary(boundary).tensors}
    return any(tensor.name in sent for tensor in bundle.boundary(INPUT).tensors)


def _sending(bundle: Bundle, device: Profile, cloud: Profile | None, way: _Way) -> tuple[CodingCost, float] | None:
    """What coding, bytes and tail cost; None where nothing is sent or it was not measured, which raw need not be."""
    if way.boundary is None or way.coding is None or cloud is None:
        return None
    key, tail_s = coding_key(way.boundary, way.coding), cloud.pieces.get(piece_key(way.boundary, OUTPUT))
    cost = device.codings.get(key)
    if cost is None and way.coding == RAW:
        cost = CodingCost(0.0, 0.0, raw_bytes(bundle.boundary(way.boundary)))
    if cost is None or tail_s is None:
        return None
    decode_s = cloud.codings.get(key, cost).decode_s
    size = cost.bytes if way.sent.bytes is None else way.sent.bytes  # real samples tell more than a profile's one
    return CodingCost(cost.encode_s, decode_s, size), tail_s


def raw_bytes(boundary: Boundary) -> int:
    """Bytes of one sample's tensors at a boundary, as they lie in memory. Raises DataError for an unknown dtype."""
    try:
        sizes = [np.dtype(tensor.dtype).itemsize for tensor in boundary.tensors]
    except TypeError:
        raise DataError(f"A tensor at {boundary.name!r} has an unknown dtype; export the bundle again.") from None
    extents = [math.prod(max(extent, 1) for extent in tensor.shape) for tensor in boundary.tensors]
    return sum(size * extent for size, extent in zip(sizes, extents))


def _in_order(bundle: Bundle) -> list[tuple[str, Exit]]:
    """(boundary, exit) for the exits that somebody takes, in order."""
    order = {boundary.name: index for index, boundary in enumerate(bundle.boundaries)}
    figures = [figure for leave in bundle.exits for figure in (leave.share, leave.accuracy, leave.final_accuracy)]
    if not all(0 <= figure <= 1 for figure in figures) or sum(leave.share for leave in bundle.exits) > 1 + 1e-6:
        raise DataError(
            "Shares and accuracies of exits lie in [0, 1] and shares add up to 1 at most; measure them again."
        )
    taken = [leave for leave in bundle.exits if leave.share > 0 and leave.threshold < NEVER]
    used = [(leave.boundary, leave) for leave in taken if leave.boundary not in (INPUT, OUTPUT)]
    return sorted(used, key=lambda place: order[place[0]])
