"""A coordinator killed and started again on its folder: nothing acknowledged is lost, nothing counts twice."""

import asyncio
import contextlib
import json
import random
import signal
import socket
import sys
from pathlib import Path

import grpc
import pytest

from fedge.protos import fedge_pb2 as pb
from fedge.server.coordinator import replay
from fedge.server.coordinator.journal import connect, rows, snapshot
from fedge.server.coordinator.replay import resume
from fedge.server.machine.events import Record
from tests.coordinator_fixture import Peer, reason
from tests.coordinator_process import CLIENTS, POINTS, VERSIONS, federation

ROOT = Path(__file__).parent.parent
DEADLINE_S = 100


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Fleet:
    """Clients that go on through every crash, each sending some of its updates twice."""

    def __init__(self, port: int) -> None:
        self.peers = [Peer(f"127.0.0.1:{port}", f"device-{number}") for number in range(CLIENTS)]
        self.acked: list[str] = []
        self.refused: list[str] = []
        self.acks = asyncio.Event()

    async def run(self) -> None:
        await asyncio.gather(*(self._client(peer) for peer in self.peers))
        for peer in self.peers:
            await peer.channel.close()

    async def _client(self, peer: Peer) -> None:
        """Join and work until the coordinator says that the run is over."""
        joined = False
        while True:
            try:
                if not joined:
                    await peer.join()
                    joined = True
                if await self._work(peer):
                    return
            except grpc.aio.AioRpcError as error:
                joined = joined and reason(error) != "NOT_JOINED"
                self._note(error)
                await asyncio.sleep(0.05)

    async def _work(self, peer: Peer) -> bool:
        """Do what is offered; whether the run is over. Listens on while an update is being sent."""
        call = peer.offers()
        tasks: asyncio.Queue[pb.Task] = asyncio.Queue()
        sending = asyncio.create_task(self._send_all(peer, tasks))
        try:
            async for offer in call:
                if offer.WhichOneof("offer") == "finished":
                    return True
                if offer.WhichOneof("offer") == "task":
                    tasks.put_nowait(offer.task)
        finally:
            call.cancel()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        return False

    async def _send_all(self, peer: Peer, tasks: asyncio.Queue[pb.Task]) -> None:
        while True:
            task = await tasks.get()
            try:
                await self._deliver(peer, task)
            except grpc.aio.AioRpcError as error:
                self._note(error)

    def _note(self, error: grpc.aio.AioRpcError) -> None:
        if reason(error) not in ("", "JOURNAL", "NOT_JOINED"):
            self.refused.append(reason(error))

    async def _deliver(self, peer: Peer, task: pb.Task) -> None:
        for _ in range(1 + int(task.id, 16) % 2):
            await peer.upload(task)
            self.acked.append(task.id)
            self.acks.set()

    async def until(self, acks: int) -> None:
        while len(self.acked) < acks:
            self.acks.clear()
            await self.acks.wait()


async def start(folder: Path, port: int, point: str = "never") -> asyncio.subprocess.Process:
    words = [sys.executable, "-m", "tests.coordinator_process", str(folder), str(port), point]
    return await asyncio.create_subprocess_exec(*words, cwd=ROOT)


def check(folder: Path, fleet: Fleet) -> None:
    db = connect(folder / "state")
    saved = snapshot(db, folder / "state" / "snapshots", oldest=True)
    assert saved is not None
    assert saved.seq == 0
    run = resume(federation(), saved)
    records: list[Record] = []
    for row in rows(db, 0):
        records += [effect for effect in run.replay(row, folder / "state" / "updates") if isinstance(effect, Record)]
    db.close()
    counted = [record.values["task"] for record in records if record.kind == "arrived"]
    assert len(counted) == len(set(counted)), "an update counted twice"
    assert set(fleet.acked) <= set(counted), "an acknowledged update is lost"
    members = [one["task"] for record in records if record.kind == "aggregated" for one in record.values["members"]]
    assert sorted(members) == sorted(counted), "an update that counts is not in the model"
    assert len(members) == CLIENTS * VERSIONS
    assert fleet.refused == []
    final = (folder / "final").read_bytes()
    assert run.machine.broadcast.vector.tobytes() == final, "the model is not the replay of the journal"
    assert replay(folder / "state", federation()).broadcast.vector.tobytes() == final
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps([[record.t, record.kind, record.values] for record in records]))


@pytest.mark.parametrize("point", [f"{name}:{1 if 'snapshot' in name else 4}" for name in POINTS])
@pytest.mark.slow
def test_killed_at_a_named_point_nothing_is_lost(tmp_path: Path, point: str) -> None:
    async def scenario() -> Fleet:
        port = free_port()
        # The first snapshot is written before any client: die there, then at the next one, then go on.
        process = await start(tmp_path, port, point)
        fleet = Fleet(port)
        working = asyncio.create_task(fleet.run())
        assert await process.wait() == -signal.SIGKILL
        process = await start(tmp_path, port, point if "snapshot" in point else "never")
        if "snapshot" in point:
            assert await process.wait() == -signal.SIGKILL
            process = await start(tmp_path, port)
        await working
        assert await process.wait() == 0
        return fleet

    check(tmp_path, asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S)))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    async def scenario() -> Fleet:
        chance = random.Random(seed)
        port = free_port()
        process = await start(tmp_path, port)
        fleet = Fleet(port)
        working = asyncio.create_task(fleet.run())
        for acks in sorted(chance.sample(range(1, CLIENTS * VERSIONS - 2), 3)):
            await asyncio.wait_for(fleet.until(acks), 60)
            await asyncio.sleep(chance.random() * 0.02)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            process = await start(tmp_path, port)
        await working
        assert await process.wait() == 0
        return fleet

    check(tmp_path, asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S)))


@pytest.mark.slow
def test_sigterm_drains_and_exits_0(tmp_path: Path) -> None:
    async def scenario() -> Fleet:
        port = free_port()
        process = await start(tmp_path, port)
        fleet = Fleet(port)
        working = asyncio.create_task(fleet.run())
        await fleet.until(4)
        process.terminate()
        assert await process.wait() == 0
        process = await start(tmp_path, port)
        await working
        assert await process.wait() == 0
        return fleet

    check(tmp_path, asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S)))
