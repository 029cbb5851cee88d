"""The service of protos/edge.proto over one bundle: who asks, in what order, and what each of them is told.

Every request gets one reply: outputs, or a reason and a sentence. A bad request, or a flood of them, ends nothing but
itself. onnxruntime works in a few threads, the rest is one event loop. Must never listen on an address, or compute.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from fedge.core.errors import AddressError, FedgeError, Overloaded, TooLate
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import Bundle
from fedge.edge.cloud import wire
from fedge.edge.cloud.batcher import Batcher, Waiting
from fedge.edge.cloud.engine import Engine, Outcome
from fedge.protos import edge_pb2 as pb

Context = Any  # grpc.aio.ServicerContext; grpcio is not typed
_NAME = "fedge.edge.v1.Tail"


class _Stream:
    """One device: its requests in flight, each until its reply is written."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = asyncio.Lock()  # gRPC takes one message at a time
        self._writing: set[asyncio.Task[None]] = set()
        self.in_flight = 0
        self.unread_bytes = 0  # of replies that gRPC has not taken yet
        self.idle = asyncio.Event()
        self.idle.set()

    async def write(self, data: bytes) -> None:
        async with self._lock:
            await self._context.write(data)

    def begin(self) -> None:
        self.in_flight += 1
        self.idle.clear()

    def end(self, data: bytes) -> None:
        """Answer one request in flight, without waiting for the device to read it."""
        self.unread_bytes += len(data)
        task = asyncio.create_task(self._last(data))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _last(self, data: bytes) -> None:
        try:
            if not self._context.done():
                await self.write(data)
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            pass  # the device is gone, nobody misses the reply
        finally:
            self.unread_bytes -= len(data)
            self.in_flight -= 1
            if not self.in_flight:
                self.idle.set()


@dataclass(frozen=True, slots=True)
class _Work:
    request: wire.Request
    stream: _Stream


class TailService:
    """The three calls. `run` must be running, in the same loop, for `infer` to be answered."""

    def __init__(
        self, bundle: Bundle, engine: Engine, *, profile: bytes = b"", workers: int = 2, limits: EdgeLimits
    ) -> None:
        self._bundle, self._engine, self._profile, self._limits = bundle, engine, profile, limits
        self._batcher: Batcher[_Work] = Batcher(limits)
        self._pool = ThreadPoolExecutor(workers, "tail")
        self._free = workers
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._streams: set[_Stream] = set()
        self._draining = False

    def handler(self) -> grpc.GenericRpcHandler:
        """The service for a server. Requests of `Infer` stay bytes, so that what is no message gets a reply too."""
        calls = {
            "Hello": grpc.unary_unary_rpc_method_handler(
                self.hello, pb.HelloRequest.FromString, pb.HelloReply.SerializeToString
            ),
            "Infer": grpc.stream_stream_rpc_method_handler(self.infer),
            "Probe": grpc.unary_unary_rpc_method_handler(
                self.probe, pb.ProbeRequest.FromString, pb.ProbeReply.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(_NAME, calls)

    async def hello(self, request: pb.HelloRequest, context: Context) -> pb.HelloReply:
        """What is served; the device compares."""
        if request.protocol != wire.PROTOCOL:
            detail = f"Protocol {wire.PROTOCOL} is spoken here, not {request.protocol}; install the same fedge."
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, detail)
        return pb.HelloReply(
            version=self._bundle.version, profile=self._profile, max_tensor_bytes=self._limits.max_tensor_bytes
        )

    async def probe(self, request: pb.ProbeRequest, context: Context) -> pb.ProbeReply:
        """Nothing, at once."""
        started_at = time.monotonic()
        if len(request.padding) > self._limits.max_probe_bytes:
            detail = f"A probe is at most {self._limits.max_probe_bytes} bytes; send less."
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, detail)
        return pb.ProbeReply(seconds=time.monotonic() - started_at)

    async def infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """One device's stream, until it hangs up or has lasted too long."""
        if len(self._streams) >= self._limits.max_streams:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many devices are connected; come back later.")
        stream = _Stream(context)
        self._streams.add(stream)
        try:
            async with asyncio.timeout(self._limits.stream_timeout_s + self._limits.max_deadline_s):
                async for data in requests:
                    await self._take(data, stream)
                await stream.idle.wait()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "The stream has lasted too long; open the next one.")
        finally:
            self._streams.discard(stream)
            self._batcher.drop(lambda work: work.stream is stream)  # the room is for those who still listen

    async def run(self) -> None:
        """Form batches and have them computed, until cancelled; what is being computed then comes to its end."""
        try:
            while True:
                now = time.monotonic()
                self._step(now)
                await self._pause(now)
        finally:
            await asyncio.gather(*self._running, return_exceptions=True)

    async def drain(self, grace_s: float) -> None:
        """Refuse what comes, and wait until what is here is answered, or the grace is up."""
        self._draining = True
        until = time.monotonic() + grace_s
        while any(stream.in_flight for stream in self._streams) and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _step(self, now: float) -> None:
        for late in self._batcher.expired(now):
            self._answer(late, TooLate("The request waited until its deadline; ask for less, or elsewhere."), 0.0)
        while self._free and (batch := self._batcher.ready(now)):
            self._free -= 1
            task = asyncio.create_task(self._compute(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _pause(self, now: float) -> None:
        """Until something comes, something ends, or the queue needs a look."""
        wake_at = self._batcher.wake_at()
        if not self._free:  # only deadlines matter then
            wake_at = min((one.due_at for one in self._batcher.queue), default=float("inf"))
        try:
            async with asyncio.timeout(None if wake_at == float("inf") else max(0.0, wake_at - now)):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _take(self, data: bytes, stream: _Stream) -> None:
        """Let one request wait, or refuse it."""
        request_id = 0
        try:
            if self._draining:
                raise AddressError("The cloud is shutting down; ask another one, or later.")
            message = wire.parse(data)
            request_id = message.id
            request = wire.check_request(message, self._bundle, self._limits)
            if stream.in_flight >= self._limits.max_in_flight:
                raise Overloaded(f"{stream.in_flight} requests of this device wait already; ask again later.")
            now = time.monotonic()
            work = _Work(request, stream)
            self._batcher.add(
                Waiting(work, request.key, request.rows, request.size_bytes, now, now + request.deadline_s)
            )
        except FedgeError as error:
            await stream.write(wire.refusal_bytes(request_id, self._bundle.version, error))
            return
        stream.begin()
        self._wake.set()

    async def _compute(self, batch: list[Waiting[_Work]]) -> None:
        started_at = time.monotonic()
        loop = asyncio.get_running_loop()
        requests = [one.work.request for one in batch]
        try:
            outcomes = await loop.run_in_executor(self._pool, self._engine.compute, requests)
        finally:
            self._free += 1
            self._wake.set()
        now = time.monotonic()
        for one, outcome in zip(batch, outcomes):
            late = now > one.due_at and not isinstance(outcome, FedgeError)
            told = TooLate("The answer came after its deadline; ask for less, or elsewhere.") if late else outcome
            self._answer(one, told, now - started_at)

    def _answer(self, one: Waiting[_Work], outcome: Outcome, compute_s: float) -> None:
        queue_s = max(0.0, time.monotonic() - one.came_at - compute_s)
        request_id, version = one.work.request.id, self._bundle.version
        if isinstance(outcome, FedgeError):
            data = wire.refusal_bytes(request_id, version, outcome, queue_s + compute_s)
        else:
            data = wire.reply_bytes(request_id, version, outcome, queue_s, compute_s)
            if not self._has_room(one.work.stream, len(data)):
                crowded = Overloaded("Too many answers wait to be read; read them, or ask again later.")
                data = wire.refusal_bytes(request_id, version, crowded, queue_s + compute_s)
        one.work.stream.end(data)

    def _has_room(self, stream: _Stream, size_bytes: int) -> bool:
        """Whether a reply may lie here until it is read; one device that reads nothing must not take all the room."""
        if stream.unread_bytes and stream.unread_bytes + size_bytes > self._limits.max_tensor_bytes:
            return False
        return sum(one.unread_bytes for one in self._streams) + size_bytes <= self._limits.max_unread_bytes
