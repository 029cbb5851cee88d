"""A coordinator in this process and a client made of the raw stubs, for tests."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fedge.core.limits import Limits
from fedge.core.params import Layout, Vector
from fedge.core.random import generator
from fedge.core.task import DELTA
from fedge.protos import fedge_pb2 as pb
from fedge.protos import fedge_pb2_grpc, wire
from fedge.server.coordinator.coordinator import Coordinator, Watchers
from fedge.server.coordinator.serving import listening
from fedge.server.machine import Federation, Stop
from fedge.server.machine.events import Record
from fedge.strategies.aggregators.mean import Mean
from fedge.strategies.optimizers.sgd import Sgd
from fedge.strategies.schedulers.fedavg import FedAvg
from fedge.strategies.weighers.equal import Equal
from fedge.strategies.weighers.staleness import Constant

SIZE = 3000
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
]
LIMITS = Limits(chunk_bytes=4096, liveness_s=30.0)


def initial(size: int = SIZE) -> Vector:
    return np.linspace(-1, 1, size, dtype=np.float32)


def plan(
    clients: int = 2, size: int = SIZE, limits: Limits = LIMITS, stop: Stop = Stop(), **changes: Any
) -> Federation:
    layout = Layout.of({"parameters": initial(size)})
    federation = Federation(
        layout, FedAvg(steps=3), Equal(), Constant(), Mean(), Sgd(), expected=clients, limits=limits, stop=stop
    )
    return replace(federation, **changes)


def delta_of(task_id: str, size: int = SIZE) -> Vector:
    """A vector that depends on the task alone, so that a repeated upload has the same bytes."""
    return generator(0, task_id).standard_normal(size, np.float32)


class Peer:
    """One client incarnation on the raw stubs; every call has a deadline."""

    def __init__(self, address: str, name: str, incarnation: str | None = None) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self.stub = fedge_pb2_grpc.CoordinatorStub(self.channel)
        self.sender = pb.Sender(client=name, incarnation=incarnation or secrets.token_hex(8))

    async def join(self, **changes: Any) -> pb.JoinReply:
        request = pb.JoinRequest(sender=self.sender, **{"protocol": wire.PROTOCOL, "examples": 10, **changes})
        return await self.stub.Join(request, timeout=10)

    def offers(self, holding: str = "") -> Any:
        return self.stub.Tasks(pb.TasksRequest(sender=self.sender, holding=holding), timeout=20)

    async def task(self, holding: str = "") -> pb.Task:
        """The next task; AssertionError where the run ends first."""
        call = self.offers(holding)
        try:
            async for offer in call:
                assert offer.WhichOneof("offer") != "finished"
                if offer.WhichOneof("offer") == "task":
                    return offer.task
        finally:
            call.cancel()
        raise AssertionError("the stream ended without a task")

    async def download(self, version: int, offset: int = 0) -> tuple[pb.Manifest, bytes]:
        manifest, data = pb.Manifest(), b""
        async for part in self.stub.Download(
            pb.DownloadRequest(sender=self.sender, version=version, offset=offset), timeout=10
        ):
            if part.WhichOneof("part") == "manifest":
                manifest = part.manifest
            else:
                assert part.chunk.offset == offset + len(data)
                data += part.chunk.data
        return manifest, data

    def begin(self, task: pb.Task, delta: Vector, **changes: Any) -> pb.UploadBegin:
        manifest, _ = wire.encode_blobs({DELTA: delta})
        values = {"task_id": task.id, "base_version": task.version, "steps": task.steps, "examples": 10, **changes}
        return pb.UploadBegin(**{"sender": self.sender, "manifest": manifest, "metrics": {"loss": 0.5}, **values})

    def parts(
        self, begin: pb.UploadBegin, data: bytes, offset: int = 0, until: int | None = None
    ) -> Iterator[pb.UploadPart]:
        yield pb.UploadPart(begin=begin)
        for chunk in wire.chunks([data[:until]], offset, LIMITS.chunk_bytes):
            yield pb.UploadPart(chunk=chunk)

    async def upload(self, task: pb.Task, delta: Vector | None = None, **changes: Any) -> pb.UploadReply:
        delta = delta_of(task.id) if delta is None else delta
        return await self.send(self.parts(self.begin(task, delta, **changes), delta.tobytes()))

    async def send(self, parts: Iterator[pb.UploadPart]) -> pb.UploadReply:
        """Upload; where a refusal overtakes bytes still on their way, gRPC may say INTERNAL alone: ask again for it."""
        kept = list(parts)
        for _ in range(10):
            try:
                return await self.stub.Upload(iter(kept), timeout=10)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INTERNAL or reason(error):
                    raise
        raise AssertionError("ten uploads in a row ended without a reason")

    async def offset(self, task_id: str) -> pb.UploadOffsetReply:
        return await self.stub.UploadOffset(pb.UploadOffsetRequest(sender=self.sender, task_id=task_id), timeout=10)


class Room:
    """A running coordinator, its address, the lines of its record, and clients to it."""

    def __init__(self, coordinator: Coordinator, address: str, lines: list[Record]) -> None:
        self.coordinator, self.address, self.lines = coordinator, address, lines
        self.peers: list[Peer] = []

    def peer(self, name: str, incarnation: str | None = None) -> Peer:
        self.peers.append(Peer(self.address, name, incarnation))
        return self.peers[-1]

    async def joined(self, count: int) -> list[Peer]:
        peers = [self.peer(f"device-{number}") for number in range(count)]
        for peer in peers:
            await peer.join()
        return peers

    def kinds(self, kind: str) -> list[Record]:
        return [line for line in self.lines if line.kind == kind]


@asynccontextmanager
async def room(
    state_dir: Path, federation: Federation, lines: list[Record] | None = None, **watch: Any
) -> AsyncIterator[Room]:
    lines = [] if lines is None else lines
    keep_all = watch.pop("keep_all", True)
    watchers = Watchers(lines.append, **watch)
    coordinator = Coordinator(federation, initial(federation.layout.size), state_dir, watchers, keep_all=keep_all)
    server, address = await listening(coordinator, "127.0.0.1:0")
    running = asyncio.create_task(coordinator.run())
    made = Room(coordinator, address, lines)
    try:
        yield made
    finally:
        for peer in made.peers:
            await peer.channel.close()
        await server.stop(None)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        coordinator.close()


def reason(error: grpc.aio.AioRpcError) -> str:
    return str(dict(error.trailing_metadata() or ()).get(wire.REASON_KEY, ""))
