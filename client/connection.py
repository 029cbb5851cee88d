"""A connection to the coordinator that outlives cuts, restarts and silence.

Owns the channel and its settings, a deadline on every call, and the law of trying again: what may pass (a lost
connection, a coordinator that restarts) is waited out with jittered exponential back-off, joining again under the same
incarnation; what will not pass is raised as the leaf of FedgeError the coordinator named. Uploads and downloads go on
at the byte where they were cut. Must never train, and never touch files.
"""

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, TypeVar

import grpc

from fedge.core import addresses
from fedge.core.errors import (
    AddressError,
    FedgeError,
    ModelError,
    NotJoined,
    RefusedClient,
    TaskSpent,
    WrongHash,
    WrongManifest,
    WrongOffset,
)
from fedge.core.limits import Limits
from fedge.core.task import Broadcast, Task, Update
from fedge.protos import fedge_pb2 as pb
from fedge.protos import fedge_pb2_grpc as rpc
from fedge.protos import wire

T = TypeVar("T")
log = logging.getLogger("fedge")

_FIRST_DELAY_S = 0.05  # the first tries come fast: most cuts are short
_TRIES = 3  # whole transfers of one payload whose bytes come out wrong
_PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,  # a stream reset on the way; the coordinator's own errors carry a reason
}


class _LostError(Exception):
    """The connection failed in a way that may pass."""


def channel_options(limits: Limits) -> list[tuple[str, int]]:
    """Channel settings."""
    return [
        *addresses.keepalive(limits),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", int(_FIRST_DELAY_S * 1000)),
        ("grpc.min_reconnect_backoff_ms", int(_FIRST_DELAY_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", 1000),  # the waiting is done here, not in the channel
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),  # clients in one process stay apart
    ]


class Connection:
    """One client's line to the coordinator at "host:port". Methods may be called from any thread.

    `layout_hash` is that of the client's model, empty where it takes any; `examples` the size of its data set. Every
    method raises a leaf of TheirFault where the coordinator refuses, and AddressError where it has not been heard of
    for `liveness_s` before the first join, or for `lease_s` after it (by then every task held has expired).
    """

    def __init__(self, address: str, name: str, limits: Limits, *, layout_hash: str = "", examples: int = 0) -> None:
        addresses.parse(address)
        self.address = address
        self.limits = limits
        self.sender = pb.Sender(client=name, incarnation=secrets.token_hex(16))
        wire.check_sender(self.sender, limits)
        self.terms = pb.JoinReply()  # what the coordinator said on joining
        self.finished = ""  # why the run ended, once `listen` has heard so
        self.bytes_up = self.bytes_down = 0
        self._join = pb.JoinRequest(
            sender=self.sender, protocol=wire.PROTOCOL, layout_hash=layout_hash, examples=examples
        )
        self._channel = grpc.insecure_channel(address, channel_options(limits))
        self._stub: Any = rpc.CoordinatorStub(self._channel)  # type: ignore[no-untyped-call]
        self._joined = False
        self._joining = threading.Lock()
        self._closed = threading.Event()
        self._heard_at = time.monotonic()

    # ---- calls ---------------------------------------------------------------------------------

    def join(self) -> pb.JoinReply:
        """Become a member; the coordinator's terms. Raises RefusedClient or ModelError."""
        return self._persist(lambda: self.terms)

    def listen(self, holding: Callable[[], str], deliver: Callable[[Task], None]) -> str:
        """Hand each task offered to `deliver` until the run is finished; why it is. Blocks.

        `holding` gives the id of the task the client works on, so that it is not sent again after a cut.
        """
        heard = 0

        def attempt() -> str:
            nonlocal heard
            request = pb.TasksRequest(sender=self.sender, holding=holding())
            for offer in self._stub.Tasks(request, timeout=self._stream_timeout_s()):
                heard += 1
                self._heard_at = time.monotonic()
                match offer.WhichOneof("offer"):
                    case "finished":
                        return str(offer.finished)
                    case "task":
                        deliver(wire.task_from_pb(offer.task, self.sender.client, self.limits))
            raise _LostError("the stream of tasks ended")

        self.finished = self._persist(attempt, lambda: heard) or "finished"
        return self.finished

    def download(self, version: int) -> Broadcast:
        """One version of the model, verified. Raises WrongHash where its bytes come out wrong three times."""
        return self._whole(lambda: self._download(version))

    def _download(self, version: int) -> Broadcast:
        sink = BytesIO()
        first: pb.Manifest | None = None
        receiver = wire.Receiver(pb.Manifest(), sink)

        def attempt() -> Broadcast:
            nonlocal first, receiver
            request = pb.DownloadRequest(sender=self.sender, version=version, offset=receiver.offset)
            for part in self._stub.Download(request, timeout=self._stream_timeout_s()):
                self._heard_at = time.monotonic()
                if part.WhichOneof("part") == "chunk":
                    receiver.take(part.chunk)
                    self.bytes_down += len(part.chunk.data)
                elif first is None:
                    wire.check_manifest(part.manifest, self.limits)
                    first = part.manifest
                    receiver = wire.Receiver(first, sink)
                elif part.manifest != first:
                    raise WrongHash(f"Version {version} changed while it was sent; fetch it again.")
            if first is None:
                raise WrongManifest(f"Version {version} came without a manifest.")
            if not receiver.complete:
                raise _LostError(f"the download ended after {receiver.offset} bytes")
            receiver.finish()
            return wire.broadcast_from(version, first, sink.getbuffer())

        return self._persist(attempt, lambda: receiver.offset)

    def upload(self, update: Update, *, resume: bool = False) -> bool:
        """Send an update and wait until it counts; whether it had counted before. Raises a leaf of RefusedUpdate.

        `resume`: an earlier process may have sent some of it, so ask for the offset first.
        """
        manifest, buffers = wire.encode_blobs(dict(sorted(update.blobs.items())))  # the same bytes in every process
        begin = pb.UploadPart(begin=wire.begin_of(update, self.sender, manifest))
        ask, offset = resume, 0

        def parts(start: int) -> Iterator[pb.UploadPart]:
            yield begin
            for chunk in wire.chunks(buffers, start, self.terms.chunk_bytes):
                self.bytes_up += len(chunk.data)
                yield pb.UploadPart(chunk=chunk)

        def attempt() -> bool:
            nonlocal ask, offset
            if ask:
                question = pb.UploadOffsetRequest(sender=self.sender, task_id=update.task_id)
                answer = self._stub.UploadOffset(question, timeout=self.limits.rpc_timeout_s)
                if answer.counted:
                    return True
                offset = answer.offset if answer.offset <= manifest.size_bytes else 0
            ask = True
            reply = self._stub.Upload(parts(offset), timeout=self._stream_timeout_s())
            return bool(reply.repeated_delivery)

        def afresh() -> bool:
            nonlocal ask, offset
            try:
                return self._persist(attempt, lambda: offset)
            except (WrongHash, WrongOffset):
                ask, offset = False, 0
                raise

        return self._whole(afresh)

    def fail(self, task_id: str, why: str) -> None:
        """Say that a task comes to nothing."""
        request = pb.FailRequest(sender=self.sender, task_id=task_id, reason=wire.clip(why, self.limits))
        self._persist(lambda: self._stub.Fail(request, timeout=self.limits.rpc_timeout_s))

    def leave(self) -> None:
        """Say goodbye, once; that nobody hears it is no error. Only `close` may follow."""
        self._closed.set()  # or the listening thread would join again when its stream ends
        try:
            self._stub.Leave(pb.LeaveRequest(sender=self.sender), timeout=1.0)
        except grpc.RpcError as error:
            log.debug("nobody heard the goodbye: %s", error.code())

    def close(self) -> None:
        """End all calls; whoever waits in one gets AddressError. May be called twice."""
        self._closed.set()
        self._channel.close()

    # ---- trying again --------------------------------------------------------------------------

    def _persist(self, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """`attempt` as a member, until it succeeds or will not; back-off begins anew where `progress` was made."""
        tries, last = 0, progress()
        while True:
            try:
                with self._meaning():
                    self._ensure_joined()
                    result = attempt()
                self._heard_at = time.monotonic()
                return result
            except _LostError as lost:
                self._joined = False
                tries, last = (tries + 1, last) if progress() == last else (1, progress())
                self._wait(tries, lost)

    def _ensure_joined(self) -> None:
        with self._joining:
            if self._joined:
                return
            reply = self._stub.Join(self._join, timeout=self.limits.rpc_timeout_s)
            wire.check_join_reply(reply, self.limits)
            if self._join.layout_hash not in ("", reply.layout_hash):
                raise ModelError("The coordinator trains another model than this client; use the same model code.")
            if self.terms.run_id not in ("", reply.run_id):
                raise RefusedClient(f"{self.address} now runs another federation; start the client again to join it.")
            self.terms = reply
            self._joined = True
            self._heard_at = time.monotonic()

    def _whole(self, transfer: Callable[[], T]) -> T:
        """A transfer, from its start again where the bytes came out wrong."""
        for _ in range(_TRIES - 1):
            try:
                return transfer()
            except (WrongHash, WrongOffset) as error:
                log.warning("%s: a transfer starts again: %s", self.address, error)
        return transfer()

    @contextmanager
    def _meaning(self) -> Iterator[None]:
        """Turns what gRPC raises into _LostError, or into the error the coordinator named."""
        try:
            yield
        except grpc.RpcError as error:
            raise _meaning(error) from None
        except ValueError:
            if not self._closed.is_set():
                raise
            raise _LostError("the connection was closed") from None  # gRPC's answer on a closed channel

    def _wait(self, tries: int, lost: _LostError) -> None:
        patience_s = self.limits.lease_s if self.terms.run_id else self.limits.liveness_s
        if self._closed.is_set():
            raise AddressError(f"The connection to {self.address} was closed.")
        if self.finished:
            raise TaskSpent(f"The run has ended ({self.finished}), and its coordinator is gone.")
        if time.monotonic() - self._heard_at > patience_s:
            raise AddressError(f"No word from {self.address} for {patience_s:.0f} s ({lost}); is the coordinator up?")
        log.log(logging.WARNING if tries == 2 else logging.DEBUG, "%s: %s; trying again", self.address, lost)
        ceiling = min(self.limits.max_reconnect_s, _FIRST_DELAY_S * 2.0 ** min(tries, 32))
        # Jitter needs no secrecy: it only keeps a thousand clients from coming back at once.
        self._closed.wait(random.uniform(ceiling / 4, ceiling))  # noqa: S311

    def _stream_timeout_s(self) -> float:
        return min(self.limits.stream_timeout_s, self.terms.stream_timeout_s)


def _meaning(error: grpc.RpcError) -> FedgeError | _LostError:
    status, detail = error.code(), error.details() or ""
    reason = dict(error.trailing_metadata() or ()).get(wire.REASON_KEY, "")
    refusal = wire.error_from(str(reason), status.name, detail)
    away = isinstance(refusal, NotJoined) or refusal.status == "UNAVAILABLE"  # joining again, or time, mends it
    passing = away if reason else status in _PASSING
    return _LostError(f"{status.name}: {detail}") if passing else refusal
