"""The ranks of one group as one of them sees them: sums over all, and steps from rank 0 to the others.

Owns the connections of one epoch. A mesh that has lost a rank is closed as a whole, so that the others find out at
once; the next epoch's is made anew. Must never know what a layer is, nor connect again by itself.
"""

import os
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from typing import Self

import numpy as np

from fedge.core.errors import RankLost
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.mesh.collectives import COLLECTIVES, INT8_SUMS, Collective, Group, choose, named
from fedge.edge.llm.mesh.frames import END, FLOAT32, PROBE, STEP, Link, take_turns
from fedge.edge.llm.mesh.handshake import Party, meet
from fedge.edge.llm.mesh.links import LinkSpeed, measure
from fedge.edge.llm.mesh.security import Tls
from fedge.edge.llm.mesh.wires import POLLS, Plain, Secure, Wire, prepare
from fedge.edge.llm.ranks import step as steps
from fedge.edge.llm.ranks.step import Step

_SHAPE = struct.Struct("<III")  # bytes of the step, rows and columns of x


class Alone:
    """The mesh of one rank."""

    rank, size = 0, 1
    sent_bytes = 0
    speed: LinkSpeed | None = None

    def allreduce(self, x: Array) -> Array:
        """The sum over one rank."""
        return x

    def send_step(self, step: Step | None, x: Array | None = None) -> None:
        """There is nobody to tell."""

    def receive_step(self) -> tuple[Step, Array] | None:
        """There is nobody to wait for."""
        return None

    def close(self) -> None:
        """Nothing is open."""


class Mesh:
    """See `connect`. One thread uses it; `close` may come from any. Raises RankLost, and is closed afterwards.

    The `rank` of a RankLost is the one that was waited for: where several are gone, not always the one that died first.
    """

    def __init__(self, group: Group, limits: LlmLimits) -> None:
        self.rank, self.size = group.rank, group.size
        self.speed: LinkSpeed | None = None
        self._group, self._limits = group, limits
        self._collective: str | None = None
        self._exact_bytes = 0
        self._chosen: dict[int, Collective] = {}

    def begin(self, due_at: float, collective: str | None, exact_bytes: int) -> None:
        """Wait until all have met all, and measure all links; see `connect`."""
        try:
            _all_here(self._group.others, due_at)
            if self.size > 1:
                self.speed = measure(self._group)
        except RankLost:
            self.close()
            raise
        self._collective, self._exact_bytes = collective, exact_bytes

    def allreduce(self, x: Array) -> Array:
        """The sum of all ranks' `x` [any shape] float32, the same bits on all; `x` is overwritten and returned.

        Where `x` cannot be overwritten, or is not C-contiguous float32, the sum is in a new array.
        """
        if not (x.flags.carray and x.dtype == np.float32):
            x = np.array(x, np.float32, order="C")
        if not x.size:
            return x
        try:
            return (self._chosen.get(x.nbytes) or self._choose(x.nbytes))(self._group, x)
        except RankLost:
            self.close()
            raise

    @property
    def sent_bytes(self) -> int:
        """By this rank to all others, so far."""
        return sum(link.sent_bytes for link in self._group.others)

    def send_step(self, step: Step | None, x: Array | None = None) -> None:
        """From rank 0 to all: a step with its embeddings [tokens, hidden] float32; None is the orderly end.

        The end raises nothing: who cannot be told sees the connection end.
        """
        try:
            if step is None or x is None:
                self._post(END, memoryview(b""), b"")
                return
            x = np.ascontiguousarray(x, np.float32)
            told = steps.encode(step, self._limits)
            flat = x.data.cast("B") if x.size else memoryview(b"")
            self._post(STEP, flat, _SHAPE.pack(len(told), *x.shape) + told)
        except RankLost:
            self.close()
            if step is not None:
                raise

    def receive_step(self) -> tuple[Step, Array] | None:
        """The next step of rank 0 and its embeddings, in a new array; None at the end. Waits as long as it takes."""
        try:
            head = self._group.links[0]
            head.idle()
            data = head.receive()
            if head.kind == END:
                return None
            if head.kind != STEP:
                raise head.broken(f"a frame of kind {head.kind} instead of a step")
            return self._step(head, data)
        except RankLost:
            self.close()
            raise

    def close(self) -> None:
        """End all connections, and wake who waits on them."""
        for link in self._group.links.values():
            link.wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _choose(self, bytes_: int) -> Collective:
        name = self._collective
        if name is None or (name == INT8_SUMS and bytes_ <= self._exact_bytes):
            speed = self.speed
            name = "full" if speed is None else choose(self.size, speed.round_trip_s, speed.bandwidth_bps, bytes_)
        self._chosen[bytes_] = COLLECTIVES[name]
        return self._chosen[bytes_]

    def _post(self, kind: int, payload: memoryview, prefix: bytes) -> None:
        stuck = [link for link in self._group.others if not link.post(kind, FLOAT32, payload, prefix)]
        if stuck:
            take_turns(stuck)

    def _step(self, head: Link, data: Array) -> tuple[Step, Array]:
        if data.size < _SHAPE.size:
            raise head.broken("a step without its beginning")
        size, rows, columns = _SHAPE.unpack_from(data.data)
        at = _SHAPE.size + size
        if data.size != at + 4 * rows * columns:
            raise head.broken(f"{data.size} bytes are not a step of {size} and {rows} x {columns} values")
        step = steps.decode(data[_SHAPE.size : at].tobytes(), self._limits)
        if step.tokens != rows:
            raise head.broken(f"{rows} embeddings for {step.tokens} tokens")
        x = np.empty((rows, columns), np.float32)
        x.reshape(-1).view(np.uint8)[:] = data[at:]
        return step, x


def connect(
    rank: int,
    size: int,
    addresses: Sequence[str],
    key: bytes,
    epoch: int,
    *,
    listener: socket.socket,
    limits: LlmLimits,
    tls: Tls | None = None,
    collective: str | None = None,
    exact_bytes: int = 0,
) -> Mesh:
    """Meet all other ranks of this epoch: those below `rank` at `addresses` ("host:port"), those above on `listener`.

    `key` is the session's secret (>= 16 bytes). Without `tls` all must be on loopback. `collective` names one of
    COLLECTIVES; None chooses by size and the links' speeds, and so does "int8" for sums of at most `exact_bytes`, which
    are not rounded. Both must be the same on all ranks. `listener` stays open, with another timeout. Raises
    RankLost naming who has not come within `connect_timeout_s` or is lost while links are measured, and
    ExperimentError for what can never work.
    """
    if collective is not None:
        named(collective)
    due_at = time.monotonic() + limits.connect_timeout_s
    sockets = meet(Party(rank, size, addresses, key, epoch, tls, due_at), listener, limits)
    mesh = Mesh(Group(rank, size, _links(sockets, epoch, limits)), limits)
    mesh.begin(due_at, collective, exact_bytes)
    return mesh


def _links(sockets: dict[int, socket.socket], epoch: int, limits: LlmLimits) -> dict[int, Link]:
    links, silence_s = {}, limits.step_timeout_s
    polls = POLLS if len(sockets) < (os.cpu_count() or 1) else 0
    for peer, sock in sorted(sockets.items()):
        try:
            prepare(sock, silence_s)
            wire: Wire = Secure(sock, silence_s) if isinstance(sock, ssl.SSLSocket) else Plain(sock, silence_s, polls)
        except OSError as error:
            for one in sockets.values():
                one.close()
            raise RankLost(f"Rank {peer} is gone already ({error}); see that its device runs.", peer) from error
        links[peer] = Link(peer, wire, epoch, limits)
    return links


def _all_here(links: Sequence[Link], due_at: float) -> None:
    """Wait until every rank has met all others, which may take longer than a rank may be silent in a step."""
    for link in links:
        link.post(PROBE, FLOAT32)
    for link in links:
        if not link.idle(due_at - time.monotonic()):
            raise link.late()
        link.receive((PROBE, FLOAT32, 0))
