"""Clients without training for the coordinator benchmark: coroutines of one process that speak the real protocol.

A mock downloads the model and throws it away, and uploads the same ready-made bytes for every task, so that the time
measured is the coordinator's. Must never import the coordinator.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from fedge.client.connection import channel_options
from fedge.core.limits import Limits
from fedge.core.task import DELTA
from fedge.protos import fedge_pb2 as pb
from fedge.protos import fedge_pb2_grpc, wire

_SERVICE = "/fedge.v1.Coordinator"
_TIMEOUT_S = 600.0
_PARALLEL_JOINS = 50


class Payload:
    """One delta as the parts of an upload, encoded once for all clients."""

    def __init__(self, size: int) -> None:
        delta = np.full(size, 1e-6, np.float32)
        self.manifest, buffers = wire.encode_blobs({DELTA: delta})
        parts = wire.chunks(buffers, 0, Limits().chunk_bytes)
        self.parts = [pb.UploadPart(chunk=chunk).SerializeToString() for chunk in parts]


@dataclass
class Mock:
    """One client. `uploads_s` are the seconds of each of its uploads, from its first byte to the answer."""

    address: str
    name: str
    payload: Payload
    uploads_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        own = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(self.address, options=[*channel_options(Limits()), *own])
        self._stub: Any = fedge_pb2_grpc.CoordinatorStub(self._channel)  # type: ignore[no-untyped-call]
        self._sender = pb.Sender(client=self.name, incarnation=secrets.token_hex(8))
        self._upload = self._channel.stream_unary(f"{_SERVICE}/Upload", response_deserializer=pb.UploadReply.FromString)
        self._download = self._channel.unary_stream(
            f"{_SERVICE}/Download", request_serializer=pb.DownloadRequest.SerializeToString
        )

    async def join(self) -> None:
        """Become a member."""
        request = pb.JoinRequest(sender=self._sender, protocol=wire.PROTOCOL, examples=10)
        await self._stub.Join(request, timeout=_TIMEOUT_S)

    async def work(self) -> None:
        """Tasks until the run is finished."""
        async for offer in self._stub.Tasks(pb.TasksRequest(sender=self._sender), timeout=_TIMEOUT_S):
            if offer.WhichOneof("offer") == "finished":
                return
            if offer.WhichOneof("offer") == "task":
                await self._take(offer.task.version)
                await self.send(offer.task)

    async def task(self) -> pb.Task:
        """The next task that it is offered."""
        call = self._stub.Tasks(pb.TasksRequest(sender=self._sender), timeout=_TIMEOUT_S)
        async for offer in call:
            if offer.WhichOneof("offer") == "task":
                call.cancel()
                task: pb.Task = offer.task
                return task
        raise RuntimeError("the run ended before there was a task")

    async def send(self, task: pb.Task) -> None:
        """The update of a task."""
        begin = pb.UploadBegin(
            sender=self._sender, task_id=task.id, base_version=task.version, steps=task.steps, examples=10,
            manifest=self.payload.manifest,
        )  # fmt: skip
        begun = time.perf_counter()
        await self._upload(self._parts(begin), timeout=_TIMEOUT_S)
        self.uploads_s.append(time.perf_counter() - begun)

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close()

    async def _take(self, version: int) -> None:
        async for _ in self._download(pb.DownloadRequest(sender=self._sender, version=version), timeout=_TIMEOUT_S):
            pass

    async def _parts(self, begin: pb.UploadBegin) -> AsyncIterator[bytes]:
        yield pb.UploadPart(begin=begin).SerializeToString()
        for part in self.payload.parts:
            yield part


async def joined(mocks: list[Mock]) -> None:
    """All of them members, some at a time."""
    gate = asyncio.Semaphore(_PARALLEL_JOINS)

    async def one(mock: Mock) -> None:
        async with gate:
            await mock.join()

    await asyncio.gather(*(one(mock) for mock in mocks))
