"""What a device takes from a cloud and asks of it, what a tail keeps, and how a machine's cache stays bounded."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.client.connection import channel_options
from fedge.core.addresses import keepalive, parse
from fedge.core.errors import AddressError
from fedge.core.limits import EdgeLimits, Limits
from fedge.edge.bundle import Bundle, Sent, load
from fedge.edge.cloud import serving, uplink, wire
from fedge.edge.cloud.batcher import Waiting
from fedge.edge.cloud.device import RETRY_S, Device, start
from fedge.edge.cloud.engine import Engine
from fedge.edge.cloud.session import Session
from fedge.edge.cloud.tail import TailService, _Stream, _Work
from fedge.edge.coding.codings import encode
from fedge.edge.plan.planner import Bounds
from fedge.edge.plan.profile import Profile
from fedge.edge.runtime import cache as caches
from fedge.edge.runtime.sessions import Runner, open_piece
from fedge.protos import edge_pb2 as pb
from fedge.server.coordinator import serving as coordinators
from tests import edge_fixture as tiny

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
ALWAYS_ASK = Bounds(memory_bytes=10)  # with a profile that claims more for every piece after `a`


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("edge") / "bundle"
    tiny.make(place)
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load(folder)


@pytest.fixture(scope="module")
def profile(bundle: Bundle) -> Profile:
    return tiny.profile(bundle, memory=100)


@pytest.fixture(scope="module")
def address(folder: Path, profile: Profile) -> Iterator[str]:
    """A tail that takes larger batches than devices send."""
    with tiny.serving(folder, profile=profile, limits=EdgeLimits(max_batch=32)) as found:
        yield found


def asking(session: Session) -> None:
    assert session.wait_for_cloud(20)
    tiny.until(lambda: session.option.boundary is not None)


# ---- what comes from the cloud, and what goes there ----------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_cloud_whose_numbers_are_not_finite_has_not_answered(
    value: float, folder: Path, profile: Profile, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = np.zeros((1, 4), np.float32)
    wrong[0, 2] = value
    with Session(folder, address, profile=profile, bounds=ALWAYS_ASK, deadline_s=10) as session:
        asking(session)
        monkeypatch.setattr(Engine, "compute", lambda _, batch: [(encode("logits", wrong, "raw"),)] * len(batch))
        answer = session.infer(tiny.sample())
    assert (answer.label, answer.reason) == ("device", "BAD_TENSOR")
    assert "'logits' that are NaN or infinite" in answer.detail
    np.testing.assert_allclose(answer.outputs["logits"], tiny.whole(tiny.sample()), **CLOSE)


def test_a_batch_that_the_cloud_would_refuse_is_not_sent(folder: Path, profile: Profile, address: str) -> None:
    with Session(folder, address, profile=profile, bounds=ALWAYS_ASK, deadline_s=10) as session:
        asking(session)
        assert session.infer(tiny.sample(rows=16)).label == "cloud"
        answer = session.infer(tiny.sample(rows=17))  # this tail would take it
    assert (answer.label, answer.reason) == ("device", "BAD_TENSOR")
    assert "at most 16" in answer.detail
    np.testing.assert_allclose(answer.outputs["logits"], tiny.whole(tiny.sample(rows=17)), **CLOSE)


# ---- bounds that nothing keeps -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "deadline_s", "slow_s", "named"),
    [
        (Bounds(accuracy=1.5), 10.0, 1e-4, "accuracy"),
        (Bounds(memory_bytes=10, keep_input=True), 10.0, 1e-4, "memory_bytes = 100"),
        (Bounds(), 5.0, 9.0, "deadline_s = 9"),
    ],
    ids=["accuracy", "memory and the input", "deadline"],
)
def test_bounds_that_no_option_keeps_are_told_with_every_answer(
    bounds: Bounds, deadline_s: float, slow_s: float, named: str, tmp_path: Path
) -> None:
    bundle = tiny.make(tmp_path / "b", codings={"input": {"raw": Sent(1.0)}})
    profile = tiny.profile(bundle, memory=100, output=slow_s)
    with (
        tiny.serving(tmp_path / "b", profile=profile) as address,
        Session(tmp_path / "b", address, profile=profile, bounds=bounds, deadline_s=deadline_s) as session,
    ):
        tiny.until(lambda: session.trouble == "BAD_EXPERIMENT")
        answers = [session.infer(tiny.sample()) for _ in range(3)]
    for answer in answers:
        assert answer.reason in ("BAD_EXPERIMENT", "TOO_LATE")
        assert "No option keeps all bounds" in answer.detail
        assert named in answer.detail
        assert answer.output is not None


def test_bounds_that_an_option_keeps_are_no_trouble(folder: Path, profile: Profile, address: str) -> None:
    with Session(folder, address, profile=profile, bounds=ALWAYS_ASK, deadline_s=10) as session:
        asking(session)
        answer = session.infer(tiny.sample())
        assert (answer.reason, answer.detail, session.trouble) == ("", "", "")


# ---- what a tail keeps for those who do not read -------------------------------------------------


def test_who_reads_nothing_fills_its_own_room_and_not_that_of_others(bundle: Bundle, folder: Path) -> None:
    class Context:  # a device that reads nothing before `room`
        def __init__(self, room: asyncio.Event) -> None:
            self.room, self.reasons = room, list[str]()

        def done(self) -> bool:
            return False

        async def write(self, data: bytes) -> None:
            await self.room.wait()
            self.reasons.append(pb.TailReply.FromString(data).reason)

    async def answers() -> list[list[str]]:
        room = asyncio.Event()
        limits = EdgeLimits(max_unread_bytes=1500, max_tensor_bytes=400)
        engine = Engine(folder, bundle, limits)
        service = TailService(bundle, engine, limits=limits)
        contexts = [Context(room) for _ in range(2)]
        for context in contexts:
            stream = _Stream(context)
            service._streams.add(stream)
            data = wire.request_to(1, bundle.version, "input", [encode("x", tiny.sample(), "raw")], 9.0)
            work = _Work(wire.check_request(wire.parse(data), bundle, limits), stream)
            output = (encode("logits", tiny.sample()[:, :4], "raw"),)
            for _ in range(4):
                stream.begin()
                service._answer(Waiting(work, None, 1, 1, 0.0, 9.0), output, 0.0)
        room.set()
        await asyncio.gather(*(stream.idle.wait() for stream in service._streams))
        service.close()
        engine.close()
        return [context.reasons for context in contexts]

    first, second = asyncio.run(answers())
    assert first == second, "the second device is not worse off for what the first has not read"
    assert first[0] == ""
    assert first[-1] == "OVERLOADED"
    assert len(first) == 4


# ---- a busy spell --------------------------------------------------------------------------------


def test_many_requests_right_after_a_busy_spell_are_answered(folder: Path, bundle: Bundle) -> None:
    deadline_s = 10.0
    with Session(folder, profile=tiny.profile(bundle), deadline_s=deadline_s) as session:
        for _ in range(30):
            session._device.took("device", 10 * deadline_s, 1e-4)
        assert session._device.takes_s([("input", "a")]) > deadline_s
        labels = [session.infer(tiny.sample()).label for _ in range(500)]
    assert labels.count("device") > 450
    assert set(labels) <= {"device", "exit:early"}


class Clock:
    """A device's time, which passes only as told: `run_s` with each piece that it computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.run_s, run = 1000.0, 1e-4, Runner.run

        def timed(runner: Runner, inputs: Any) -> Any:
            self.now += self.run_s
            return run(runner, inputs)

        monkeypatch.setattr(Runner, "run", timed)
        monkeypatch.setattr("fedge.edge.cloud.device.time", self)

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


def test_what_looks_too_slow_is_tried_now_and_then_and_only_where_it_could_be_in_time(
    folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    device = Device(folder, bundle, 1)
    device.profile = tiny.profile(bundle)
    leg, walk = ("input", "a"), start(bundle, tiny.sample())
    for _ in range(30):
        device.took("device", 10.0, 1e-4)
    assert not device.retry(walk, leg, clock.now + 1e-4), "its profile says that it takes longer"
    assert device.retry(walk, leg, clock.now + 1)
    assert device.takes_s([leg]) < 1
    later = start(bundle, tiny.sample())
    assert not device.retry(later, leg, clock.now + 1)
    clock.now += 0.9 * RETRY_S
    assert not device.retry(later, leg, clock.now + 1)
    clock.now += 0.2 * RETRY_S
    assert device.retry(later, leg, clock.now + 1)
    device.close()


def test_a_device_that_stays_busy_tries_less_and_less_often(
    folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    device = Device(folder, bundle, 1)
    device.profile = tiny.profile(bundle)
    leg = ("input", "a")

    def tried_after(wait_s: float) -> bool:
        clock.now += wait_s
        return device.retry(start(bundle, tiny.sample()), leg, clock.now + 0.04)

    clock.run_s = 0.05
    assert tried_after(0)
    assert not tried_after(1.1 * RETRY_S)
    assert tried_after(RETRY_S)
    assert not tried_after(3.9 * RETRY_S)
    clock.run_s = 1e-4
    assert tried_after(0.2 * RETRY_S)
    assert not tried_after(0.9 * RETRY_S)  # the first in time makes it as it was
    assert tried_after(0.2 * RETRY_S)
    device.close()


# ---- the cache of pieces -------------------------------------------------------------------------


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def filled(cache: Path, name: str, age_s: float, most_bytes: int = 1 << 20) -> Path:
    """An entry of 1000 bytes and a record, last used so long ago."""
    found = caches.entry(cache, name, lambda fresh: fill(fresh / caches.GRAPH), most_bytes)
    assert found
    then = time.time() - age_s
    os.utime(found, (then, then))
    return found


def fill(path: Path) -> None:
    path.write_bytes(bytes(1000))


def test_what_was_not_used_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "SETTLED_NS", -1)  # so that nothing is written to an entry that is only used
    for name, age_s in {"a": 400.0, "b": 300.0, "c": 200.0}.items():
        filled(tmp_path, name, age_s)
    assert caches.entry(tmp_path, "a", fill) == tmp_path / "a", "it is there, so it is only used"
    filled(tmp_path, "new", 0.0, 3800)  # of 1.2 kB each, three have room
    assert entries(tmp_path) == {"a", "c", "new"}


def test_what_is_in_use_or_was_just_now_stays(tmp_path: Path) -> None:
    held, just_now = filled(tmp_path, "held", 400.0), filled(tmp_path, "just now", 1.0)
    user = {1, 2}
    caches.hold(held, user)
    caches.prune(tmp_path, 0)
    assert entries(tmp_path) == {held.name, just_now.name}
    del user
    caches.prune(tmp_path, 0)
    assert entries(tmp_path) == {just_now.name}


def test_a_piece_that_is_open_keeps_its_entry(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    runner = open_piece(folder, bundle, "input", "output", cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    os.utime(kept, (0, 0))
    caches.prune(tmp_path, 0)
    assert entries(tmp_path) == {kept.name}
    runner.close()
    caches.prune(tmp_path, 0)
    assert entries(tmp_path) == set()


def test_what_a_killed_process_has_left_goes_after_a_day(tmp_path: Path) -> None:
    for name, age_s in {".making-old": 2 * caches.LEFT_S, ".making-now": 3600.0}.items():
        (tmp_path / name).mkdir()
        fill(tmp_path / name / caches.GRAPH)
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    fill(tmp_path / ".record-old")
    os.utime(tmp_path / ".record-old", (0, 0))
    caches.prune(tmp_path, 1 << 20)
    assert entries(tmp_path) == {".making-now"}


def test_many_that_make_use_and_prune_all_have_their_answers(
    folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "YOUNG_S", -1.0)
    monkeypatch.setattr(caches, "entry", partial(caches.entry, most_bytes=0))
    found: list[Any] = []

    def work() -> None:
        for end in ("a", "output") * 4:
            runner = open_piece(folder, bundle, "input", end, cache=tmp_path)
            answer = runner.run({"x": tiny.sample()})
            runner.close()
            found.append(np.allclose(answer["logits"], tiny.whole(tiny.sample()), **CLOSE) if end != "a" else True)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 24


# ---- addresses -----------------------------------------------------------------------------------


def test_every_room_has_the_same_keepalive() -> None:
    limits = Limits()
    rooms: list[list[tuple[str, int]]] = [
        coordinators.options(limits),
        channel_options(limits),
        serving.options(EdgeLimits()),
        uplink.channel_options(EdgeLimits()),
    ]
    for options in rooms:
        assert set(keepalive(limits)) <= set(options)
        assert len(dict(options)) == len(options)
    assert ("grpc.http2.ping_timeout_ms", 10_000) in keepalive(limits)


@pytest.mark.parametrize("address", ["", "localhost", ":80", "127.0.0.1:70000", "127.0.0.1:-1", "host:port"])
def test_an_address_is_host_and_port(address: str) -> None:
    assert parse("[::1]:80") == ("[::1]", 80)
    with pytest.raises(AddressError, match="host:port"):
        parse(address)
