"""Devices that hang up, read nothing or are shut out: a tail keeps nothing of them, and a device waits for nobody."""

import asyncio
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedge.core.errors import AddressError
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import Bundle, load
from fedge.edge.cloud import engine, serving, wire
from fedge.edge.cloud.engine import Engine
from fedge.edge.cloud.serving import tail_at
from fedge.edge.cloud.tail import TailService
from fedge.edge.cloud.uplink import Uplink
from fedge.edge.coding.codings import Coded, encode
from fedge.protos import edge_pb2 as pb
from tests import edge_fixture as tiny

WAIT_S = 30.0
PATIENT = EdgeLimits(batch_wait_s=50.0)  # requests wait for company, of which there is none


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("edge") / "bundle"
    tiny.make(place)
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load(folder)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[TailService]:
    """The services that are made meanwhile."""
    made: list[TailService] = []

    def kept(*args: Any, **settings: Any) -> TailService:
        made.append(TailService(*args, **settings))
        return made[-1]

    monkeypatch.setattr(serving, "TailService", kept)
    return made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator["Gate"]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


class Gate:
    """A tail that computes nothing before it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached, compute = threading.Event(), threading.Event(), Engine.compute

        def later(one: Engine, batch: Any) -> Any:
            self.reached.set()
            assert self.open.wait(WAIT_S)
            return compute(one, batch)

        monkeypatch.setattr(Engine, "compute", later)


class Device:
    """A device made of the raw call."""

    def __init__(self, address: str, bundle: Bundle) -> None:
        self._bundle = bundle
        self._channel = grpc.insecure_channel(
            address, [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        )
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        infer = self._channel.stream_stream("/fedge.edge.v1.Tail/Infer", None, pb.TailReply.FromString)
        self.call: Any = infer(iter(self._out.get, None))

    def ask(self, number: int, deadline_s: float = 50.0) -> None:
        tensors = [encode("x", tiny.sample(), "raw")]
        self._out.put(wire.request_to(number, self._bundle.version, "input", tensors, deadline_s))

    def finish(self) -> None:
        """Say that there are no more requests."""
        self._out.put(None)

    def cancel(self) -> None:
        self.call.cancel()

    def close(self) -> None:
        self._channel.close()
        self.finish()

    def finish_and_cancel(self) -> None:
        self.finish()
        self.cancel()

    def finish_and_close(self) -> None:
        self.finish()
        self._channel.close()

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


HOW = pytest.mark.parametrize(
    "hang_up",
    [Device.cancel, Device.close, Device.finish_and_cancel, Device.finish_and_close],
    ids=lambda one: one.__name__,
)


@HOW
def test_what_a_device_asked_that_has_hung_up_leaves_the_queue_to_others(
    hang_up: Any, folder: Path, bundle: Bundle, services: list[TailService]
) -> None:
    with (
        tiny.serving(folder, limits=PATIENT) as address,
        Device(address, bundle) as stays,
        Device(address, bundle) as leaves,
    ):
        (service,) = services
        for number in (1, 2, 3):
            leaves.ask(number)
        tiny.until(lambda: len(service._batcher.queue) == 3)
        stays.ask(7)
        tiny.until(lambda: len(service._batcher.queue) == 4)
        hang_up(leaves)
        tiny.until(lambda: len(service._batcher.queue) == 1)
        (left,) = service._batcher.queue
        assert left.work.request.id == 7
        assert service._batcher.held_bytes == left.size_bytes
        assert service._streams == {left.work.stream}
        stays.cancel()
        tiny.until(lambda: not service._streams and not service._batcher.queue)


def test_who_says_that_it_is_finished_still_gets_its_answers(
    folder: Path, bundle: Bundle, gate: Gate, services: list[TailService]
) -> None:
    with tiny.serving(folder, workers=1) as address, Device(address, bundle) as device:
        device.ask(1)
        assert gate.reached.wait(WAIT_S)
        device.ask(2)  # waits, as the only worker is busy
        device.finish()
        tiny.until(lambda: len(services[0]._batcher.queue) == 1)
        gate.open.set()
        assert [(reply.id, reply.reason) for reply in device.call] == [(1, ""), (2, "")]
        tiny.until(lambda: not services[0]._streams)


@HOW
def test_who_hangs_up_while_its_batch_is_computed_costs_no_more_than_that(
    hang_up: Any, folder: Path, bundle: Bundle, gate: Gate, services: list[TailService]
) -> None:
    with tiny.serving(folder, workers=1) as address, Device(address, bundle) as leaves:
        (service,) = services
        leaves.ask(1)
        assert gate.reached.wait(WAIT_S)
        (stream,) = service._streams
        hang_up(leaves)
        tiny.until(lambda: not service._streams)
        gate.open.set()
        tiny.until(stream.idle.is_set)
        assert (stream.in_flight, stream.unread_bytes) == (0, 0)
        with Device(address, bundle) as other:
            other.ask(5)
            assert next(other.call).id == 5
        tiny.until(lambda: service._free == 1 and not service._running)


def test_a_device_that_reads_nothing_is_cut_off_once_its_stream_has_lasted_too_long(
    folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, services: list[TailService]
) -> None:
    large = (Coded("logits", "float32", (1, 4), "raw", (), (), bytes(3 << 20)),)
    monkeypatch.setattr(Engine, "compute", lambda _, batch: [large] * len(batch))
    limits = EdgeLimits(stream_timeout_s=0.5, max_deadline_s=2.0)
    with tiny.serving(folder, limits=limits) as address, Device(address, bundle) as device:
        for number in range(1, 9):
            device.ask(number, deadline_s=2.0)
        tiny.until(lambda: len(services[0]._streams) == 1)
        (stream,) = services[0]._streams
        tiny.until(lambda: not services[0]._streams and not stream.unread_bytes)


def test_an_answer_that_no_message_holds_is_refused_and_the_stream_stays_up(
    folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = engine._shares
    sizes = iter([3 << 20])

    def large(*given: Any) -> Any:
        for size in sizes:
            return [(Coded("logits", "float32", (1, 4), "raw", (), (), bytes(size)),)]
        return shares(*given)

    monkeypatch.setattr(engine, "_shares", large)
    limits = EdgeLimits(max_tensor_bytes=1 << 20)
    with tiny.serving(folder, limits=limits) as address, Device(address, bundle) as device:
        device.ask(1)
        reply = next(device.call)
        assert (reply.id, reply.reason) == (1, "BAD_TENSOR")
        assert "ask for fewer samples" in reply.detail
        device.ask(2)
        reply = next(device.call)
        assert (reply.id, reply.reason) == (2, "")


def test_a_tail_that_ends_while_a_batch_is_computed_waits_for_it_and_leaves_nothing(
    folder: Path, bundle: Bundle, gate: Gate, services: list[TailService]
) -> None:
    """The loop turns meanwhile: here it is what lets the batch end."""

    async def serve() -> list[str]:
        loop = asyncio.get_running_loop()
        async with tail_at(folder, "127.0.0.1:0", profile=tiny.profile(bundle)) as address:
            device = await asyncio.to_thread(Device, address, bundle)
            device.ask(1)
            await asyncio.to_thread(gate.reached.wait, WAIT_S)
            device.cancel()  # else the tail would answer it before it ends
            while services[0]._streams:
                await asyncio.sleep(0.01)
            loop.call_later(0.1, gate.open.set)
        device.close()
        return [one.get_coro().__qualname__ for one in asyncio.all_tasks()]  # type: ignore[union-attr]

    left = asyncio.run(serve())
    assert not any("TailService" in name for name in left), left
    assert not services[0]._running


def test_a_channel_that_is_closed_leaves_nobody_waiting(
    folder: Path, bundle: Bundle, gate: Gate, services: list[TailService]
) -> None:
    with tiny.serving(folder, profile=tiny.profile(bundle), workers=1) as address:
        uplink = Uplink(address, bundle.version)
        tiny.until(lambda: uplink.usable)
        tensors = [encode("x", tiny.sample(), "raw")]
        replies = [uplink.ask("input", tensors, 50.0) for _ in range(5)]
        assert gate.reached.wait(WAIT_S)
        uplink.close()
        replies.append(uplink.ask("input", tensors, 50.0))
        for reply in replies:
            with pytest.raises(AddressError):
                reply.result(WAIT_S)
        assert not uplink._pending
        tiny.until(lambda: not services[0]._streams and not services[0]._batcher.queue)
        gate.open.set()
