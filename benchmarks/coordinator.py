"""The coordinator on loopback, journal on: how long a round takes, how fast updates come in, what memory it needs.

The coordinator is a process of its own with its state folder on disk; the mock clients of `mock_clients.py` are
coroutines of this one. Uploads are compared with a bare gRPC client stream that takes the same chunks and does nothing
with them.
"""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.coordinator_process import memory_of
from benchmarks.harness import Goal, arguments, emit, goal
from benchmarks.mock_clients import Mock, Payload, joined
from fedge.protos import fedge_pb2 as pb

MIB = 1 << 20
FLOAT_BYTES = 4
SAMPLE_S = 0.02
ANON, FILE = "RssAnon", "RssFile"
_PATIENCE_S = 600.0
FLOWER_ROUND_S = 6.1  # its deployment engine, two SuperNodes on loopback, the same 1 MiB model; it polls every 3 s


@dataclass(frozen=True)
class Plan:
    """Sizes of the parts; models in MiB."""

    rounds: int
    upload_mib: int
    uploads: int
    memory_mib: int
    memory_clients: int
    idle_clients: int
    idle_s: float


FULL = Plan(rounds=60, upload_mib=100, uploads=6, memory_mib=100, memory_clients=50, idle_clients=1000, idle_s=10.0)
QUICK = Plan(rounds=10, upload_mib=16, uploads=4, memory_mib=16, memory_clients=8, idle_clients=50, idle_s=2.0)


# ---- the process under test ---------------------------------------------------------------------


@dataclass
class Server:
    """A process that listens. `empty` is its memory before there was a model; `anon`, `file` the peaks seen so far."""

    process: asyncio.subprocess.Process
    empty: dict[str, int]
    address: str
    anon: int = 0
    file: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def memory(self) -> dict[str, int]:
        """Of the process, now."""
        return memory_of(self.process.pid)

    def cpu_s(self) -> float:
        """Processor seconds of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def watch(self) -> None:
        """Note the peaks, for ever."""
        while True:
            now = self.memory()
            self.anon, self.file = max(self.anon, now["RssAnon"]), max(self.file, now["RssFile"])
            await asyncio.sleep(SAMPLE_S)

    async def line(self) -> dict[str, Any]:
        """The next line it prints."""
        text = await self.process.stdout.readline() if self.process.stdout else b""
        if not text:
            raise SystemExit("The process under test has ended; what it wrote is above.")
        return dict(json.loads(text))


@asynccontextmanager
async def started(**plan: Any) -> AsyncIterator[Server]:
    """A coordinator of this plan, in a state folder that goes with it; without a plan, the bare server."""
    with tempfile.TemporaryDirectory(prefix="fedge-benchmark-") as folder:
        full = {**plan, "state": folder} if plan else {}
        command = [sys.executable, "-m", "benchmarks.coordinator_process", json.dumps(full)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        server = Server(process, {}, "")
        try:
            server.empty = (await server.line())["memory"]
            server.address = (await server.line())["address"]
            yield server
        finally:
            for task in server.tasks:
                task.cancel()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def closed(mocks: list[Mock]) -> None:
    """All hung up."""
    await asyncio.gather(*(mock.close() for mock in mocks))


# ---- the parts ----------------------------------------------------------------------------------


async def rounds(plan: Plan) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Synchronous rounds of 10 clients with a 1 MiB model."""
    size, clients = MIB // FLOAT_BYTES, 10
    async with started(clients=clients, size=size, versions=plan.rounds) as server:
        mocks = [Mock(server.address, f"device-{number}", Payload(size)) for number in range(clients)]
        await joined(mocks)
        await asyncio.gather(*(mock.work() for mock in mocks))
        moments = (await server.line())["aggregated_s"]
        await closed(mocks)
    steps = sorted(after - before for before, after in pairwise(moments))
    middle = median(steps)
    rows = [
        {"what": "median round, 10 clients, 1 MiB", "value": round(middle * 1e3, 1), "unit": "ms"},
        {"what": "slowest round in ten", "value": round(steps[int(0.9 * len(steps))] * 1e3, 1), "unit": "ms"},
        {
            "what": "Flower's deployment engine, 2 clients, 1 MiB",
            "value": FLOWER_ROUND_S * 1e3,
            "unit": "ms",
            "note": "measured before, not in this run",
        },
    ]
    return rows, [goal("median round, 10 clients, 1 MiB (ms)", middle * 1e3, "< 100")]


async def uploads(plan: Plan) -> tuple[list[dict[str, Any]], list[Goal]]:
    """One large update after the other, into the coordinator and into the bare stream in turns."""
    size = plan.upload_mib * MIB // FLOAT_BYTES
    payload = Payload(size)
    # One client more than uploads, which never answers: closing a round is not part of an upload. Those that wait for
    # their turn have no stream open, and are not to be taken for gone.
    whole_run = {"clients": plan.uploads + 1, "size": size, "versions": 1, "liveness_s": _PATIENCE_S}
    async with started(**whole_run) as server, started() as floor:
        bare = Mock(floor.address, "bare", payload)
        await bare.send(pb.Task())  # once for the connection
        mocks = [Mock(server.address, f"device-{number}", payload) for number in range(plan.uploads + 1)]
        await joined(mocks)
        pairs = []
        for mock in mocks[:-1]:
            await mock.send(await mock.task())
            await bare.send(pb.Task())
            pairs.append((mock.uploads_s[-1], bare.uploads_s[-1]))
        await closed([*mocks, bare])
    taken, floor_s = (median(column) for column in zip(*pairs))
    share = median(other / mine for mine, other in pairs)
    whole = plan.upload_mib * MIB
    rows = [
        {"what": f"updates in, {plan.upload_mib} MiB each", "value": round(whole / taken / 1e6), "unit": "MB/s"},
        {"what": "bare gRPC client stream", "value": round(whole / floor_s / 1e6), "unit": "MB/s"},
    ]
    return rows, [goal("updates in over a bare gRPC stream", share, ">= 0.6")]


async def memory(plan: Plan) -> tuple[list[dict[str, Any]], list[Goal]]:
    """The peak over one whole round in which all clients come and go at once."""
    size, clients = plan.memory_mib * MIB // FLOAT_BYTES, plan.memory_clients
    payload, model = Payload(size), plan.memory_mib * MIB
    async with started(clients=clients, size=size, versions=2) as server:
        idle = server.memory()
        server.tasks.append(asyncio.create_task(server.watch()))
        mocks = [Mock(server.address, f"device-{number}", payload) for number in range(clients)]
        await joined(mocks)
        await asyncio.gather(*(mock.work() for mock in mocks))
        await server.line()
        peak = server.memory()["VmHWM"]
        await closed(mocks)
    anon, mapped = ((seen - server.empty[kind]) / model for seen, kind in ((server.anon, ANON), (server.file, FILE)))
    resting = sum(idle[kind] - server.empty[kind] for kind in (ANON, FILE)) / model
    whole = (peak - server.empty[ANON] - server.empty[FILE]) / model
    rows = [
        {"what": f"its own memory at the peak, {clients} clients, {plan.memory_mib} MiB", "value": round(anon, 2)},
        {"what": "pages of update files mapped for reading, which the system may take back", "value": round(mapped, 2)},
        {"what": "both, as the kernel's high-water mark has it", "value": round(whole, 2)},
        {"what": "idle, with its model", "value": round(resting, 2)},
    ]
    name = "peak of its own memory beyond a coordinator without a model (models)"
    return [{**one, "unit": "models"} for one in rows], [goal(name, anon, "<= 4")]


async def fleet(plan: Plan) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Many clients connected and idle, and then one round of them all."""
    size, clients = MIB // FLOAT_BYTES, plan.idle_clients
    payload = Payload(size)
    async with started(clients=clients + 1, size=size, versions=1) as server:
        mocks = [Mock(server.address, f"device-{number:04d}", payload) for number in range(clients + 1)]
        begun = time.perf_counter()
        await joined(mocks[:-1])
        joining_s = time.perf_counter() - begun
        working = [asyncio.create_task(mock.work()) for mock in mocks[:-1]]
        await asyncio.sleep(2.0)
        before = server.cpu_s()
        await asyncio.sleep(plan.idle_s)
        idle_cpu = (server.cpu_s() - before) / plan.idle_s
        idle = server.memory()
        begun = time.perf_counter()
        await joined(mocks[-1:])
        await asyncio.gather(mocks[-1].work(), *working)
        round_s = time.perf_counter() - begun
        peak = server.memory()["VmHWM"]
        await closed(mocks)
    rss = idle["RssAnon"] + idle["RssFile"]
    figures = [
        (f"{clients} clients join", round(joining_s, 2), "s"),
        ("their idle streams: processor", round(100 * idle_cpu, 1), "% of a core"),
        ("their idle streams: memory", round(rss / MIB), "MiB"),
        ("one round of them all, 1 MiB each way", round(round_s, 2), "s"),
        ("peak memory in that round", round(peak / MIB), "MiB"),
    ]
    return [{"what": what, "value": value, "unit": unit} for what, value, unit in figures], []


async def measure(plan: Plan) -> tuple[list[dict[str, Any]], list[Goal]]:
    """All parts, one after the other."""
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    for part in (rounds, uploads, memory, fleet):
        more, another = await part(plan)
        rows += more
        goals += another
    return rows, goals


def main() -> None:
    options = arguments(str(__doc__).splitlines()[0])
    rows, goals = asyncio.run(measure(QUICK if options.quick else FULL))
    emit("coordinator", rows, goals, as_json=options.json)


if __name__ == "__main__":
    main()
