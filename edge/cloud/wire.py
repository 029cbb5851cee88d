"""Messages of protos/edge.proto and what they stand for, with every check of form.

Whatever bytes come in, the outcome is a request that fits the bundle served, or a leaf of RefusedTensor with the id to
answer under, where there was one. Owns the names of reasons on the wire. Must never decode a tensor or run a model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from fedge.core.errors import (
    AddressError,
    FedgeError,
    ModelError,
    OtherBundle,
    OurFault,
    Overloaded,
    RefusedTensor,
    TooLate,
)
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import OUTPUT, Bundle, Piece, Tensor
from fedge.edge.coding.codings import Coded, check
from fedge.edge.coding.message import to_pb
from fedge.protos import edge_pb2 as pb

PROTOCOL = 1
BATCH = -1  # an extent that counts samples; other negative ones are free, but count something else
MAX_TEXT = 200  # characters of a name, a coding or a detail
RANGE_BYTES = 32  # of one number of a range while it waits
_SLACK_BYTES = 1 << 20  # of a message beside its tensors
_ERRORS = {leaf.reason: leaf for leaf in (RefusedTensor, OtherBundle, Overloaded, TooLate, ModelError, AddressError)}


@dataclass(frozen=True, slots=True)
class Request:
    """A request whose form has been checked.

    `key` is equal where two may share a batch, None where it shares none; `rows` is its batch extent.
    `size_bytes` is what it holds while it waits, or what it unpacks to, whichever is more.
    """

    id: int
    piece: Piece
    tensors: tuple[Coded, ...]
    deadline_s: float
    rows: int
    size_bytes: int
    key: tuple[object, ...] | None


@dataclass(frozen=True, slots=True)
class Reply:
    """What the cloud answered: outputs, the seconds it spent, and its version."""

    outputs: tuple[Coded, ...]
    cloud_s: float
    version: str


def most_message_bytes(limits: EdgeLimits) -> int:
    """The longest message either end takes."""
    return limits.max_tensor_bytes + _SLACK_BYTES


def from_pb(message: pb.Coded, limits: EdgeLimits) -> Coded:
    """One tensor that came. Raises RefusedTensor where its form alone is too much; it is not decoded."""
    if max(len(message.name), len(message.dtype), len(message.coding)) > MAX_TEXT:
        raise RefusedTensor(f"A name in a tensor is longer than {MAX_TEXT} characters; send the bundle's own names.")
    if len(message.shape) > limits.max_rank or any(extent > limits.max_tensor_bytes for extent in message.shape):
        raise RefusedTensor(f"A tensor has more than {limits.max_rank} axes, or a huge one; send the bundle's shapes.")
    if max(len(message.low), len(message.high)) > max([1, *message.shape]):
        raise RefusedTensor("A tensor has more ranges than channels; use one of the codings.")
    return Coded(
        message.name,
        message.dtype,
        tuple(message.shape),
        message.coding,
        tuple(message.low),
        tuple(message.high),
        message.data,
    )


def request_to(request_id: int, version: str, boundary: str, tensors: Sequence[Coded], deadline_s: float) -> bytes:
    """The bytes of a request."""
    data: bytes = pb.TailRequest(
        id=request_id,
        version=version,
        boundary=boundary,
        tensors=[to_pb(coded) for coded in tensors],
        deadline_s=deadline_s,
    ).SerializeToString()
    return data


def parse(data: bytes) -> pb.TailRequest:
    """The message in these bytes. Raises RefusedTensor where they are none."""
    try:
        message: pb.TailRequest = pb.TailRequest.FromString(data)
    except DecodeError:
        raise RefusedTensor("The bytes are no request of fedge.edge.v1; use a device of the same version.") from None
    return message


def check_request(message: pb.TailRequest, bundle: Bundle, limits: EdgeLimits) -> Request:
    """The request in a message. Raises OtherBundle, or RefusedTensor where anything does not fit the bundle."""
    if message.version != bundle.version:
        raise OtherBundle(f"Version {bundle.version[:12]} is served, not {message.version[:12]!r}; fetch its bundle.")
    if not (math.isfinite(message.deadline_s) and 0 < message.deadline_s <= limits.max_deadline_s):
        raise RefusedTensor(f"The deadline is {message.deadline_s} s; ask for more than 0 and {limits.max_deadline_s}.")
    try:
        piece = bundle.piece(message.boundary, OUTPUT)
    except KeyError:
        raise RefusedTensor(f"No tail starts at {message.boundary[:MAX_TEXT]!r}; send a cut of the bundle.") from None
    if len(message.tensors) != len(piece.inputs):
        raise RefusedTensor(f"{len(message.tensors)} tensors came, {len(piece.inputs)} cross {piece.start!r}.")
    tensors = tuple(from_pb(tensor, limits) for tensor in message.tensors)
    sizes = [_checked_bytes(coded, tensor, limits) for coded, tensor in zip(tensors, piece.inputs)]
    if sum(sizes) > limits.max_tensor_bytes:
        raise RefusedTensor(f"The tensors unpack to more than {limits.max_tensor_bytes} bytes; send less at a time.")
    rows = batch_rows([coded.shape for coded in tensors], piece.inputs, limits)
    batches = stackable(piece)
    key = (piece.file, tuple(coded.shape[1:] for coded in tensors)) if batches else None
    held = max(sum(sizes), sum(len(coded.data) + RANGE_BYTES * len(coded.low + coded.high) for coded in tensors))
    return Request(message.id, piece, tensors, message.deadline_s, rows, held, key)


def stackable(piece: Piece) -> bool:
    """Whether requests for this piece can be stacked: axis 0 of every tensor in and out is the batch, no other free."""
    shapes = [tensor.shape for tensor in (*piece.inputs, *piece.outputs)]
    return all(shape[:1] == (BATCH,) and min(shape[1:], default=0) >= 0 for shape in shapes)


def batch_rows(shapes: Sequence[tuple[int, ...]], tensors: Sequence[Tensor], limits: EdgeLimits) -> int:
    """The batch extent that all `tensors` with one share, in these shapes; else 1.

    Raises RefusedTensor where it is more than the cloud takes: a device asks here before it sends.
    """
    extents = {shape[0] for shape, tensor in zip(shapes, tensors) if tensor.shape[:1] == (BATCH,)}
    rows = max(extents, default=1)
    if len(extents) > 1 or rows > limits.max_batch:
        raise RefusedTensor(f"The batch extents are {sorted(extents)}; send one extent, at most {limits.max_batch}.")
    return rows


def reply_bytes(request_id: int, version: str, outputs: Sequence[Coded], queue_s: float, compute_s: float) -> bytes:
    """The bytes of an answer."""
    data: bytes = pb.TailReply(
        id=request_id,
        outputs=[to_pb(coded) for coded in outputs],
        queue_s=queue_s,
        compute_s=compute_s,
        version=version,
    ).SerializeToString()
    return data


def refusal_bytes(request_id: int, version: str, error: FedgeError, queue_s: float = 0.0) -> bytes:
    """The bytes of a refusal; one sentence goes along, never a trace."""
    detail = str(error)[: 2 * MAX_TEXT]
    reply = pb.TailReply(id=request_id, reason=error.reason, detail=detail, queue_s=queue_s, version=version)
    data: bytes = reply.SerializeToString()
    return data


def reply_from(message: pb.TailReply, limits: EdgeLimits) -> Reply:
    """The answer in a message. Raises the error that it carries, or RefusedTensor where its form is bad."""
    if message.reason:
        raise _ERRORS.get(message.reason, OurFault)(message.detail[: 2 * MAX_TEXT] or "The cloud gave no detail.")
    if len(message.outputs) > limits.max_tensors:
        raise RefusedTensor(f"The cloud sent {len(message.outputs)} outputs, at most {limits.max_tensors} are taken.")
    return Reply(tuple(from_pb(coded, limits) for coded in message.outputs), cloud_s(message), message.version)


def cloud_s(message: pb.TailReply) -> float:
    """Seconds that the cloud says it spent; 0 where it says what cannot be."""
    spent = message.queue_s + message.compute_s
    return spent if math.isfinite(spent) and spent >= 0 else 0.0


def _checked_bytes(coded: Coded, tensor: Tensor, limits: EdgeLimits) -> int:
    """The size of the tensor once decoded. Raises RefusedTensor where name, type, shape or coding do not fit."""
    if coded.name != tensor.name or coded.dtype != tensor.dtype:
        raise RefusedTensor(f"{coded.name!r} of {coded.dtype!r} came where {tensor.name!r} of {tensor.dtype} is due.")
    fits = len(coded.shape) == len(tensor.shape) and all(
        have > 0 and want in (have, min(want, -1)) for have, want in zip(coded.shape, tensor.shape)
    )
    if not fits:
        raise RefusedTensor(f"{tensor.name!r} came in the shape {coded.shape}, {tensor.shape} is wanted.")
    check(coded.coding)
    size = math.prod(coded.shape) * np.dtype(tensor.dtype).itemsize
    if max(size, len(coded.data)) > limits.max_tensor_bytes:
        raise RefusedTensor(f"{tensor.name!r} is larger than {limits.max_tensor_bytes} bytes; send less at a time.")
    return size
