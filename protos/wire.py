"""The one module where bytes become core objects and core objects become bytes.

Owns every check of form on what a peer sends, each against `fedge.core.limits`: whatever comes in, either it parses or
a leaf of TheirFault is raised, and never anything else. Values (NaN, norms, ranges) are judged by the screen, not here.
Must never run gRPC calls, touch files or unpickle. That parsing stands apart from transport follows h11.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Protocol

import numpy as np

from fedge.core.errors import (
    BadReport,
    FedgeError,
    ModelError,
    OurFault,
    RefusedClient,
    StrategyError,
    TheirFault,
    UnknownTask,
    WrongHash,
    WrongManifest,
    WrongOffset,
    WrongSize,
    leaves,
)
from fedge.core.limits import Limits
from fedge.core.params import Array
from fedge.core.task import Broadcast, Scalar, Task, Update
from fedge.protos import fedge_pb2 as pb

PROTOCOL = 1
REASON_KEY = "fedge-reason"  # trailing metadata of a refusal: the `reason` of an error leaf
MODEL = "model"  # the blob of a broadcast that holds the parameters, float32 [d]
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")
}
_MAX_RANK = 32  # NumPy 1 holds no more dimensions
_CHUNK_OVERHEAD = 64  # bytes of a message around the data of its chunk
_MAX_DETAIL = 500  # characters of a refusal's sentence
_MAX_WHOLE = 1 << 63  # versions, steps and sizes stay below it

Buffer = bytes | bytearray | memoryview
Metadata = tuple[tuple[str, str], ...]


# ---- tensors -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoded:
    """One broadcast as bytes, made once and sent to every client. `version` is that of the model."""

    version: int
    manifest: pb.Manifest
    buffers: Sequence[memoryview]


def encode_blobs(blobs: Mapping[str, Array]) -> tuple[pb.Manifest, list[memoryview]]:
    """A manifest and the raw little-endian bytes of each blob; views, not copies, of contiguous arrays.

    Raises WrongManifest for a type that does not travel. The arrays must not change while the buffers are in use.
    """
    manifest, buffers, digest = pb.Manifest(), [], hashlib.sha256()
    for name, blob in blobs.items():
        array = np.asarray(blob)
        if array.dtype.name not in DTYPES:
            raise WrongManifest(f"Blob {name!r} is of type {array.dtype}; convert it to one of {', '.join(DTYPES)}.")
        flat = np.ascontiguousarray(array, DTYPES[array.dtype.name]).reshape(-1)
        buffers.append(flat.view(np.uint8).data)
        digest.update(buffers[-1])
        manifest.blobs.add(name=name, dtype=array.dtype.name, shape=array.shape)
    manifest.size_bytes = sum(map(len, buffers))
    manifest.sha256 = digest.digest()
    return manifest, buffers


def check_manifest(manifest: pb.Manifest, limits: Limits) -> None:
    """Raises WrongManifest or WrongSize; after it, the sizes are sane and add up to `size_bytes`."""
    if len(manifest.sha256) != hashlib.sha256().digest_size:
        raise WrongManifest("The manifest has no SHA-256; send the 32 bytes of it.")
    if len(manifest.blobs) > limits.max_blobs:
        raise WrongManifest(f"{len(manifest.blobs)} blobs are more than the {limits.max_blobs} allowed; merge some.")
    if manifest.size_bytes > limits.max_update_bytes:
        raise WrongSize(f"{manifest.size_bytes} bytes are more than the {limits.max_update_bytes} allowed.")
    names: set[str] = set()
    total = 0
    for blob in manifest.blobs:
        check_name(blob.name, limits, WrongManifest, "blob name")
        if blob.name in names:
            raise WrongManifest(f"Blob {blob.name!r} is named twice; name each once.")
        names.add(blob.name)
        total += _blob_bytes(blob, limits)
    if total != manifest.size_bytes:
        raise WrongSize(f"The blobs add up to {total} bytes where {manifest.size_bytes} are declared.")


def _blob_bytes(blob: pb.Blob, limits: Limits) -> int:
    if blob.dtype not in DTYPES:
        raise WrongManifest(f"Blob {blob.name!r} has an unknown type; send one of {', '.join(DTYPES)}.")
    if len(blob.shape) > _MAX_RANK:
        raise WrongManifest(f"Blob {blob.name!r} has {len(blob.shape)} dimensions; {_MAX_RANK} are allowed.")
    itemsize = DTYPES[blob.dtype].itemsize
    # A dimension of 0 must not hide another of 2**60, which no array can have.
    ceiling: int = prod(max(extent, 1) for extent in blob.shape) * itemsize
    if ceiling > limits.max_update_bytes:
        raise WrongSize(f"Blob {blob.name!r} is larger than the {limits.max_update_bytes} bytes allowed.")
    return ceiling if all(blob.shape) else 0


def decode_blobs(manifest: pb.Manifest, buffer: Buffer) -> dict[str, Array]:
    """Read-only views into `buffer`, by name; a copy only where a view would be misaligned.

    Call `check_manifest` before. Raises WrongSize where the lengths differ, WrongManifest for bytes that are no bool.
    """
    raw = memoryview(buffer).toreadonly()
    if raw.nbytes != manifest.size_bytes:
        raise WrongSize(f"{raw.nbytes} bytes came where {manifest.size_bytes} were declared.")
    blobs: dict[str, Array] = {}
    start = 0
    for blob in manifest.blobs:
        end = start + prod(blob.shape) * DTYPES[blob.dtype].itemsize
        part = raw[start:end]
        if blob.dtype == "bool" and end > start and np.frombuffer(part, np.uint8).max() > 1:
            raise WrongManifest(f"Blob {blob.name!r} holds bytes that are neither 0 nor 1; send it as uint8.")
        array = np.frombuffer(part, DTYPES[blob.dtype]).reshape(tuple(blob.shape))
        blobs[blob.name] = array if array.flags.aligned and sys.byteorder == "little" else _native(array)
        start = end
    return blobs


def _native(array: Array) -> Array:
    copy = array.astype(array.dtype.newbyteorder("="))
    copy.setflags(write=False)
    return copy


def encode_broadcast(broadcast: Broadcast) -> Encoded:
    """The model and the blobs beside it. Raises StrategyError where a blob takes the model's name."""
    if MODEL in broadcast.blobs:
        raise StrategyError(f"No blob of a server optimizer may be called {MODEL!r}; rename it.")
    return Encoded(broadcast.version, *encode_blobs({MODEL: broadcast.vector, **broadcast.blobs}))


def broadcast_from(version: int, manifest: pb.Manifest, buffer: Buffer) -> Broadcast:
    """The broadcast in `buffer`. Raises WrongManifest where it has no model, float32 [d]."""
    blobs = decode_blobs(manifest, buffer)
    vector = blobs.pop(MODEL, None)
    if vector is None or vector.ndim != 1 or vector.dtype != np.float32:
        raise WrongManifest("The broadcast holds no model as one float32 vector.")
    return Broadcast(version, vector, blobs)


# ---- chunks ------------------------------------------------------------------------------------


def chunks(buffers: Sequence[Buffer], offset: int, chunk_bytes: int) -> Iterator[pb.Chunk]:
    """The bytes of `buffers`, one after the other, from `offset` on, in chunks of at most `chunk_bytes`."""
    start = 0
    for buffer in buffers:
        view, end = memoryview(buffer), start + len(buffer)
        for at in range(max(start, offset), end, chunk_bytes):
            yield pb.Chunk(offset=at, data=bytes(view[at - start : at - start + chunk_bytes]))
        start = end


class Sink(Protocol):
    """Where received bytes go: an open file, an io.BytesIO."""

    def write(self, data: bytes, /) -> object:
        """Take all of `data`."""


class Receiver:
    """Takes the chunks of one payload in order; counts and hashes while they come.

    `have` are the bytes received before (a spool read back after a restart), already in the sink. A sender goes on at
    `offset` or, to start anew, is given a new Receiver and an empty sink. After an error the bytes in the sink are
    worth nothing, save after WrongOffset, which leaves everything as it was.
    """

    def __init__(self, manifest: pb.Manifest, sink: Sink, have: Iterable[Buffer] = ()) -> None:
        self.offset = 0
        self._size = manifest.size_bytes
        self._sha256 = manifest.sha256
        self._sink = sink
        self._digest = hashlib.sha256()
        for part in have:
            self._count(part)

    @property
    def complete(self) -> bool:
        """All declared bytes are here; `finish` says whether they are the right ones."""
        return self.offset == self._size

    def take(self, chunk: pb.Chunk) -> None:
        """Write one chunk to the sink. Raises WrongOffset for a gap or overlap, WrongSize for too much or nothing."""
        if chunk.offset != self.offset:
            raise WrongOffset(f"The chunk begins at {chunk.offset}; go on at {self.offset}.")
        data = chunk.data  # each access of the field copies it
        if not data:
            raise WrongSize("A chunk without bytes; leave it out.")
        self._count(data)
        self._sink.write(data)

    def finish(self) -> None:
        """Raises WrongSize where bytes are missing and WrongHash where they are not the declared ones."""
        if not self.complete:
            raise WrongSize(f"The payload ends after {self.offset} of {self._size} bytes; send the rest.")
        if self._digest.digest() != self._sha256:
            raise WrongHash("The bytes do not have the SHA-256 declared; send them again from the start.")

    def _count(self, data: Buffer) -> None:
        if self.offset + len(data) > self._size:
            raise WrongSize(f"More bytes came than the {self._size} declared.")
        self._digest.update(data)
        self.offset += len(data)


# ---- tasks and updates -------------------------------------------------------------------------


def check_name(name: str, limits: Limits, error: type[TheirFault], what: str) -> str:
    """`name`, where it is printable and of 1 to `max_name_bytes` bytes; else raises `error`."""
    if not name or not name.isprintable() or len(name.encode()) > limits.max_name_bytes:
        raise error(f"The {what} must have 1 to {limits.max_name_bytes} bytes, all printable.")
    return name


def clip(text: str, limits: Limits) -> str:
    """`text` made fit for the record: printable, and of at most `max_name_bytes` bytes."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: limits.max_name_bytes])
    return line.encode(errors="ignore")[: limits.max_name_bytes].decode(errors="ignore")


def check_sender(sender: pb.Sender, limits: Limits) -> None:
    """Raises RefusedClient for a name or an incarnation that is empty, too long or unprintable."""
    check_name(sender.client, limits, RefusedClient, "client's name")
    check_name(sender.incarnation, limits, RefusedClient, "client's incarnation")


def check_join(request: pb.JoinRequest, limits: Limits) -> None:
    """Raises RefusedClient or ModelError; the hash itself is compared by the coordinator."""
    check_sender(request.sender, limits)
    if request.protocol != PROTOCOL:
        raise RefusedClient(
            f"The client speaks protocol {request.protocol}, the coordinator {PROTOCOL}; install the same fedge."
        )
    if not 0 <= request.examples <= limits.max_examples:
        raise RefusedClient(f"The count of examples must lie between 0 and {limits.max_examples}.")
    if request.layout_hash:
        check_name(request.layout_hash, limits, ModelError, "layout hash")


def check_join_reply(reply: pb.JoinReply, limits: Limits) -> None:
    """Raises RefusedClient where the coordinator's terms make no sense."""
    check_name(reply.run_id, limits, RefusedClient, "coordinator's run id")
    check_name(reply.layout_hash, limits, RefusedClient, "coordinator's layout hash")
    if not 1 <= reply.chunk_bytes <= limits.max_message_bytes - _CHUNK_OVERHEAD:
        raise RefusedClient(f"The coordinator asks for chunks of {reply.chunk_bytes} bytes; set its limits right.")
    if not (isfinite(reply.stream_timeout_s) and reply.stream_timeout_s > 0):
        raise RefusedClient(f"The coordinator's stream timeout is {reply.stream_timeout_s} s; set its limits right.")


def task_to_pb(task: Task) -> pb.Task:
    """A task for the wire. Raises StrategyError for a hyper-parameter that does not fit in 64 bits."""
    message = pb.Task(id=task.id, version=task.version, steps=task.steps, kind=task.kind)
    for key, value in task.hyper.items():
        try:
            message.hyper[key].CopyFrom(_scalar_to_pb(value))
        except (TypeError, ValueError):
            raise StrategyError(
                f"Hyper-parameter {key!r} is {value!r}, which does not travel; send a number."
            ) from None
    return message


def task_from_pb(message: pb.Task, client: str, limits: Limits) -> Task:
    """The task offered to `client`. Raises UnknownTask, WrongManifest or BadReport."""
    check_name(message.id, limits, UnknownTask, "task's id")
    check_name(message.kind, limits, BadReport, "task's kind")
    _check_whole("steps", message.steps, limits.max_steps + 1)
    _check_whole("version", message.version, _MAX_WHOLE)
    _check_items(message.hyper, limits, "hyper-parameters")
    hyper = {key: _scalar_from(message.hyper[key], key) for key in sorted(message.hyper)}
    return Task(message.id, client, message.version, message.steps, message.kind, hyper)


def _scalar_to_pb(value: Scalar) -> pb.Scalar:
    match value:
        case bool():
            return pb.Scalar(flag=value)
        case int():
            return pb.Scalar(whole=value)
        case float():
            return pb.Scalar(real=value)
        case _:
            return pb.Scalar(text=value)


def _scalar_from(message: pb.Scalar, key: str) -> Scalar:
    match message.WhichOneof("value"):
        case "flag":
            return message.flag
        case "whole":
            return message.whole
        case "real":
            return message.real
        case "text":
            return message.text
    raise BadReport(f"Hyper-parameter {key!r} has no value.")


def begin_of(update: Update, sender: pb.Sender, manifest: pb.Manifest) -> pb.UploadBegin:
    """The head of an upload, whose blobs `manifest` describes. Raises BadReport for figures that do not travel."""
    try:
        return pb.UploadBegin(
            sender=sender,
            task_id=update.task_id,
            base_version=update.base_version,
            steps=update.steps,
            examples=update.examples,
            manifest=manifest,
            timings=update.timings,
            metrics=update.metrics,
        )
    except (TypeError, ValueError) as error:
        raise BadReport(f"The update's figures do not travel ({error}); return plain numbers.") from None


def check_begin(begin: pb.UploadBegin, limits: Limits) -> None:
    """All that can be said of an upload before its bytes come. Raises a leaf of TheirFault."""
    check_sender(begin.sender, limits)
    check_name(begin.task_id, limits, UnknownTask, "task's id")
    _check_whole("base version", begin.base_version, _MAX_WHOLE)
    _check_whole("steps", begin.steps, _MAX_WHOLE)
    _check_items(begin.timings, limits, "timings")
    _check_items(begin.metrics, limits, "metrics")
    check_manifest(begin.manifest, limits)


def update_from(begin: pb.UploadBegin, blobs: Mapping[str, Array]) -> Update:
    """The update, once `begin` was checked and its blobs were decoded."""
    return Update(
        client=begin.sender.client,
        task_id=begin.task_id,
        base_version=begin.base_version,
        steps=begin.steps,
        examples=begin.examples,
        blobs=blobs,
        timings={key: begin.timings[key] for key in sorted(begin.timings)},
        metrics={key: begin.metrics[key] for key in sorted(begin.metrics)},
    )


def _check_whole(what: str, value: int, bound: int) -> None:
    if value >= bound:
        raise BadReport(f"The {what} must be below {bound}.")


def _check_items(items: Mapping[str, object], limits: Limits, what: str) -> None:
    if len(items) > limits.max_metadata_items:
        raise BadReport(f"{len(items)} {what} are more than the {limits.max_metadata_items} allowed; send fewer.")
    for key in items:
        check_name(key, limits, BadReport, f"names of {what}")


# ---- refusals ----------------------------------------------------------------------------------


def refusal_of(error: FedgeError) -> tuple[str, str, Metadata]:
    """What a peer is told of an error: the name of the gRPC status, one sentence, the trailing metadata."""
    return error.status, str(error)[:_MAX_DETAIL], ((REASON_KEY, error.reason),)


def error_from(reason: str, status: str, detail: str) -> FedgeError:
    """The error that a peer's refusal stands for; OurFault where the reason is none of ours.

    `reason` is the value of REASON_KEY in the trailing metadata (empty where there is none), `status` the name of the
    gRPC status. A coordinator newer than this client may send reasons unknown here.
    """
    known = {leaf.reason: leaf for leaf in leaves()}
    detail = detail[:_MAX_DETAIL]
    if reason in known:
        return known[reason](detail)
    return OurFault(f"The peer answered {status} {reason}: {detail}".replace(" :", ":"))
