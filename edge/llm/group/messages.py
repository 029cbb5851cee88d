"""What workers and the head tell each other, judged before anything of it is believed.

Owns every check of form on reports and orders: either a message is within the limits, or DataError is raised and
nothing else. Must never run a call, nor decide what follows.
"""

import math
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from fedge.core import addresses
from fedge.core.errors import AddressError, DataError, ExperimentError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.mesh.collectives import COLLECTIVES
from fedge.edge.llm.mesh.handshake import LEAST_KEY_BYTES
from fedge.edge.llm.shards.about import MAX_SIZE
from fedge.protos import llm_pb2 as pb

PROTOCOL = 1
HEAD = "head"  # what the head is called among its devices
MAX_KINDS = 16
_MAX_DETAIL = 500  # characters
_DIGEST = re.compile("[0-9a-f]{64}")
_AGAIN = "install the same version of fedge on all devices"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a device brings: weights multiplied per second by kind of weights, memory, bytes per second of disk, and the
    seconds that a layer takes besides.
    """

    name: str
    weights_per_s: Mapping[str, float]
    memory_bytes: int
    disk_bytes_per_s: float
    layer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Hello:
    """A device that has come. `address` is where ranks dial it; an empty host is the head's own machine."""

    offer: Offer
    incarnation: str
    address: str
    certificate: str


def report(data: bytes, limits: LlmLimits) -> pb.Report:
    """A worker's message, parsed; one of its events is set. Raises DataError."""
    _require(len(data) <= limits.max_report_bytes, f"it has {len(data)} bytes")
    try:
        found: pb.Report = pb.Report.FromString(data)
    except DecodeError as error:
        raise DataError(f"A report is no message; {_AGAIN}.") from error
    _require(found.WhichOneof("event") is not None, "it says nothing")
    return found


def hello(told: pb.Hello, host: str, limits: LlmLimits, *, secure: bool = False) -> Hello:
    """A device's first report, which came from `host`; `secure` ones must have a certificate.

    Raises DataError, and ExperimentError for another version of the protocol.
    """
    if told.protocol != PROTOCOL:
        raise ExperimentError(f"The head speaks protocol {PROTOCOL}, the device {told.protocol}; {_AGAIN}.")
    name = told.name
    _require(bool(name) and name.isprintable(), "its name is empty or cannot be printed")
    _require(name != HEAD, f"{HEAD!r} is the name of the head")
    _require(len(name.encode()) <= limits.max_device_name_bytes, "its name is too long")
    _require(bool(re.fullmatch("[0-9a-f]{32}", told.incarnation)), "its incarnation is none")
    _require(len(told.certificate) <= limits.max_certificate_bytes, "its certificate is too long")
    _require(_is_certificate(told.certificate) if told.certificate else not secure, "its certificate is none")
    speeds = dict(told.weights_per_s)
    _require(len(speeds) <= MAX_KINDS, "it has too many speeds")
    _require(all(math.isfinite(one) and one > 0 for one in (*speeds.values(), told.disk_bps)), "a speed is none")
    _require(math.isfinite(told.layer_s) and told.layer_s >= 0, "its layers take a time that is none")
    own, port = _address(told.data_address)
    offer = Offer(name, speeds, told.memory_bytes, told.disk_bps, told.layer_s)
    return Hello(offer, told.incarnation, f"{own or host}:{port}", told.certificate)


def check_load(told: pb.Load, limits: LlmLimits) -> None:
    """The head's order, which may be wrong as well. Raises DataError."""
    ranks = len(told.peers)
    _require(2 <= ranks <= limits.max_ranks and 0 < told.rank < ranks, f"it is for rank {told.rank} of {ranks}")
    _require(0 < told.epoch < 1 << 32, f"its epoch is {told.epoch}")
    _require(bool(_DIGEST.fullmatch(told.digest)) and told.bytes > 0, "its shard is none")
    _require(len(told.key) >= LEAST_KEY_BYTES, "its key is too short")
    _require(0 < told.slots <= limits.max_slots, f"it wants {told.slots} slots")
    _require(0 < told.context <= MAX_SIZE, f"it wants {told.context} tokens of context")
    _require(not told.collective or told.collective in COLLECTIVES, "its collective is unknown")
    for peer in told.peers:
        _address(peer.address)
        _require(len(peer.certificate) <= limits.max_certificate_bytes, "a certificate is too long")


def clip(text: str) -> str:
    """A sentence as it may be sent and shown."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_DETAIL])


def dismiss(reason: str, detail: str) -> pb.Order:
    """The order to go."""
    return pb.Order(dismiss=pb.Dismiss(reason=reason, detail=clip(detail)))


def join_host(address: str, host: str) -> str:
    """The address with `host` where it has none. Raises DataError."""
    own, port = _address(address)
    return f"{own or host}:{port}"


def _is_certificate(text: str) -> bool:
    """Whether TLS can take it; or one device could keep a whole group from meeting."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError, TypeError):  # TypeError: letters that are not ASCII
        return False
    return True


def _address(address: str) -> tuple[str, int]:
    try:
        host, port = addresses.parse(f"0{address}" if address.startswith(":") else address)
    except AddressError as error:
        raise DataError(f"A message is out of order: {address[:80]!r} is no address; {_AGAIN}.") from error
    _require(port > 0 and len(host) <= 255, f"{address[:80]!r} is no address")
    return ("" if address.startswith(":") else host), port


def _require(condition: Any, why: str) -> None:
    if not condition:
        raise DataError(f"A message is out of order: {why}; {_AGAIN}.")
