"""One rank of fedge as a process of its own, and the group of such processes that the language benchmark measures.

A rank opens its shard once; then every line of its standard input is a run: ranks meet, rank 0 answers one prompt and
prints what that took. A device can be made slower than this machine: its products then take the time they would take
there, by waiting. Owns the way from a shard to seconds per token. Must never choose what is measured.
"""

import contextlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from select import select
from typing import Any, cast

import msgspec
import numpy as np

from benchmarks.llm_processes import Process, watch
from benchmarks.llm_profile import Clock, Timed
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.compute import kernels
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.compute.window import Window
from fedge.edge.llm.mesh.mesh import Alone, Mesh, connect
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Part, Step
from fedge.edge.llm.ranks.worker import serve_steps
from fedge.edge.llm.shards.quant import Kind, Matrix
from fedge.edge.llm.shards.shard import open_shard

LIMITS = LlmLimits(connect_timeout_s=120.0, step_timeout_s=120.0)  # under a cap, ranks are not ready at the same time
WARM_TOKENS = 8
END_S = 30.0


class Opening(msgspec.Struct, frozen=True):
    """What a rank is started with. `memory_bytes` 0: all weights in memory, else a window, which reads past the cache
    where `direct` says so, and None lets it choose. `weights_per_s` 0: as fast as it is.
    """

    shard: str
    rank: int
    listener: int  # file descriptor
    kernel: str
    memory_bytes: int = 0
    direct: bool | None = None
    weights_per_s: float = 0.0
    context: int = 256
    profile: bool = False


class Run(msgspec.Struct, frozen=True):
    """One answer. `addresses` are those that this rank uses for the ranks below it."""

    epoch: int
    key: str
    addresses: tuple[str, ...]
    prompt: tuple[int, ...]
    tokens: int


class Taken(msgspec.Struct, frozen=True):
    """What a run took. The first token comes with the prompt; `token_s` are those after it."""

    ttft_s: float
    token_s: tuple[float, ...]
    ids: tuple[int, ...]
    rtt_s: float = 0.0
    bandwidth_bps: float = 0.0
    parts: dict[str, tuple[float, float]] = {}  # seconds per token that passed and were worked, if profiled


class Waiting:
    """Waits so that work takes as long as on a device that multiplies `weights_per_s`; what is too long is made up."""

    def __init__(self, weights_per_s: float) -> None:
        self._weights_per_s, self._ahead_s = weights_per_s, 0.0

    def kernel(self, fast: kernels.Kernel) -> kernels.Kernel:
        """`fast` with the slower device's times."""

        def make(matrix: Matrix) -> kernels.Linear:
            multiply, weights = fast.make(matrix), matrix.rows * matrix.columns

            def linear(x: Array) -> Array:
                begun = time.perf_counter()
                y = multiply(x)
                self._wait(begun + len(x) * weights / self._weights_per_s)
                return y

            return linear

        return kernels.Kernel(fast.name, fast.kind, fast.streams, fast.invariant, make, fast.available)

    def _wait(self, until: float) -> None:
        pause_s = until - time.perf_counter() + self._ahead_s
        if pause_s > 0:
            time.sleep(pause_s)
        self._ahead_s = max(-1e-3, until - time.perf_counter() + self._ahead_s)


def answer(model: Model, run: Run, clock: Clock) -> Taken:
    """A short text first, unmeasured, then the prompt and greedy tokens."""
    warm = run.prompt[:WARM_TOKENS]
    model.run(Step((Part(0, 0, len(warm)),), free=(0,)), np.array(warm))
    model.run(Step((Part(0, len(warm), 1),)), np.array(warm[:1]))
    begun = time.perf_counter()
    logits = model.run(Step((Part(0, 0, len(run.prompt)),), free=(0,)), np.array(run.prompt))
    ids = [int(logits[0].argmax())]
    times = [time.perf_counter()]
    clock.start()
    for at in range(len(run.prompt), len(run.prompt) + run.tokens - 1):
        logits = model.run(Step((Part(0, at, 1),)), np.array(ids[-1:]))
        ids.append(int(logits[0].argmax()))
        times.append(time.perf_counter())
    seconds = tuple(float(one) for one in np.diff(times))
    return Taken(times[0] - begun, seconds, tuple(ids), parts=clock.stop(len(seconds)))


def choose(kind: Kind, *, streamed: bool, shape: tuple[int, int], seconds: float) -> str:
    """The kernel for this machine, chosen by a process of its own, whose memory is not a rank's."""
    command = [sys.executable, "-m", __name__, "choose", kind, str(int(streamed)), *map(str, shape), str(seconds)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


class Crew:
    """The ranks of one group, each a process. `limit_bytes` is for each."""

    def __init__(self, openings: Sequence[Opening], *, limit_bytes: int | None = None) -> None:
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in openings]
        self.addresses = tuple(f"127.0.0.1:{one.getsockname()[1]}" for one in self._listeners)
        self.processes: list[Process] = []
        self._epoch = 0
        try:
            for opening, listener in zip(openings, self._listeners):
                number = listener.fileno()
                told = msgspec.json.encode(msgspec.structs.replace(opening, listener=number)).decode()
                arguments = ["rank", told]
                self.processes.append(Process(__name__, arguments, limit_bytes=limit_bytes, inherited=[number]))
        except BaseException:
            self.close()
            raise

    def order(
        self, prompt: Sequence[int], tokens: int, addresses: Callable[[int], Sequence[str]] | None = None
    ) -> None:
        """Tell all to run. `addresses` gives what a rank uses, by rank; None means the true ones."""
        self._epoch += 1
        key = secrets.token_hex(16)
        for rank, process in enumerate(self.processes):
            own = tuple(addresses(rank)) if addresses else self.addresses
            assert process.popen.stdin
            with contextlib.suppress(BrokenPipeError):  # its end shows soon enough
                process.popen.stdin.write(
                    msgspec.json.encode(Run(self._epoch, key, own, tuple(prompt), tokens)).decode()
                )
                process.popen.stdin.write("\n")
                process.popen.stdin.flush()

    def taken(self, timeout_s: float) -> Taken:
        """What the last run took. Raises RuntimeError where there is no result in time, with the reason."""
        output = self.processes[0].popen.stdout
        assert output
        ready, _, _ = select([output], [], [], timeout_s)
        line = output.readline() if ready else ""
        if not line:
            raise RuntimeError(self.fate(timeout_s))
        return msgspec.json.decode(line, type=Taken)

    def end(self, timeout_s: float) -> Taken:
        """Wait for the only run, looking at memory all the time."""
        for process in self.processes:
            assert process.popen.stdin
            with contextlib.suppress(BrokenPipeError):
                process.popen.stdin.close()
        watch(self.processes, timeout_s)
        return self.taken(END_S)

    def fate(self, timeout_s: float) -> str:
        """Why there is no result."""
        watch(self.processes, 1.0)
        fates = [process.fate for process in self.processes if not process.running]
        killed = [one for one in fates if one.startswith("killed")]
        return (killed or fates or [f"took more than {timeout_s:.0f} s"])[0]

    def close(self) -> None:
        """End all."""
        for process in self.processes:
            process.close()
        for listener in self._listeners:
            listener.close()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _runs() -> Iterator[Run]:
    for line in sys.stdin:
        yield msgspec.json.decode(line, type=Run)


def _blocks(opening: Opening) -> tuple[Any, Any]:
    shard = open_shard(Path(opening.shard))
    kernel = kernels.named(opening.kernel, shard.kind)
    if opening.weights_per_s:
        kernel = Waiting(opening.weights_per_s).kernel(kernel)
    if opening.memory_bytes and opening.memory_bytes < sum(block.bytes for block in shard.blocks):
        return shard, Window(shard, kernel, opening.memory_bytes, opening.direct, limits=LIMITS)
    return shard, Resident(shard, kernel)


def rank(opening: Opening) -> None:
    """The child."""
    clock = Clock()
    shard, blocks = _blocks(opening)
    if opening.profile:
        blocks = Timed(blocks, clock)
    listener = socket.socket(fileno=opening.listener)
    for run in _runs():
        mesh: Any = Alone()
        if shard.ranks > 1:
            key = bytes.fromhex(run.key)
            mesh = connect(shard.rank, shard.ranks, run.addresses, key, run.epoch, listener=listener, limits=LIMITS)
        group = clock.mesh(mesh) if opening.profile else mesh
        if shard.rank:
            worker = Rank(shard, blocks, group, slots=1, context=opening.context, limits=LIMITS)
            serve_steps(worker, mesh)
        else:
            model = Model(shard, blocks, group, slots=1, context=opening.context, limits=LIMITS)
            taken = answer(model, run, clock)
            if isinstance(mesh, Mesh) and mesh.speed:
                speed = mesh.speed
                taken = msgspec.structs.replace(taken, rtt_s=speed.round_trip_s, bandwidth_bps=speed.bandwidth_bps)
            print(msgspec.json.encode(taken).decode(), flush=True)
            mesh.send_step(None)
        mesh.close()
    blocks.close()


def main(what: str, *more: str) -> None:
    """`rank OPENING`, or `choose KIND STREAMED ROWS COLUMNS SECONDS`, which prints a kernel's name."""
    if what == "rank":
        rank(msgspec.json.decode(more[0], type=Opening))
        return
    kind, streamed, rows, columns, seconds = more
    shape = int(rows), int(columns)
    found = kernels.choose(cast("Kind", kind), streamed=streamed == "1", shape=shape, seconds=float(seconds))
    print(found.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
