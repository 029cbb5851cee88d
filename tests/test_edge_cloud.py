"""The tail's service: what it answers, what it refuses and in which words, how it batches and how it ends."""

import asyncio
import math
import queue
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core.errors import AddressError, FedgeError, ModelError, OtherBundle, Overloaded, RefusedTensor, TooLate
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import Bundle, Tensor, load
from fedge.edge.cloud import wire
from fedge.edge.cloud.batcher import Batcher, Waiting
from fedge.edge.cloud.engine import Engine, _shares
from fedge.edge.cloud.serving import tail_at
from fedge.edge.cloud.tail import TailService, _Stream, _Work
from fedge.edge.coding.codings import Coded, decode, encode
from fedge.edge.plan import profile as profiles
from fedge.protos import edge_pb2 as pb
from fedge.protos import edge_pb2_grpc as rpc
from tests import edge_fixture as tiny
from tests.relay import BURST_S, Relay

WAIT_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("edge") / "bundle"
    tiny.make(place)
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load(folder)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with tiny.serving(folder) as found:
        yield found


class Stream:
    """A device made of the raw call: bytes in, replies out."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        infer = self._channel.stream_stream("/fedge.edge.v1.Tail/Infer", None, pb.TailReply.FromString)
        self._call: Any = infer(iter(self._out.get, None), timeout=WAIT_S)

    def send(self, data: bytes) -> None:
        self._out.put(data)

    def receive(self) -> pb.TailReply:
        return next(self._call)  # type: ignore[no-any-return]

    def ask(self, data: bytes) -> pb.TailReply:
        self.send(data)
        return self.receive()

    def end(self) -> list[pb.TailReply]:
        """Hang up; the replies that were still to come."""
        self._out.put(None)
        return list(self._call)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._out.put(None)
        self._call.cancel()
        self._channel.close()


def coded(seed: int = 0, coding: str = "raw", rows: int = 1) -> Coded:
    return encode("x", tiny.sample(seed, rows), coding)


def request(bundle: Bundle, request_id: int = 1, **changes: Any) -> bytes:
    fields = {"version": bundle.version, "boundary": "input", "tensors": [coded()], "deadline_s": 10.0, **changes}
    return wire.request_to(request_id, **fields)


def output(bundle: Bundle, reply: pb.TailReply) -> Any:
    (one,) = wire.reply_from(reply, EdgeLimits()).outputs
    return decode(one, bundle.boundary("output").tensors[0])


# ---- one request ---------------------------------------------------------------------------------


def test_the_tail_answers_what_the_whole_model_does_from_every_boundary(address: str, bundle: Bundle) -> None:
    x, w = tiny.sample(), tiny.weights()
    a = np.maximum(x @ w["w1"], 0)
    values = {"input": ("x", x), "a": ("a", a), "b": ("b", np.maximum(a @ w["w2"], 0))}
    with Stream(address) as stream:
        for boundary, (name, value) in values.items():
            reply = stream.ask(request(bundle, boundary=boundary, tensors=[encode(name, value, "raw")]))
            assert reply.version == bundle.version
            assert reply.compute_s > 0
            np.testing.assert_allclose(output(bundle, reply), tiny.whole(x), rtol=1e-4, atol=1e-4)


def test_replies_carry_the_ids_of_their_requests_and_none_is_lost(address: str, bundle: Bundle) -> None:
    with Stream(address) as stream:
        for seed in range(20):
            stream.send(request(bundle, seed + 1, tensors=[coded(seed)]))
        replies = stream.end()
    assert sorted(reply.id for reply in replies) == list(range(1, 21))
    for reply in replies:
        expected = tiny.whole(tiny.sample(reply.id - 1))
        np.testing.assert_allclose(output(bundle, reply), expected, rtol=1e-4, atol=1e-4)


def with_shape(shape: tuple[int, ...]) -> Coded:
    one = coded()
    return Coded(one.name, one.dtype, shape, one.coding, one.low, one.high, one.data)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such boundary": ({"boundary": "nowhere"}, "BAD_TENSOR"),
    "a boundary where nothing starts": ({"boundary": "output"}, "BAD_TENSOR"),
    "another version": ({"version": "0" * 64}, "OTHER_BUNDLE"),
    "no version": ({"version": ""}, "OTHER_BUNDLE"),
    "no tensor": ({"tensors": []}, "BAD_TENSOR"),
    "a tensor twice": ({"tensors": [coded(), coded()]}, "BAD_TENSOR"),
    "another name": ({"tensors": [encode("y", tiny.sample(), "raw")]}, "BAD_TENSOR"),
    "another type": ({"tensors": [encode("x", tiny.sample().astype(np.float64), "raw")]}, "BAD_TENSOR"),
    "another width": ({"tensors": [encode("x", tiny.sample()[:, :15], "raw")]}, "BAD_TENSOR"),
    "another rank": ({"tensors": [encode("x", tiny.sample()[0], "raw")]}, "BAD_TENSOR"),
    "no sample": ({"tensors": [encode("x", tiny.sample()[:0], "raw")]}, "BAD_TENSOR"),
    "too large a batch": ({"tensors": [coded(rows=17)]}, "BAD_TENSOR"),
    "a shape that lies": ({"tensors": [with_shape((2, 16))]}, "BAD_TENSOR"),
    "a shape beyond all memory": ({"tensors": [with_shape((1 << 63, 16))]}, "BAD_TENSOR"),
    "no such coding": ({"tensors": [Coded("x", "float32", (1, 16), "h264", (), (), b"")]}, "BAD_TENSOR"),
    "bytes that do not unpack": ({"tensors": [Coded("x", "float32", (1, 16), "raw+zstd", (), (), b"!")]}, "BAD_TENSOR"),
    "a deadline of NaN": ({"deadline_s": math.nan}, "BAD_TENSOR"),
    "a deadline for ever": ({"deadline_s": math.inf}, "BAD_TENSOR"),
    "no deadline": ({"deadline_s": 0.0}, "BAD_TENSOR"),
    "a deadline in the past": ({"deadline_s": -1.0}, "BAD_TENSOR"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_with_a_reason_and_a_sentence_and_the_stream_stays_up(
    name: str, address: str, bundle: Bundle
) -> None:
    changes, reason = BAD[name]
    with Stream(address) as stream:
        reply = stream.ask(request(bundle, 7, **changes))
        assert (reply.id, reply.reason, list(reply.outputs)) == (7, reason, [])
        assert reply.detail.endswith((".", ")"))
        assert not stream.ask(request(bundle, 8)).reason


def test_what_is_no_message_is_refused_too(address: str, bundle: Bundle) -> None:
    with Stream(address) as stream:
        assert stream.ask(b"\xff" * 40).reason == "BAD_TENSOR"
        assert stream.ask(b"").reason == "OTHER_BUNDLE"
        assert not stream.ask(request(bundle)).reason


def test_a_request_in_a_full_batch_of_its_own_is_no_worse_than_alone(address: str, bundle: Bundle) -> None:
    with Stream(address) as stream:
        reply = stream.ask(request(bundle, tensors=[coded(rows=16)]))
    np.testing.assert_allclose(output(bundle, reply), tiny.whole(tiny.sample(rows=16)), rtol=1e-4, atol=1e-4)


# ---- limits --------------------------------------------------------------------------------------


def test_a_device_has_so_many_requests_in_flight_and_no_more(folder: Path, bundle: Bundle) -> None:
    limits = EdgeLimits(max_in_flight=2, batch_wait_s=30.0, max_batch=3)
    with tiny.serving(folder, limits=limits) as address, Stream(address) as stream, Stream(address) as other:
        for number in range(1, 6):
            stream.send(request(bundle, number, deadline_s=20.0))
        assert [stream.receive().id for _ in range(3)] == [3, 4, 5]  # refused; the first two wait for a third
        assert not other.ask(request(bundle, deadline_s=20.0)).reason
        replies = {reply.id: reply.reason for reply in stream.end()}
    assert replies == {1: "", 2: ""}


def test_a_request_past_its_deadline_is_dropped(folder: Path, bundle: Bundle) -> None:
    with tiny.serving(folder, limits=EdgeLimits(batch_wait_s=5.0)) as address, Stream(address) as stream:
        assert stream.ask(request(bundle, deadline_s=0.05)).reason == "TOO_LATE"


def test_more_devices_than_allowed_are_turned_away(folder: Path, bundle: Bundle) -> None:
    with tiny.serving(folder, limits=EdgeLimits(max_streams=1)) as address, Stream(address) as first:
        assert not first.ask(request(bundle)).reason
        with Stream(address) as second, pytest.raises(grpc.RpcError) as raised:
            second.ask(request(bundle))
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not first.ask(request(bundle)).reason


def test_what_the_wire_says_becomes_the_same_error_again() -> None:
    for kind in (RefusedTensor, OtherBundle, Overloaded, TooLate, ModelError, AddressError):
        message = pb.TailReply.FromString(wire.refusal_bytes(3, "v", kind("Because.")))
        with pytest.raises(kind, match=r"^Because\.$"):
            wire.reply_from(message, EdgeLimits())
    with pytest.raises(FedgeError):
        wire.reply_from(pb.TailReply(reason="SOMETHING_NEW"), EdgeLimits())
    with pytest.raises(RefusedTensor):
        wire.reply_from(pb.TailReply(outputs=[pb.Coded()] * 3), EdgeLimits(max_tensors=2))
    assert wire.cloud_s(pb.TailReply(queue_s=math.nan)) == wire.cloud_s(pb.TailReply(compute_s=-1.0)) == 0.0


# ---- batching ------------------------------------------------------------------------------------


def waiting(
    number: int, key: str | None = "k", rows: int = 1, size: int = 1, came: float = 0.0, due: float = 9.0
) -> Any:
    return Waiting(number, key, rows, size, came, due)


def test_the_first_of_a_batch_waits_a_little_for_others() -> None:
    batcher: Batcher[int] = Batcher(EdgeLimits(batch_wait_s=0.5, max_batch=3))
    batcher.add(waiting(1))
    batcher.add(waiting(2, key="other"))
    assert batcher.ready(0.4) == []
    batcher.add(waiting(3))
    assert [one.work for one in batcher.ready(0.5)] == [1, 3]
    assert [one.work for one in batcher.ready(0.5)] == [2]


def test_a_full_batch_and_one_that_shares_with_nobody_wait_for_nothing() -> None:
    batcher: Batcher[int] = Batcher(EdgeLimits(batch_wait_s=0.5, max_batch=3))
    batcher.add(waiting(1, rows=2))
    batcher.add(waiting(2, rows=2))
    batcher.add(waiting(3, key=None))
    assert [one.work for one in batcher.ready(0.0)] == [1]
    assert batcher.ready(0.0) == []
    assert [one.work for one in batcher.ready(0.5)] == [2]
    assert [one.work for one in batcher.ready(0.0)] == [3]


def test_the_queue_refuses_at_once_what_it_has_no_room_for() -> None:
    batcher: Batcher[int] = Batcher(EdgeLimits(max_queue=2, max_queue_bytes=10))
    batcher.add(waiting(1, size=6))
    with pytest.raises(Overloaded):
        batcher.add(waiting(2, size=5))
    batcher.add(waiting(3, size=4))
    with pytest.raises(Overloaded):
        batcher.add(waiting(4, size=0))
    batcher.ready(9.0)
    batcher.add(waiting(5, size=10))
    assert batcher.held_bytes == 10


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", None]), st.integers(1, 5), st.integers(0, 40), st.floats(0, 2), st.floats(0, 1)
        ),
        max_size=30,
    )
)
def test_every_request_leaves_the_queue_once_in_time_or_as_late_and_batches_keep_the_limits(
    arrivals: list[tuple[str | None, int, int, float, float]],
) -> None:
    limits = EdgeLimits(max_batch=6, max_tensor_bytes=50, max_queue=20, max_queue_bytes=400, batch_wait_s=0.1)
    batcher: Batcher[int] = Batcher(limits)
    left: list[int] = []
    taken: set[int] = set()
    now = 0.0
    for number, (key, rows, size, lasts, pause) in enumerate(arrivals):
        now += pause
        late = batcher.expired(now)
        assert all(one.due_at <= now for one in late)
        left += [one.work for one in late]
        try:
            batcher.add(Waiting(number, key, rows, size, now, now + lasts))
            taken.add(number)
        except Overloaded:
            assert len(batcher.queue) >= 20 or batcher.held_bytes + size > 400
        batch = batcher.ready(now)
        if batch:
            assert len({one.key for one in batch}) == 1
            assert sum(one.rows for one in batch) <= 6
            assert sum(one.size_bytes for one in batch) <= 50
            assert len(batch) == 1 or batch[0].key is not None
            assert [one.work for one in batch] == sorted(one.work for one in batch)
        left += [one.work for one in batch]
        assert batcher.held_bytes == sum(one.size_bytes for one in batcher.queue)
    while batcher.queue:
        now = max(now, batcher.wake_at())
        out = batcher.expired(now) + batcher.ready(now)
        assert out, "`wake_at` promised something"
        left += [one.work for one in out]
    assert len(left) == len(set(left))
    assert set(left) == taken
    assert batcher.wake_at() == math.inf


def test_requests_of_several_devices_share_a_batch_and_get_their_own_rows(folder: Path, bundle: Bundle) -> None:
    limits = EdgeLimits(batch_wait_s=5.0, max_batch=4)
    with tiny.serving(folder, limits=limits) as address:
        streams = [Stream(address) for _ in range(3)]
        try:
            rows = (1, 2, 1)
            for number, stream in enumerate(streams):
                stream.send(request(bundle, number, tensors=[coded(number, rows=rows[number])]))
            # Only together they fill a batch; else they would wait for 5 s and each be alone.
            replies = [stream.receive() for stream in streams]
        finally:
            for stream in streams:
                stream.__exit__()
    assert len({reply.compute_s for reply in replies}) == 1
    for number, reply in enumerate(replies):
        expected = tiny.whole(tiny.sample(number, rows[number]))
        np.testing.assert_allclose(output(bundle, reply), expected, rtol=1e-4, atol=1e-4)


def test_only_what_counts_samples_is_stacked(bundle: Bundle) -> None:
    whole = bundle.piece("input", "output")
    assert wire.stackable(whole)
    windows = Tensor("x", "float32", (-2, 16))  # e.g. four windows for each sample
    assert not wire.stackable(msgspec.structs.replace(whole, inputs=(windows,)))
    assert not wire.stackable(msgspec.structs.replace(whole, outputs=(Tensor("logits", "float32", (-2, 4)),)))
    assert not wire.stackable(msgspec.structs.replace(whole, outputs=(Tensor("logits", "float32", (-1, -2)),)))
    pieces = tuple(
        msgspec.structs.replace(piece, inputs=(windows,)) if piece.file == whole.file else piece
        for piece in bundle.pieces
    )
    message = pb.TailRequest.FromString(request(bundle, tensors=[coded(rows=20)]))
    found = wire.check_request(message, msgspec.structs.replace(bundle, pieces=pieces), EdgeLimits())
    assert (found.rows, found.key) == (1, None)


def test_a_piece_that_changes_the_number_of_rows_gives_nobody_the_rows_of_another() -> None:
    tensor = Tensor("logits", "float32", (-1, 4))
    with pytest.raises(ModelError):
        _shares((tensor,), {"logits": np.zeros((1, 4), np.float32)}, [2, 2])


def test_ranges_are_counted_and_bounded(bundle: Bundle) -> None:
    message = pb.TailRequest.FromString(request(bundle))
    plain = wire.check_request(message, bundle, EdgeLimits()).size_bytes
    message.tensors[0].low.extend([0.0] * 16)
    assert wire.check_request(message, bundle, EdgeLimits()).size_bytes > plain + 4 * 16
    message.tensors[0].low.append(0.0)
    with pytest.raises(RefusedTensor, match="ranges"):
        wire.check_request(message, bundle, EdgeLimits())
    assert wire.from_pb(pb.Coded(coding="u8", low=[0.0], high=[1.0]), EdgeLimits()).low == (0.0,)


def test_replies_that_nobody_reads_are_not_kept_without_bound(bundle: Bundle, folder: Path) -> None:
    async def answers() -> list[str]:
        room = asyncio.Event()
        written: list[bytes] = []

        class Context:  # a device that reads nothing before `room`
            def done(self) -> bool:
                return False

            async def write(self, data: bytes) -> None:
                await room.wait()
                written.append(data)

        limits = EdgeLimits(max_unread_bytes=400)
        engine = Engine(folder, bundle, limits)
        service = TailService(bundle, engine, limits=limits)
        stream = _Stream(Context())
        service._streams.add(stream)
        for number in range(1, 9):
            message = pb.TailRequest.FromString(request(bundle, number))
            stream.begin()
            work = _Work(wire.check_request(message, bundle, limits), stream)
            service._answer(Waiting(work, None, 1, 1, 0.0, 9.0), (encode("logits", tiny.sample()[:, :4], "raw"),), 0.0)
        room.set()
        await stream.idle.wait()
        service.close()
        engine.close()
        assert stream.unread_bytes == 0
        return [pb.TailReply.FromString(data).reason for data in written]

    reasons = asyncio.run(answers())
    assert reasons[0] == ""
    assert reasons[-1] == "OVERLOADED"
    assert len(reasons) == 8


def test_one_request_that_does_not_decode_leaves_the_others_of_its_batch_alone(folder: Path, bundle: Bundle) -> None:
    limits = EdgeLimits(batch_wait_s=5.0, max_batch=2)
    short = Coded("x", "float32", (1, 16), "raw", (), (), b"\0" * 63)
    with tiny.serving(folder, limits=limits) as address, Stream(address) as stream:
        stream.send(request(bundle, 1, tensors=[short]))
        stream.send(request(bundle, 2))
        replies = {reply.id: reply.reason for reply in stream.end()}
    assert replies == {1: "BAD_TENSOR", 2: ""}


def test_where_a_batch_cannot_be_computed_each_request_is_tried_alone(tmp_path: Path) -> None:
    bundle = tiny.make(tmp_path / "b", rigid=True)
    rng = np.random.default_rng(0)
    limits = EdgeLimits(batch_wait_s=5.0, max_batch=4)
    with tiny.serving(tmp_path / "b", limits=limits) as address, Stream(address) as stream:
        for number, rows in enumerate((1, 2, 1)):
            tensor = encode("b", rng.standard_normal((rows, 8)).astype(np.float32), "raw")
            stream.send(request(bundle, number, boundary="b", tensors=[tensor]))
        replies = {reply.id: reply.reason for reply in stream.end()}
    assert replies == {0: "", 1: "BAD_TENSOR", 2: ""}


def test_the_same_batch_has_the_same_bits_and_another_batch_the_same_numbers(folder: Path, bundle: Bundle) -> None:
    engine = Engine(folder, bundle, EdgeLimits())
    messages = [pb.TailRequest.FromString(request(bundle, n, tensors=[coded(n)])) for n in range(7)]
    requests = [wire.check_request(message, bundle, EdgeLimits()) for message in messages]

    def values(outcomes: list[Any]) -> Any:
        return np.concatenate([np.frombuffer(one.data, np.float32) for (one,) in outcomes])

    together, again = values(engine.compute(requests)), values(engine.compute(requests))
    alone = values([outcome for one in requests for outcome in engine.compute([one])])
    engine.close()
    assert together.tobytes() == again.tobytes()
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


# ---- greeting, probes, address, end --------------------------------------------------------------


def test_the_greeting_tells_version_and_profile(address: str, bundle: Bundle) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = rpc.TailStub(channel)  # type: ignore[no-untyped-call]
        reply = stub.Hello(pb.HelloRequest(protocol=wire.PROTOCOL, version="other"), timeout=WAIT_S)
        assert reply.version == bundle.version
        assert reply.max_tensor_bytes == EdgeLimits().max_tensor_bytes
        measured = profiles.decode(reply.profile)
        assert measured.version == bundle.version
        assert {"input..output", "a..output", "b..output"} == measured.pieces.keys()
        with pytest.raises(grpc.RpcError) as raised:
            stub.Hello(pb.HelloRequest(protocol=99), timeout=WAIT_S)
        assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_a_probe_comes_back_unless_it_is_too_large(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = rpc.TailStub(channel)  # type: ignore[no-untyped-call]
        assert stub.Probe(pb.ProbeRequest(padding=b"x" * (1 << 20)), timeout=WAIT_S).seconds >= 0
        with pytest.raises(grpc.RpcError) as raised:
            stub.Probe(pb.ProbeRequest(padding=b"x" * ((1 << 20) + 1)), timeout=WAIT_S)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "nonsense", "127.0.0.1:99999", "example.org:1"])
def test_only_loopback_is_listened_on_unless_asked(listen: str, folder: Path) -> None:
    async def serve() -> None:
        async with tail_at(folder, listen):
            pass

    with pytest.raises(AddressError):
        asyncio.run(serve())


def test_a_port_in_use_is_an_address_error(folder: Path) -> None:
    async def serve(listen: str) -> None:
        async with tail_at(folder, listen):
            pass

    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(AddressError):
            asyncio.run(serve(taken))


def test_what_is_in_progress_at_the_end_is_answered_and_what_comes_after_refused(folder: Path, bundle: Bundle) -> None:
    with tiny.serving(folder, limits=EdgeLimits(batch_wait_s=1.5, max_in_flight=1)) as address:
        stream = Stream(address)
        stream.send(request(bundle, 1))
        assert stream.ask(request(bundle, 2)).reason == "OVERLOADED"  # so the first has arrived
    with stream:
        reply = stream.receive()
        assert (reply.id, reply.reason) == (1, "")


@pytest.mark.slow
def test_sigterm_ends_it(folder: Path, bundle: Bundle) -> None:
    with tiny.tail_process(folder) as (process, address), Stream(address) as stream:
        assert not stream.ask(request(bundle)).reason
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0


# ---- the relay of these tests --------------------------------------------------------------------


def test_the_relay_is_no_faster_than_it_says_tells_what_it_passed_and_cuts() -> None:
    size = 40_000
    with ExitStack() as stack:
        target = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        relay = stack.enter_context(Relay(f"127.0.0.1:{target.getsockname()[1]}", up_bps=3.2e6, rtt_s=0.1))
        host, _, port = relay.address.rpartition(":")
        near = stack.enter_context(socket.create_connection((host, int(port))))
        far = stack.enter_context(target.accept()[0])
        began = time.monotonic()
        near.sendall(b"x" * size)
        got = 0
        while got < size:
            got += len(far.recv(1 << 16))
        assert time.monotonic() - began >= 0.1 + 0.05 - BURST_S  # 40 kB at 400 kB/s, and half of 100 ms
        assert relay.forwarded_bytes == (size, 0)
        relay.cut()
        for end in (near, far):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
