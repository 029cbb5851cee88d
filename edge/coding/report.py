"""What a coding costs on the wire: bytes of the real message, and bits per feature point.

The message is the serialized TailRequest of one sample, as the device sends it, not only the tensor's bytes: names,
ranges and shapes are paid for too. Bits per feature point (bits of the message per value of the uncoded tensors) is the
measure of feature coding, e.g. of MPEG's work on it. Must never time anything.
"""

from collections.abc import Iterable, Sequence
from math import prod

from fedge.edge.coding.codings import Coded
from fedge.edge.coding.message import to_pb
from fedge.protos import edge_pb2


def message_bytes(boundary: str, tensors: Sequence[Coded], version: str = "0" * 64) -> int:
    """Bytes of the request that carries these tensors to the tail that starts at `boundary`."""
    parts = [to_pb(one) for one in tensors]
    request = edge_pb2.TailRequest(id=1, version=version, boundary=boundary, tensors=parts, deadline_s=1.0)
    return int(request.ByteSize())


def points(shapes: Iterable[Sequence[int]]) -> int:
    """How many values the uncoded tensors have."""
    return sum(prod(shape) for shape in shapes)


def bits_per_point(message: float, shapes: Iterable[Sequence[int]]) -> float:
    """Bits per feature point of a message of so many bytes, or a mean. Raises ZeroDivisionError where no values are."""
    return 8.0 * message / points(shapes)
