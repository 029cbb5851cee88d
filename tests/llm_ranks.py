"""Ranks as threads of one process: shards of a folder, weights dequantised in memory, sums through a barrier."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedge.core.params import Array
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Part, Step, decode, encode
from fedge.edge.llm.ranks.worker import serve_steps
from fedge.edge.llm.shards.quant import Matrix
from fedge.edge.llm.shards.shard import BlockSpec, Shard, export, open_shard
from fedge.edge.llm.shards.shares import Share
from tests.llm_reference import dequantise

WAIT_S = 20.0


class Plain:
    """All blocks, dequantised once; complains where one is held twice, or taken out of turn."""

    def __init__(self, shard: Shard) -> None:
        self.views = [_linears(shard, block) for block in shard.blocks]
        self.next, self.held, self.closed = 0, -1, False

    def take(self, index: int) -> dict[str, Any]:
        assert self.held < 0
        assert index in (self.next, 0)
        self.held = index
        return self.views[index]

    def release(self, index: int) -> None:
        assert index == self.held
        self.next, self.held = (index + 1) % len(self.views), -1

    def close(self) -> None:
        self.closed = True


def _linears(shard: Shard, block: BlockSpec) -> dict[str, Any]:
    views = shard.view(block, shard.mapped[block.offset : block.offset + block.bytes])
    return {name: _linear(view) if isinstance(view, Matrix) else view for name, view in views.items()}


def _linear(matrix: Matrix) -> Any:
    weight, bias = dequantise(matrix), matrix.bias

    def apply(x: Array) -> Array:
        assert x.flags.c_contiguous
        assert x.dtype == np.float32
        assert x.shape[1] == matrix.columns
        return x @ weight.T if bias is None else x @ weight.T + bias

    return apply


class Room:
    """What the threads share."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=WAIT_S)
        self.partial: list[Array] = [np.empty(0)] * size
        self.inboxes: list[queue.Queue[tuple[bytes, Array] | None]] = [queue.Queue() for _ in range(size)]


class ThreadMesh:
    """A rank's end. Sums in rank order."""

    def __init__(self, room: Room, rank: int) -> None:
        self.rank, self.size, self._room, self.closed = rank, room.size, room, False

    def allreduce(self, x: Array) -> Array:
        self._room.partial[self.rank] = x
        self._room.barrier.wait()
        total = self._room.partial[0].copy()
        for other in self._room.partial[1:]:
            total += other
        self._room.barrier.wait()
        return total

    def send_step(self, step: Step | None, x: Array | None = None) -> None:
        for inbox in self._room.inboxes[1:]:
            inbox.put(None if step is None or x is None else (encode(step), x.copy()))

    def receive_step(self) -> tuple[Step, Array] | None:
        received = self._room.inboxes[self.rank].get(timeout=WAIT_S)
        return None if received is None else (decode(received[0]), received[1])

    def close(self) -> None:
        self.closed = True


class Recording(Rank):
    """Keeps what comes out of every pass."""

    def forward(self, step: Step, x: Array) -> Array:
        after = super().forward(step, x)
        self.__dict__.setdefault("passes", []).append(after.copy())
        return after


@contextmanager
def group(
    model: Path, out: Path, shares: Sequence[Share], kind: Any = "float32", *, slots: int = 4, context: int = 64
) -> Iterator[tuple[Model, list[Any]]]:
    """Rank 0's Model and the other ranks, which serve steps in threads of their own; all must end without a fault."""
    out.mkdir(exist_ok=True)
    with open_folder(model) as folder:
        shards = [open_shard(path) for path in export(folder, out, shares, kind)]
    room = Room(len(shards))
    meshes = [ThreadMesh(room, rank) for rank in range(len(shards))]
    lead = Model(shards[0], Plain(shards[0]), meshes[0], slots=slots, context=context)
    pairs = list(zip(shards, meshes))[1:]
    others = [Recording(shard, Plain(shard), mesh, slots=slots, context=context) for shard, mesh in pairs]
    faults: list[BaseException] = []

    def serve(rank: Recording, mesh: ThreadMesh) -> None:
        try:
            serve_steps(rank, mesh)
        except BaseException as fault:
            faults.append(fault)
            room.barrier.abort()

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(others, meshes[1:])]
    for thread in threads:
        thread.start()
    try:
        yield lead, others
    finally:
        lead.close()
        for thread in threads:
            thread.join(WAIT_S)
        for rank in others:
            rank.close()
    assert not faults
    assert all(mesh.closed for mesh in meshes)


def chunks(model: Model, ids: Sequence[int], sizes: Sequence[int], slot: int = 0) -> Array:
    """Logits [n, vocab] of all tokens, given in steps of these sizes."""
    found, start = [], 0
    for size in sizes:
        step = Step((Part(slot, start, size),), free=(slot,) if start == 0 else ())
        found.append(model.run(step, np.array(ids[start : start + size]), np.arange(size)))
        start += size
    assert start == len(ids)
    return np.concatenate(found)


def difference(got: Array, wanted: Array) -> float:
    """Largest error over the largest number."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
