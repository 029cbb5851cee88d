"""The device's line to the tail: one channel, one stream, reconnecting for as long as it is open.

Owns the greeting, the matching of replies to requests, what is known of the link, and the probes that keep it known.
Nothing here ever waits for the network on behalf of who asks: without a line, and after a request that has had no
reply by its deadline, `ask` fails at once until something is heard again. Must never plan, or run a model.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc

from fedge.core import addresses
from fedge.core.errors import AddressError, DataError, FedgeError, ModelError, OtherBundle, RefusedTensor
from fedge.core.limits import EdgeLimits
from fedge.edge.cloud import wire
from fedge.edge.coding.codings import Coded
from fedge.edge.plan import link as links
from fedge.edge.plan import profile as profiles
from fedge.edge.plan.link import Link, LinkState
from fedge.edge.plan.profile import Profile
from fedge.protos import edge_pb2 as pb
from fedge.protos import edge_pb2_grpc as rpc

log = logging.getLogger("fedge")
_FIRST_DELAY_S, _MOST_DELAY_S = 0.05, 2.0  # between two tries to connect
_SILENCE_S = 0.5  # between two pings while nothing is heard
_INFER = "/fedge.edge.v1.Tail/Infer"


def channel_options(limits: EdgeLimits) -> list[tuple[str, int]]:
    """Channel arguments of the device."""
    return [
        ("grpc.max_receive_message_length", wire.most_message_bytes(limits)),
        ("grpc.max_send_message_length", wire.most_message_bytes(limits)),
        *addresses.keepalive(),
        ("grpc.initial_reconnect_backoff_ms", int(_FIRST_DELAY_S * 1000)),
        ("grpc.min_reconnect_backoff_ms", int(_FIRST_DELAY_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", 1000),  # the waiting is done here, not in the channel
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


@dataclass(slots=True)
class _Asked:
    """A request in flight."""

    reply: "Future[wire.Reply]"
    size_bytes: int
    sent_at: float
    due_at: float
    overdue: bool = False


class Uplink:
    """The line to the tail at `address` for the bundle of this `version`. Methods may be called from any thread.

    `profile` is the cloud's once it has greeted; `trouble` says why the line is down. Raises AddressError for what is
    no address; nothing else here raises.
    """

    def __init__(self, address: str, version: str, limits: EdgeLimits = EdgeLimits()) -> None:
        addresses.parse(address)
        self._version, self._limits, self._address = version, limits, address
        self._lock = threading.RLock()  # a probe that is done at once calls back at once
        self._closed = threading.Event()
        self._pending: dict[int, _Asked] = {}
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._next_id = 1
        self._up = self._silent = False
        self._opened_at = self._pinged_at = 0.0
        self._state = LinkState()
        self._probe: Any = None
        self.profile: Profile | None = None
        self.trouble: FedgeError = AddressError(f"{address} has not been reached yet.")
        self._channel = grpc.insecure_channel(address, channel_options(limits))
        self._stub: Any = rpc.TailStub(self._channel)  # type: ignore[no-untyped-call]
        self._infer: Any = self._channel.stream_stream(_INFER, None, pb.TailReply.FromString)
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)
        self._thread.start()

    @property
    def usable(self) -> bool:
        """Whether `ask` would send anything."""
        return self._up and not self._silent

    def link(self) -> Link | None:
        """The link as far as it is known."""
        return links.estimate(self._state)

    def ask(self, boundary: str, tensors: Sequence[Coded], deadline_s: float) -> "Future[wire.Reply]":
        """The cloud's answer from `boundary` on, wanted within `deadline_s`; at once, or never, a FedgeError."""
        reply: Future[wire.Reply] = Future()
        size = sum(coded.size_bytes for coded in tensors)
        with self._lock:
            if not self.usable:
                reply.set_exception(self.trouble if not self._up else _silence(self._address))
            elif size > self._limits.max_tensor_bytes:
                reply.set_exception(RefusedTensor(f"{size} bytes are too many for the cloud; use another coding."))
            else:
                wanted_s = min(deadline_s, self._limits.max_deadline_s)
                data = wire.request_to(self._next_id, self._version, boundary, tensors, wanted_s)
                now = time.monotonic()
                self._pending[self._next_id] = _Asked(reply, len(data), now, now + wanted_s)
                self._next_id += 1
                self._outbox.put(data)
        return reply

    def tend(self, now: float) -> None:
        """What needs doing now and then: note what is overdue, probe the link, open the next stream in time."""
        with self._lock:
            for asked in self._pending.values():
                if now >= asked.due_at and not asked.overdue:
                    asked.overdue = self._silent = True
                    self._state = links.fail(self._state, asked.size_bytes, now - asked.sent_at, now)
            if not self._up:
                return
            if now - self._opened_at > self._limits.stream_timeout_s and not self._pending:
                self._up = False
                self._outbox.put(None)
            elif self._probe is None:
                self._send_probe(now)

    def close(self) -> None:
        """End it all; who waits for a reply gets AddressError. May be called twice."""
        self._closed.set()
        self._outbox.put(None)
        self._channel.close()
        self._thread.join()

    # ---- the stream ----------------------------------------------------------------------------

    def _run(self) -> None:
        tries = 0
        while not self._closed.is_set():
            trouble: FedgeError = AddressError(f"{self._address} ended the stream; it is opened again.")
            try:
                self._greet()
                tries = 0
                if self._listen():
                    continue
            except FedgeError as error:
                trouble = error
            except grpc.RpcError as error:
                trouble = _meaning(error, self._address)
            except ValueError:  # gRPC's answer on a channel that has been closed
                trouble = AddressError(f"The line to {self._address} was closed.")
            self._down(trouble)
            tries += 1
            ceiling_s = min(_MOST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(tries, 16))
            # Jitter needs no secrecy: it only keeps a thousand devices from coming back at once.
            self._closed.wait(random.uniform(ceiling_s / 4, ceiling_s))  # noqa: S311

    def _greet(self) -> None:
        """Raises OtherBundle, or ModelError for a profile that is none."""
        hello = pb.HelloRequest(protocol=wire.PROTOCOL, version=self._version)
        reply = self._stub.Hello(hello, timeout=self._limits.rpc_timeout_s)
        if reply.version != self._version:
            raise OtherBundle(f"{self._address} serves version {reply.version[:12]!r}; give both ends one bundle.")
        try:
            profile = profiles.decode(reply.profile)
        except DataError as error:
            raise ModelError(f"{self._address} sent no profile of its bundle ({error}).") from None
        if profile.version != self._version:
            raise ModelError(f"The profile of {self._address} is of another bundle; measure it again.")
        self.profile = profile

    def _listen(self) -> bool:
        """Take replies until the stream ends; whether it did because it is time for the next one."""
        with self._lock:
            self._outbox = queue.SimpleQueue()
            self._state = LinkState()  # it may be another link
            self._opened_at, self._silent, self._probe = time.monotonic(), False, None
            if self._closed.is_set():
                return False
            call = self._infer(_until_none(self._outbox))
            self._up = True
        for message in call:
            self._take(message, time.monotonic())
        with self._lock:
            return not (self._up or self._closed.is_set())

    def _take(self, message: pb.TailReply, now: float) -> None:
        with self._lock:
            asked = self._pending.pop(message.id, None)
            if asked is None:
                return
            self._heard(asked.size_bytes + message.ByteSize(), now - asked.sent_at, wire.cloud_s(message), now)
        try:
            result = wire.reply_from(message, self._limits)
        except FedgeError as error:
            asked.reply.set_exception(error)
        else:
            asked.reply.set_result(result)

    def _down(self, trouble: FedgeError) -> None:
        """The stream is gone, and whatever was on it."""
        with self._lock:
            if self._up or type(trouble) is not type(self.trouble):
                log.info("%s: %s", self._address, trouble)
            self.trouble, self._up = trouble, False
            lost, self._pending = self._pending, {}
            self._outbox.put(None)
        for asked in lost.values():
            asked.reply.set_exception(AddressError(f"The line to {self._address} was lost ({trouble})"))

    # ---- the link ------------------------------------------------------------------------------

    def _heard(self, size_bytes: int, elapsed_s: float, cloud_s: float, now: float) -> None:
        self._silent = False
        self._state = links.observe(self._state, size_bytes, elapsed_s, cloud_s, now)

    def _send_probe(self, now: float) -> None:
        """A probe where one is due, or a ping where nothing has been heard."""
        if links.due(self._state, now):
            size = links.probe_bytes(self._state, now, self._limits.max_probe_bytes)
        elif self._silent and now - self._pinged_at > _SILENCE_S:
            size = 0
        else:
            return
        self._pinged_at = now
        request = pb.ProbeRequest(padding=random.randbytes(size))  # noqa: S311 (so that nothing on the way shrinks it)
        sent_at = time.monotonic()
        try:
            probe = self._probe = self._stub.Probe.future(request, timeout=self._limits.rpc_timeout_s)
        except ValueError:
            return  # the channel has been closed
        probe.add_done_callback(lambda done: self._probed(done, request.ByteSize(), sent_at))

    def _probed(self, probe: Any, size_bytes: int, sent_at: float) -> None:
        now = time.monotonic()
        with self._lock:
            if self._probe is not probe:
                return  # of an earlier stream
            self._probe = None
            if probe.cancelled():
                return
            if probe.exception() is None:
                self._heard(size_bytes, now - sent_at, probe.result().seconds, now)
            else:
                self._state = links.fail(self._state, size_bytes, now - sent_at, now)


def _until_none(outbox: "queue.SimpleQueue[bytes | None]") -> Iterator[bytes]:
    while (data := outbox.get()) is not None:
        yield data


def _silence(address: str) -> AddressError:
    return AddressError(f"{address} has not answered in time; nothing is sent until it is heard again.")


def _meaning(error: grpc.RpcError, address: str) -> FedgeError:
    status, detail = error.code(), error.details() or ""
    if status == grpc.StatusCode.FAILED_PRECONDITION:
        return ModelError(f"{address}: {detail[: wire.MAX_TEXT]}")
    return AddressError(f"{address} cannot be reached ({status.name}: {detail[: wire.MAX_TEXT]})")
