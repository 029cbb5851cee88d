"""A device's end of the service Continue, as small as can be, and the halves of a small model."""

import queue
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fedge.core.params import Array
from fedge.edge.llm.collab import wire
from fedge.edge.llm.collab.wire import Told, Verify, Want
from fedge.edge.llm.mesh.security import SERVER_NAME, Ticket
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Part, Step
from fedge.edge.llm.shards.shard import export, open_shard
from fedge.edge.llm.shards.shares import even
from fedge.protos import llm_pb2 as pb
from tests.llm_fixture import folder
from tests.llm_ranks import Plain, Room, ThreadMesh
from tests.llm_reference import logits

LAYER, LAYERS = 2, 4
KERNEL = "numpy-rows-float32"
WAIT_S = 20.0


@dataclass(frozen=True)
class Halves:
    """A model of random weights, cut at LAYER. `states` are what the lower half gives."""

    whole: Path
    cloud: Path
    lower: Rank
    embed: Any
    digest: str

    def states(self, ids: Sequence[int]) -> Array:
        step = Step((Part(0, 0, len(ids)),), free=(0,))
        return self.lower.forward(step, self.embed(np.array(ids)))

    def greedy(self, ids: Sequence[int]) -> list[int]:
        """The token after each position."""
        return [int(token) for token in logits(self.whole, list(ids)).argmax(1)]


def halves(tmp: Path, **more: Any) -> Halves:
    path = folder(tmp, layers=LAYERS, **more)
    with open_folder(path) as opened:
        shares = even(opened.config, 1)
        lower = open_shard(export(opened, tmp, shares, "float32", layers=(0, LAYER))[0])
        upper = export(opened, tmp, shares, "float32", layers=(LAYER, LAYERS))[0]
        digest = opened.digest
    rank = Rank(lower, Plain(lower), ThreadMesh(Room(1), 0), slots=1, context=256)
    return Halves(path, upper, rank, lower.embed, digest)


class Line:
    """One stream. What is told is kept in order."""

    def __init__(self, address: str, model: str, *, client: str = "", layer: int = LAYER, ticket: Ticket | None = None):
        self.client = client or secrets.token_hex(16)
        self._channel = channel(address, ticket)
        self._out: queue.Queue[bytes | None] = queue.Queue()
        self.told: queue.Queue[Told | grpc.RpcError | None] = queue.Queue()
        talk = self._channel.stream_stream(f"/{wire.SERVICE}/Talk", None, wire.told)
        token = ticket.token if ticket else ""
        self._call = talk(iter(self._out.get, None), metadata=wire.metadata(self.client, model, layer, token))
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        self._ids = 0

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self._out.put(message)

    def put(self, session: str, start: int, x: Array, coding: wire.Coding = "f32") -> None:
        self.send(*wire.states(session, start, x, coding))

    def want(self, session: str, position: int, deadline_s: float = WAIT_S, **more: Any) -> int:
        self._ids += 1
        self.send(wire.asked_bytes(Want(session, self._ids, position, deadline_s, **more)))
        return self._ids

    def verify(self, session: str, position: int, guesses: Sequence[int], **more: Any) -> int:
        self._ids += 1
        self.send(wire.asked_bytes(Verify(session, self._ids, position, tuple(guesses), WAIT_S, **more)))
        return self._ids

    def hear(self) -> Told:
        """The next reply; raises what ended the stream."""
        told = self.told.get(timeout=WAIT_S)
        if isinstance(told, Told):
            return told
        raise told or EOFError

    def token(self, session: str, position: int, **more: Any) -> int:
        number = self.want(session, position, **more)
        told = self.hear()
        assert (told.id, told.session, told.reason) == (number, session, "")
        return told.token

    def known(self, session: str) -> int:
        self.put(session, 0, np.empty((0, 64), np.float32))
        told = self.hear()
        assert (told.id, told.session, told.reason) == (0, session, "")
        return told.known

    def close(self) -> None:
        self._out.put(None)
        self._call.cancel()
        self._channel.close()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def finish(self) -> None:
        """Say nothing more, but listen."""
        self._out.put(None)

    def _read(self) -> None:
        try:
            for told in self._call:
                self.told.put(told)
            self.told.put(None)
        except grpc.RpcError as error:
            self.told.put(error)


def channel(address: str, ticket: Ticket | None = None) -> grpc.Channel:
    options: list[tuple[str, Any]] = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    if ticket is None:
        return grpc.insecure_channel(address, options)
    trusted = grpc.ssl_channel_credentials(root_certificates=ticket.certificate.encode())
    return grpc.secure_channel(address, trusted, [*options, ("grpc.ssl_target_name_override", SERVER_NAME)])


def meet(
    address: str, model: str, layer: int = LAYER, protocol: int = wire.PROTOCOL, ticket: Ticket | None = None
) -> Any:
    request = pb.MeetRequest(protocol=protocol, model=model, layer=layer)
    with channel(address, ticket) as opened:
        call = opened.unary_unary(f"/{wire.SERVICE}/Meet", pb.MeetRequest.SerializeToString, pb.MeetReply.FromString)
        return call(request, timeout=WAIT_S, metadata=[(wire.TOKEN, ticket.token if ticket else "")])


@contextmanager
def line(address: str, model: str, **more: Any) -> Iterator[Line]:
    opened = Line(address, model, **more)
    try:
        yield opened
    finally:
        opened.close()
