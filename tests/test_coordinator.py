"""The coordinator over real gRPC on loopback, with clients made of the raw stubs."""

import asyncio
import hashlib
import sqlite3
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedge.core.errors import StrategyError
from fedge.core.task import DELTA
from fedge.protos import fedge_pb2 as pb
from fedge.protos import wire
from fedge.server.coordinator import replay, serve
from fedge.server.machine import Stop
from fedge.server.machine.events import Record
from fedge.strategies import aggregators
from fedge.strategies.contracts import Arrived, Fleet
from fedge.strategies.schedulers.fedasync import FedAsync
from tests.coordinator_fixture import LIMITS, SIZE, Peer, Room, delta_of, initial, plan, reason, room

F32 = np.float32


async def refused(call: Coroutine[Any, Any, Any]) -> tuple[str, grpc.StatusCode, str]:
    """(reason, status, sentence) of a call that must be refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    return reason(error), error.code(), error.details() or ""


async def drain(listening: Any) -> None:
    async for offer in listening:
        assert offer.WhichOneof("offer") == "heartbeat"


async def one_round(made: Room, peers: list[Peer]) -> list[pb.Task]:
    tasks = [await peer.task() for peer in peers]
    for peer, task in zip(peers, tasks):
        await peer.upload(task)
    return tasks


def test_a_round_moves_the_model_by_the_mean_of_the_updates(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan()) as made:
            peers = await made.joined(2)
            tasks = [await peer.task() for peer in peers]
            assert {task.version for task in tasks} == {0}
            manifest, data = await peers[0].download(0)
            np.testing.assert_array_equal(np.frombuffer(data, F32), initial())
            assert hashlib.sha256(data).digest() == manifest.sha256
            for peer, task in zip(peers, tasks):
                assert not (await peer.upload(task)).repeated_delivery
            following = await peers[0].task()
            assert following.version == 1
            _, data = await peers[1].download(1)
            expected = initial() - (delta_of(tasks[0].id) + delta_of(tasks[1].id)) / 2
            np.testing.assert_allclose(np.frombuffer(data, F32), expected, rtol=1e-6, atol=1e-6)
            status = await peers[0].stub.Status(pb.StatusRequest(), timeout=20)
            assert (status.version, status.updates, status.finished) == (1, 2, "")
            assert {(one.client, one.updates) for one in status.clients} == {("device-0", 1), ("device-1", 1)}

    asyncio.run(scenario())


def test_a_download_goes_on_at_its_offset(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan()) as made:
            (peer, _) = await made.joined(2)
            _, whole = await peer.download(0)
            for offset in (0, 1, 4096, 5000, len(whole) - 1, len(whole)):
                _, rest = await peer.download(0, offset)
                assert rest == whole[offset:]

    asyncio.run(scenario())


def test_an_update_delivered_again_counts_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan()) as made:
            peers = await made.joined(2)
            task = await peers[0].task()
            first, second = await asyncio.gather(peers[0].upload(task), peers[0].upload(task), return_exceptions=True)
            again = await peers[0].upload(task)
            assert again.repeated_delivery
            counted = [reply for reply in (first, second) if isinstance(reply, pb.UploadReply)]
            assert sum(not reply.repeated_delivery for reply in counted) == 1
            assert len(made.kinds("arrived")) == 1
            answer = await peers[0].offset(task.id)
            assert (answer.offset, answer.counted) == (0, True)

    asyncio.run(scenario())


def test_updates_for_no_task_or_another_clients_are_refused_before_their_bytes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan()) as made:
            one, two = await made.joined(2)
            task = await one.task()
            assert (await refused(two.upload(task)))[:2] == ("NOT_YOUR_TASK", grpc.StatusCode.PERMISSION_DENIED)
            assert (await refused(one.upload(pb.Task(id="ff" * 16, steps=1))))[:2] == (
                "UNKNOWN_TASK",
                grpc.StatusCode.NOT_FOUND,
            )
            assert (await refused(one.upload(pb.Task(id="../../x", steps=1))))[0] == "UNKNOWN_TASK"
            assert (await refused(two.offset(task.id)))[0] == "NOT_YOUR_TASK"
            assert not list((tmp_path / "spool").iterdir())
            assert not (await one.upload(task)).repeated_delivery

    asyncio.run(scenario())


def wrong_shape(_: pb.UploadBegin) -> pb.Manifest:
    return wire.encode_blobs({DELTA: np.zeros(1, F32)})[0]


def wrong_name(_: pb.UploadBegin) -> pb.Manifest:
    return wire.encode_blobs({"surprise": np.zeros(SIZE, F32)})[0]


def wrong_type(_: pb.UploadBegin) -> pb.Manifest:
    return wire.encode_blobs({DELTA: np.zeros(SIZE, np.int32)})[0]


def nothing(_: pb.UploadBegin) -> pb.Manifest:
    return wire.encode_blobs({})[0]


def wrong_total(begin: pb.UploadBegin) -> pb.Manifest:
    manifest = pb.Manifest()
    manifest.CopyFrom(begin.manifest)
    manifest.size_bytes += 4
    return manifest


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (wrong_shape, "WRONG_MANIFEST"),
        (wrong_name, "WRONG_MANIFEST"),
        (wrong_type, "WRONG_MANIFEST"),
        (nothing, "WRONG_MANIFEST"),
        (wrong_total, "WRONG_SIZE"),
    ],
)
def test_a_manifest_that_is_not_the_models_ends_the_task(tmp_path: Path, lie: Any, why: str) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            begin = peer.begin(task, delta_of(task.id))
            manifest = lie(begin)
            begin.manifest.CopyFrom(manifest)
            assert (await refused(peer.send(peer.parts(begin, b""))))[0] == why
            assert [line.values["reason"] for line in made.kinds("failed")] == [why]
            assert (await peer.task()).id != task.id

    asyncio.run(scenario())


def test_who_was_turned_away_while_still_sending_learns_why_on_asking_again(tmp_path: Path) -> None:
    """A refusal in the middle of a stream may reach its sender as a bare reset; the reason must not be lost with it."""

    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            wrong = np.zeros(4 << 20, F32)
            with pytest.raises(grpc.aio.AioRpcError):
                await peer.send(peer.parts(peer.begin(task, wrong), wrong.tobytes()))
            why, status, sentence = await refused(peer.offset(task.id))
            assert (why, status) == ("WRONG_MANIFEST", grpc.StatusCode.INVALID_ARGUMENT)
            assert f"({SIZE},)" in sentence
            assert (await refused(peer.upload(task)))[0] == "WRONG_MANIFEST"

    asyncio.run(scenario())


def test_more_bytes_than_declared_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            data = delta_of(task.id).tobytes() + b"more"
            begin = peer.begin(task, delta_of(task.id))
            assert (await refused(peer.send(peer.parts(begin, data))))[:2] == (
                "WRONG_SIZE",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
            assert not list((tmp_path / "spool").iterdir())

    asyncio.run(scenario())


def test_a_wrong_hash_may_be_sent_again_but_not_for_ever(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            (peer,) = await made.joined(1)
            for attempts in (1, LIMITS.max_refusals):
                task = await peer.task()
                begin = peer.begin(task, delta_of(task.id))
                for _ in range(attempts):
                    answer = await refused(peer.send(peer.parts(begin, bytes(4 * SIZE))))
                    assert answer[:2] == ("WRONG_HASH", grpc.StatusCode.DATA_LOSS)
                    assert not list((tmp_path / "spool").iterdir())
                if attempts == 1:
                    assert not (await peer.upload(task)).repeated_delivery
            assert (await refused(peer.upload(task)))[0] == "TASK_SPENT"
            assert len(made.kinds("arrived")) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_a_poisoned_update_is_refused_and_moves_nothing(tmp_path: Path, poison: float) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=2)) as made:
            bad, good = await made.joined(2)
            task = await bad.task()
            vector = np.zeros(SIZE, F32)
            vector[7] = poison
            assert (await refused(bad.upload(task, vector)))[0] in ("NOT_FINITE", "NORM_TOO_LARGE")
            honest = await good.task()
            await good.upload(honest)
            _, data = await good.download(1)
            np.testing.assert_allclose(np.frombuffer(data, F32), initial() - delta_of(honest.id), rtol=1e-6)

    asyncio.run(scenario())


def test_who_is_refused_again_and_again_is_shut_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            (peer,) = await made.joined(1)
            for _ in range(LIMITS.max_refusals):
                task = await peer.task()
                assert (await refused(peer.upload(task, np.full(SIZE, np.nan, F32))))[0] == "NOT_FINITE"
            assert (await refused(peer.task()))[0] == "NOT_JOINED"
            answer = await refused(peer.join())
            assert answer[:2] == ("CLIENT_REFUSED", grpc.StatusCode.PERMISSION_DENIED)

    asyncio.run(scenario())


def test_an_upload_that_ends_short_ends_the_task(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            begin = peer.begin(task, delta_of(task.id))
            answer = await refused(peer.send(peer.parts(begin, delta_of(task.id).tobytes(), until=5000)))
            assert answer[0] == "WRONG_SIZE"
            assert [line.values["reason"] for line in made.kinds("failed")] == ["WRONG_SIZE"]
            assert (await peer.task()).id != task.id

    asyncio.run(scenario())


def test_a_cut_upload_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            delta = delta_of(task.id)
            begin, data = peer.begin(task, delta), delta.tobytes()
            call = peer.stub.Upload(timeout=10)
            for part in peer.parts(begin, data, until=8192):
                await call.write(part)
            while (await peer.offset(task.id)).offset < 8192:
                await asyncio.sleep(0.01)
            call.cancel()
            assert (await refused(peer.send(peer.parts(begin, data, offset=4096))))[0] == "WRONG_OFFSET"
            offset = (await peer.offset(task.id)).offset
            assert offset == 8192
            assert not (await peer.send(peer.parts(begin, data, offset=offset))).repeated_delivery
            _, model = await peer.download(1)
            np.testing.assert_allclose(np.frombuffer(model, F32), initial() - delta, rtol=1e-6, atol=1e-6)

    asyncio.run(scenario())


def test_an_older_incarnation_is_fenced_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            old = made.peer("device", "first")
            await old.join()
            task = await old.task()
            listening = old.offers(holding=task.id)
            new = made.peer("device", "second")
            await new.join()
            assert (await refused(drain(listening)))[0] == "STALE_INCARNATION"
            for call in (old.upload(task), old.download(0), old.offset(task.id), old.task()):
                assert (await refused(call))[:2] == ("STALE_INCARNATION", grpc.StatusCode.FAILED_PRECONDITION)
            assert (await new.task()).id == task.id
            await new.upload(task)
            assert len(made.kinds("joined")) == 1

    asyncio.run(scenario())


def test_joining_again_is_harmless_and_wrong_terms_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = replace(LIMITS, max_clients=1)
        async with room(tmp_path, plan(clients=2, limits=limits)) as made:
            peer = made.peer("device")
            first, second = await peer.join(), await peer.join()
            assert first == second
            assert first.layout_hash == made.coordinator.federation.layout.hash
            assert len(made.kinds("joined")) == 1
            assert (await refused(made.peer("other").join()))[0] == "CLIENT_REFUSED"
            assert (await refused(peer.join(protocol=99)))[0] == "CLIENT_REFUSED"
            answer = await refused(made.peer("third").join(layout_hash="0" * 64))
            assert answer[:2] == ("BAD_MODEL", grpc.StatusCode.FAILED_PRECONDITION)
            assert (await refused(made.peer("").join()))[0] == "CLIENT_REFUSED"
            assert (await refused(made.peer("stranger").task()))[0] == "NOT_JOINED"

    asyncio.run(scenario())


def test_a_task_held_is_not_sent_again_and_one_lost_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = replace(LIMITS, liveness_s=1.5)
        async with room(tmp_path, plan(clients=1, limits=limits)) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            assert (await peer.task()).id == task.id
            kinds = []
            async for offer in peer.offers(holding=task.id):
                kinds.append(offer.WhichOneof("offer"))
                if len(kinds) == 3:
                    break
            assert kinds == ["heartbeat"] * 3

    asyncio.run(scenario())


def test_a_failed_task_makes_room_for_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            request = pb.FailRequest(sender=peer.sender, task_id=task.id, reason="out of\nmemory\x1b" + "!" * 1000)
            await peer.stub.Fail(request, timeout=20)
            await peer.stub.Fail(request, timeout=20)
            [why] = [line.values["reason"] for line in made.kinds("failed")]
            assert why.startswith("out of memory !!")
            assert why.isprintable()
            assert len(why) == LIMITS.max_name_bytes
            assert (await peer.task()).id != task.id

    asyncio.run(scenario())


def test_who_is_silent_has_left_and_may_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = replace(LIMITS, liveness_s=1.5)
        async with room(tmp_path, plan(clients=1, limits=limits)) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            while not made.kinds("left"):
                await asyncio.sleep(0.05)
            assert (await refused(peer.upload(task)))[:2] == ("NOT_JOINED", grpc.StatusCode.FAILED_PRECONDITION)
            await peer.join()
            assert (await peer.task()).id != task.id
            await peer.stub.Leave(pb.LeaveRequest(sender=peer.sender), timeout=20)
            assert [line.values["reason"] for line in made.kinds("left")][-1] == "left"

    asyncio.run(scenario())


def test_a_lease_runs_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = replace(LIMITS, lease_s=1.5)
        async with room(tmp_path, plan(clients=2, limits=limits)) as made:
            slow, quick = await made.joined(2)
            await slow.task()
            await quick.upload(await quick.task())
            assert (await quick.task()).version == 1
            assert made.kinds("expired")[0].values["client"] == "device-0"

    asyncio.run(scenario())


def test_new_versions_are_measured_and_the_target_ends_the_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        def evaluate(vector: np.ndarray) -> dict[str, float]:
            return {"accuracy": 0.95 if vector[0] != initial()[0] else 0.1}

        async with room(tmp_path, plan(clients=1, stop=Stop(target=0.9)), evaluate=evaluate) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            listening = peer.offers(holding=task.id)
            await peer.upload(task)
            offers = [offer async for offer in listening]
            assert offers[-1].finished == "target"
            await asyncio.wait_for(made.coordinator.ended.wait(), 30)
            assert made.kinds("evaluated")[-1].values["accuracy"] == 0.95
            status = await peer.stub.Status(pb.StatusRequest(), timeout=20)
            assert status.finished == "target"
            assert status.metrics["accuracy"] == 0.95

    asyncio.run(scenario())


def test_older_versions_stay_as_long_as_a_task_needs_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        federation = plan(clients=2, scheduler=FedAsync(steps=1, alpha=1.0))
        async with room(tmp_path, federation) as made:
            slow, quick = await made.joined(2)
            held = await slow.task()
            for _ in range(3):
                await quick.upload(await quick.task())
            manifest, data = await slow.download(held.version)
            np.testing.assert_array_equal(np.frombuffer(data, F32), initial())
            assert hashlib.sha256(data).digest() == manifest.sha256
            assert (await refused(slow.download(1)))[0] == "TOO_STALE"
            assert (await refused(slow.download(99)))[0] == "TOO_STALE"
            assert [path.name for path in (tmp_path / "versions").iterdir()] == ["0.model"]
            await slow.upload(held)
            await quick.upload(await quick.task())
            assert (await refused(slow.download(0)))[0] == "TOO_STALE"

    asyncio.run(scenario())


def test_a_restart_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async def scenario() -> None:
        lines: list[Record] = []
        async with room(tmp_path, plan(), lines) as made:
            one, two = await made.joined(2)
            first = await one_round(made, [one, two])
            held = await one.task()
            await one.upload(held)
            other = await two.task()
            _, before = await one.download(1)
            clock = lines[-1].t
        known = len(lines)
        async with room(tmp_path, plan(), lines, recorded=known) as made:
            assert len(lines) == known
            assert clock <= made.coordinator.running_s < clock + 60
            again = made.peer("device-1", two.sender.incarnation)
            assert (await again.task()).id == other.id
            _, after = await again.download(1)
            assert after == before
            spent = made.peer("device-0", one.sender.incarnation)
            assert (await spent.upload(held)).repeated_delivery
            assert (await spent.upload(first[0])).repeated_delivery
            await again.upload(other)
            status = await again.stub.Status(pb.StatusRequest(), timeout=20)
            assert (status.version, status.updates) == (2, 4)
            _, model = await again.download(2)
            machine = replay(tmp_path, plan())
            assert machine.broadcast.vector.tobytes() == model
        assert [line.values["version"] for line in lines if line.kind == "aggregated"] == [1, 2]
        assert [line.t for line in lines] == sorted(line.t for line in lines)

    asyncio.run(scenario())


def test_the_record_is_given_again_from_the_line_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        lines: list[Record] = []
        async with room(tmp_path, plan(), lines) as made:
            await one_round(made, await made.joined(2))
        # As after a crash: without the snapshot of an orderly end, the events are folded again.
        with sqlite3.connect(tmp_path / "journal.db") as db:
            db.execute("DELETE FROM snapshots WHERE seq > 0")
        db.close()
        for recorded in (0, 3):
            again: list[Record] = []
            async with room(tmp_path, plan(), again, recorded=recorded):
                assert again[: len(lines) - recorded] == lines[recorded:]
            with sqlite3.connect(tmp_path / "journal.db") as db:
                db.execute("DELETE FROM snapshots WHERE seq > 0")
            db.close()

    asyncio.run(scenario())


def test_snapshots_bound_the_journal(tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = replace(LIMITS, snapshot_updates=2)
        async with room(tmp_path, plan(limits=limits), keep_all=False) as made:
            peers = await made.joined(2)
            for _ in range(5):
                await one_round(made, peers)
            _, model = await peers[0].download(5)
        assert len(list((tmp_path / "snapshots").iterdir())) == 2
        assert len(list((tmp_path / "updates").iterdir())) <= 4
        assert replay(tmp_path, plan(limits=limits)).broadcast.vector.tobytes() == model

    asyncio.run(scenario())


def test_a_full_disk_stops_acknowledging_and_passes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan(clients=1)) as made:
            (peer,) = await made.joined(1)
            task = await peer.task()
            db = made.coordinator._journal._db
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count={pages}")
            long = {f"metric {number} {'x' * 200}": 1.0 for number in range(60)}
            answer = await refused(peer.upload(task, metrics=long))
            assert answer[:2] == ("JOURNAL", grpc.StatusCode.UNAVAILABLE)
            assert not made.kinds("arrived")
            db.execute("PRAGMA max_page_count=100000")
            assert not (await peer.upload(task, metrics=long)).repeated_delivery
            assert len(made.kinds("arrived")) == 1

    asyncio.run(scenario())


def test_a_broken_strategy_ends_the_run_with_its_name(tmp_path: Path) -> None:
    class Broken(FedAsync):
        def step(self, state: dict[str, int], signal: Any, fleet: Fleet) -> Any:
            if isinstance(signal, Arrived):
                raise ZeroDivisionError("oops")
            return super().step(state, signal, fleet)

    async def scenario() -> None:
        addresses: asyncio.Queue[str] = asyncio.Queue()
        running = asyncio.create_task(
            serve(
                plan(clients=1, scheduler=Broken(steps=1)),
                initial(),
                listen="127.0.0.1:0",
                state_dir=tmp_path,
                on_record=lambda _: None,
                on_listening=addresses.put_nowait,
            )
        )
        peer = Peer(await addresses.get(), "device")
        await peer.join()
        answer = await refused(peer.upload(await peer.task()))
        assert "Traceback" not in answer[2]
        with pytest.raises(StrategyError, match="Broken"):
            await running
        await peer.channel.close()

    asyncio.run(scenario())


def test_status_says_that_groups_are_held_and_for_how_many(tmp_path: Path) -> None:
    async def scenario() -> None:
        rule = aggregators.build({"kind": "median", "byzantine": 1})
        async with room(tmp_path, replace(plan(clients=3), aggregator=rule, scheduler=FedAsync())) as made:
            peer = made.peer("one")
            await peer.join()
            await peer.upload(await peer.task())
            reply = await peer.stub.Status(pb.StatusRequest())
            assert dict(reply.metrics) == {"held_groups": 1.0, "clients_missing": 2.0}

    asyncio.run(scenario())
