"""What a worker does in one epoch: fetch its shard, open it, wait for the start, compute until the group ends.

A thread of its own; it reports once when it is ready and once when it is over, and has given all memory back by then.
Must never talk to the head in another way, nor begin before the last epoch's work has ended.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedge.core.errors import FedgeError, ModelError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group.blocks import open_blocks
from fedge.edge.llm.group.download import Fetch, download
from fedge.edge.llm.group.messages import clip, join_host
from fedge.edge.llm.group.store import Store
from fedge.edge.llm.mesh.mesh import Mesh, connect
from fedge.edge.llm.mesh.security import Tls
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.worker import serve_steps
from fedge.edge.llm.shards.planner import FLOAT_BYTES
from fedge.edge.llm.shards.shard import Shard, open_shard
from fedge.protos import llm_pb2 as pb

log = logging.getLogger("fedge")
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Self:
    """What of a worker stays the same from epoch to epoch. `identity` (certificate, key) is for groups with TLS."""

    store: Store
    listener: socket.socket
    identity: tuple[str, str] | None = field(repr=False)
    kernel: str | None
    limits: LlmLimits


class Work:
    """One epoch. `tell` takes reports for the head; `host` is where the head was found; `before` is ended first."""

    def __init__(
        self,
        load: pb.Load,
        own: Self,
        fetch: Fetch,
        host: str,
        tell: Callable[[pb.Report], None],
        before: "Work | None",
    ) -> None:
        self.epoch = load.epoch
        self._load, self._own, self._fetch, self._host, self._tell = load, own, fetch, host, tell
        self._before = before
        self._stopping, self._started = threading.Event(), threading.Event()
        self._mesh: Mesh | None = None
        self._call: Any = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"fedge-epoch-{self.epoch}", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """All ranks are ready."""
        self._started.set()

    def end(self) -> None:
        """Stop soon; does not wait."""
        self._stopping.set()
        with self._lock:
            if self._mesh is not None:
                self._mesh.close()
            if self._call is not None:
                self._call.cancel()

    def join(self, timeout_s: float) -> bool:
        """Whether it is over within this time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        rank, detail = -1, ""
        try:
            self._end_before()
            self._work()
        except RankLost as error:
            rank, detail = error.rank, str(error)
        except FedgeError as error:
            detail = str(error)
        except Exception as error:  # the head must not wait for a thread that is dead
            log.exception("The work of epoch %d failed", self.epoch)
            detail = f"The device failed ({type(error).__name__}); see its log."
        if detail and not self._stopping.is_set():
            log.warning("Epoch %d is over: %s", self.epoch, detail)
        self._tell(pb.Report(broken=pb.Broken(epoch=self.epoch, rank=rank, detail=clip(detail))))

    def _end_before(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            before.end()
            if not before.join(self._own.limits.step_timeout_s + self._own.limits.connect_timeout_s):
                raise ModelError("The device still computes for the last group; start it again.")

    def _work(self) -> None:
        limits, load = self._own.limits, self._load
        shard = self._shard()
        with contextlib.ExitStack() as opened:
            blocks = open_blocks(shard, load.memory_bytes, limits, self._own.kernel, invariant=load.invariant)
            opened.callback(blocks.close)
            self._tell(pb.Report(ready=pb.Ready(epoch=self.epoch)))
            while not self._started.wait(_POLL_S):
                if self._stopping.is_set():
                    raise RankLost("The epoch ended before it began.")
            mesh = opened.enter_context(self._connect(shard.config.hidden))
            rank = Rank(shard, blocks, mesh, slots=load.slots, context=load.context, limits=limits)
            opened.callback(rank.close)
            serve_steps(rank, mesh)

    def _shard(self) -> Shard:
        """Its shard, which is fetched a second time where it cannot be opened."""
        load, store, limits = self._load, self._own.store, self._own.limits
        for last in (False, True):
            path = download(store, self._begin, load.digest, load.bytes, self._stopping, limits)
            try:
                return self._fitting(path)
            except ModelError:
                store.drop(load.digest)
                if last:
                    raise
        raise AssertionError("unreachable")

    def _begin(self, request: pb.FetchRequest) -> Any:
        """A call that `end` cancels."""
        with self._lock:
            self._call = self._fetch(request)
            return self._call

    def _fitting(self, path: Path) -> Shard:
        shard = open_shard(path, self._own.limits)
        if (shard.rank, shard.ranks) != (self._load.rank, len(self._load.peers)):
            raise ModelError(f"The shard is of rank {shard.rank} of {shard.ranks}; start the head again.")
        return shard

    def _connect(self, hidden: int) -> Mesh:
        load, own = self._load, self._own
        tls = None
        if own.identity is not None:
            tls = Tls(*own.identity, tuple(peer.certificate for peer in load.peers))
        addresses = [join_host(peer.address, self._host) for peer in load.peers]
        mesh = connect(
            load.rank,
            len(addresses),
            addresses,
            load.key,
            load.epoch,
            listener=own.listener,
            limits=own.limits,
            tls=tls,
            collective=load.collective or None,
            exact_bytes=FLOAT_BYTES * hidden,
        )
        with self._lock:
            self._mesh = mesh
            if self._stopping.is_set():
                mesh.close()
        return mesh
