"""Ranks that meet, work, and lose each other: never a hang, never anything but RankLost."""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.core.errors import ExperimentError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.mesh import handshake
from fedge.edge.llm.mesh.frames import FLOAT32, HEADER, MAGIC, PART, STEP, Link
from fedge.edge.llm.mesh.links import LinkSpeed
from fedge.edge.llm.mesh.mesh import Alone, Mesh, connect
from fedge.edge.llm.mesh.wires import Plain
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Copy, Part, Step, encode
from fedge.edge.llm.ranks.worker import serve_steps
from fedge.edge.llm.shards.shard import export, open_shard
from fedge.edge.llm.shards.shares import even
from tests.llm_fixture import folder
from tests.llm_group import KEY, LIMITS, group, in_threads, listeners
from tests.llm_ranks import Plain as Dequantised
from tests.llm_ranks import group as ranks_in_threads
from tests.relay import Relay

SHORT = replace(LIMITS, connect_timeout_s=2.0, step_timeout_s=0.5)  # only where somebody does not come, or is silent
STEP_OF_3 = Step((Part(1, 4, 2), Part(0, 0, 1)), (Copy(1, 2, 3),), (5,))
SPAWN = multiprocessing.get_context("spawn")


def lost(result: object) -> RankLost:
    assert isinstance(result, RankLost), result
    return result


# Steps.


@pytest.mark.parametrize("secure", [False, True])
def test_steps_go_from_rank_0_to_all_and_end_in_order(secure: bool) -> None:
    x = np.random.default_rng(1).standard_normal((3, 16), np.float32)

    def work(mesh: Mesh) -> Any:
        if mesh.rank:
            return [mesh.receive_step(), mesh.receive_step(), mesh.receive_step()]
        mesh.send_step(STEP_OF_3, x)
        mesh.send_step(Step(()), x[:0])
        mesh.send_step(None)
        return None

    for received in group(3, work, collective="full", secure=secure)[1:]:
        assert isinstance(received, list), received
        (first, embeddings), (second, nothing), end = received
        assert (first, second, end) == (STEP_OF_3, Step(()), None)
        np.testing.assert_array_equal(embeddings, x)
        assert embeddings.flags.writeable
        assert nothing.shape == (0, 16)


def test_waiting_for_a_step_outlasts_the_timeout_of_a_step() -> None:
    limits = replace(LIMITS, step_timeout_s=1.0)

    def work(mesh: Mesh) -> object:
        if mesh.rank:
            return mesh.receive_step()
        time.sleep(1.5 * limits.step_timeout_s)
        mesh.send_step(STEP_OF_3, np.ones((3, 4), np.float32))
        return None

    received = group(2, work, limits, collective="full")[1]
    assert isinstance(received, tuple), received
    assert received[0] == STEP_OF_3


def test_one_rank_needs_nobody() -> None:
    mesh, x = Alone(), np.ones((2, 3), np.float32)
    assert (mesh.rank, mesh.size) == (0, 1)
    assert mesh.allreduce(x) is x
    mesh.send_step(STEP_OF_3, x)
    assert mesh.receive_step() is None
    mesh.close()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("name", ["full", "doubling", "star", "int8"])
def test_payloads_far_above_the_sockets_buffers_pass_in_both_directions(name: str, secure: bool) -> None:
    count = 4 << 20

    def work(mesh: Mesh) -> tuple[float, float]:
        total = mesh.allreduce(np.full(count, mesh.rank + 1, np.float32))
        return float(total.min()), float(total.max())

    for result in group(3, work, collective=name, secure=secure):
        assert result == (pytest.approx(6, abs=1e-5), pytest.approx(6, abs=1e-5))


@pytest.mark.slow
def test_64_megabytes_pass_in_both_directions() -> None:
    results = group(2, lambda mesh: float(mesh.allreduce(np.ones(16 << 20, np.float32)).sum()), collective="full")
    assert results == [2.0 * (16 << 20)] * 2


def test_close_wakes_who_waits_for_a_step_and_who_waits_for_a_part() -> None:
    waits: list[Callable[[Mesh], object]] = [
        lambda mesh: mesh.receive_step(),
        lambda mesh: mesh.allreduce(np.ones(4, np.float32)),
    ]
    for secure in (False, True):
        for wait in waits:
            woken = threading.Event()

            def work(mesh: Mesh, wait: Callable[[Mesh], object] = wait, woken: threading.Event = woken) -> float:
                if not mesh.rank:
                    woken.wait(60)  # and until then its end of the connection stays
                    return 0.0
                threading.Timer(0.1, mesh.close).start()
                begun = time.monotonic()
                with pytest.raises(RankLost):
                    wait(mesh)
                woken.set()
                return time.monotonic() - begun

            took_s = group(2, work, collective="full", secure=secure)[1]
            assert isinstance(took_s, float), took_s
            assert took_s < LIMITS.step_timeout_s / 2  # and not only after that much silence


@pytest.mark.parametrize("secure", [False, True])
def test_a_model_says_the_same_over_sockets_as_over_shared_memory(tmp_path: Path, secure: bool) -> None:
    model = folder(tmp_path / "model", layers=2)
    with open_folder(model) as opened:
        shares = even(opened.config, 3)
    step, tokens = Step((Part(0, 0, 5), Part(1, 0, 2))), np.array([3, 1, 4, 1, 5, 9, 2])
    with ranks_in_threads(model, tmp_path / "one", shares) as (lead, _):
        expected = lead.run(step, tokens)
    with open_folder(model) as opened:
        shards = [open_shard(path) for path in export(opened, tmp_path, shares, "float32")]

    def work(mesh: Mesh) -> Any:
        shard = shards[mesh.rank]
        if mesh.rank:
            return serve_steps(Rank(shard, Dequantised(shard), mesh, slots=2, context=16), mesh)
        lead = Model(shard, Dequantised(shard), mesh, slots=2, context=16)
        logits = lead.run(step, tokens)
        lead.close()
        return logits

    logits, *steps = group(3, work, collective="full", secure=secure)
    np.testing.assert_array_equal(logits, expected)
    assert steps == [1, 1]


# Lost ranks.


def _sum_forever(mesh: Mesh, count: int) -> None:
    while True:
        mesh.allreduce(np.ones(count, np.float32))


def _serve(rank: int, size: int, addresses: list[str], listener: socket.socket) -> None:
    """A rank in a process of its own: sums until it is killed."""
    with contextlib.suppress(RankLost):
        mesh = connect(rank, size, addresses, KEY, 3, listener=listener, limits=LIMITS, collective="full")
        _sum_forever(mesh, 1 << 18)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_is_killed_or_stopped_in_the_midst_is_named(sign: signal.Signals) -> None:
    made, addresses = listeners(2)
    process = SPAWN.Process(target=_serve, args=(1, 2, addresses, made[1]))
    process.start()
    try:
        limits = replace(LIMITS, connect_timeout_s=60.0, step_timeout_s=2.0)
        mesh = connect(0, 2, addresses, KEY, 3, listener=made[0], limits=limits, collective="full")
        assert process.pid is not None
        threading.Timer(0.3, os.kill, (process.pid, sign)).start()
        with pytest.raises(RankLost, match="Rank 1") as caught:
            _sum_forever(mesh, 1 << 18)
        assert caught.value.rank == 1
        with pytest.raises(RankLost):  # and it stays lost
            mesh.allreduce(np.ones(4, np.float32))
    finally:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        for one in made:
            one.close()


def test_when_one_rank_gives_up_all_others_find_out_at_once() -> None:
    def work(mesh: Mesh) -> Any:
        if mesh.rank == 2:
            mesh.close()
            return None
        begun = time.monotonic()
        with pytest.raises(RankLost):
            _sum_forever(mesh, 8)
        return time.monotonic() - begun

    for took_s in group(4, work, collective="full"):
        assert took_s is None or (isinstance(took_s, float) and took_s < LIMITS.step_timeout_s / 2), took_s


def test_the_end_can_be_sent_to_ranks_that_are_gone() -> None:
    def work(mesh: Mesh) -> Any:
        mesh.close()
        mesh.send_step(None)
        with pytest.raises(RankLost):
            mesh.send_step(STEP_OF_3, np.ones((3, 4), np.float32))
        return "alive"

    assert group(2, work, collective="full") == ["alive"] * 2


# Frames.


@contextlib.contextmanager
def _mesh_against_bytes(limits: LlmLimits = SHORT) -> Iterator[tuple[Mesh, socket.socket]]:
    """Rank 1 of 2, and the bare socket that plays rank 0."""
    from fedge.edge.llm.mesh.collectives import Group

    ours, theirs = socket.socketpair()
    mesh = Mesh(Group(1, 2, {0: Link(0, Plain(ours, limits.step_timeout_s), 3, limits)}), limits)
    with mesh, theirs:
        yield mesh, theirs


def _frame(kind: int, payload: bytes, **other: int) -> bytes:
    fields = {"magic": MAGIC, "kind": kind, "coding": FLOAT32, "epoch": 3, "sequence": 0, "size": len(payload)} | other
    return HEADER.pack(*fields.values()) + payload


def _step_bytes(told: bytes, rows: int, columns: int, x: bytes) -> bytes:
    return struct.pack("<III", len(told), rows, columns) + told + x


BAD_STEPS = {
    "nothing": _frame(STEP, b""),
    "other magic": _frame(STEP, b"", magic=1),
    "other epoch": _frame(STEP, b"", epoch=2),
    "sent again": _frame(STEP, b"", sequence=7),
    "a part": _frame(PART, b"1234"),
    "too long": _frame(STEP, b"", size=SHORT.max_frame_bytes + 1),
    "half a header": _frame(STEP, b"")[:9],
    "half a frame": _frame(STEP, b"x" * 64)[:40],
    "no step": _frame(STEP, _step_bytes(b"garbage!", 1, 1, bytes(4))),
    "other sizes": _frame(STEP, _step_bytes(b"", 2, 2, bytes(4))),
    "other tokens": _frame(STEP, _step_bytes(encode(STEP_OF_3), 2, 1, bytes(8))),
    "sizes that overflow": _frame(STEP, _step_bytes(b"", 0xFFFFFFFF, 0xFFFFFFFF, b"")),
}


@pytest.mark.parametrize("sent", BAD_STEPS.values(), ids=BAD_STEPS.keys())
@pytest.mark.parametrize("hang_up", [True, False])
def test_a_frame_that_is_no_step_loses_the_rank(sent: bytes, hang_up: bool) -> None:
    with _mesh_against_bytes() as (mesh, theirs):
        theirs.sendall(sent)
        if hang_up:
            theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(RankLost):  # a wait that never ends would meet the limit of the test
            mesh.receive_step()
        _assert_ended(theirs)


def _assert_ended(theirs: socket.socket) -> None:
    """The other rank is not left to wait until it takes silence for a loss."""
    theirs.settimeout(20)
    with contextlib.suppress(ConnectionResetError):  # where it had sent more than was read
        while theirs.recv(100):
            pass


def test_no_room_is_made_for_a_frame_above_the_limit() -> None:
    with _mesh_against_bytes() as (mesh, theirs):
        theirs.sendall(BAD_STEPS["too long"])
        with pytest.raises(RankLost, match="more than max_frame_bytes"):
            mesh.receive_step()


BAD_PARTS = {
    "shorter": _frame(PART, bytes(12)),
    "longer": _frame(PART, bytes(20)),
    "other coding": _frame(PART, bytes(16), coding=1),
    "other kind": _frame(STEP, bytes(16)),
    "other epoch": _frame(PART, bytes(16), epoch=4),
    "sent again": _frame(PART, bytes(16), sequence=7),
    "silence": b"",
}


@pytest.mark.parametrize("sent", BAD_PARTS.values(), ids=BAD_PARTS.keys())
def test_a_part_that_is_not_due_loses_the_rank(sent: bytes) -> None:
    with _mesh_against_bytes() as (mesh, theirs):
        theirs.sendall(sent)
        with pytest.raises(RankLost, match="Rank 0"):
            mesh.allreduce(np.ones(4, np.float32))
        _assert_ended(theirs)


def test_a_part_in_many_pieces_is_as_good_as_one() -> None:
    with _mesh_against_bytes(LIMITS) as (mesh, theirs):
        sent = _frame(PART, np.arange(4, dtype=np.float32).tobytes())

        def trickle() -> None:
            for at in range(len(sent)):
                theirs.sendall(sent[at : at + 1])

        total, _ = in_threads([lambda: mesh.allreduce(np.ones(4, np.float32)), trickle])
        np.testing.assert_array_equal(np.asarray(total), [1, 2, 3, 4])


def test_random_frames_never_do_more_than_lose_the_rank() -> None:
    dice = random.Random(5)
    seen = 0
    for _ in range(2000):
        sent = bytearray(_frame(STEP, _step_bytes(b"", 0, 4, b"")) if dice.random() < 0.7 else dice.randbytes(60))
        for _ in range(dice.randint(1, 4)):
            sent[dice.randrange(len(sent))] = dice.randrange(256)
        with _mesh_against_bytes() as (mesh, theirs):
            theirs.sendall(sent)
            theirs.close()
            try:
                received = mesh.receive_step() if dice.random() < 0.5 else mesh.allreduce(np.ones(4, np.float32))
            except RankLost:
                seen += 1
            else:
                assert received is None or isinstance(received, tuple | np.ndarray)
    assert seen > 1500


# Meeting.


def _join(rank: int, size: int, addresses: list[str], listener: socket.socket, **other: Any) -> Any:
    more = {"key": KEY, "epoch": 3, "limits": SHORT} | other
    with connect(rank, size, addresses, more.pop("key"), more.pop("epoch"), listener=listener, **more) as mesh:
        return float(mesh.allreduce(np.ones(4, np.float32)).sum())


def _meet(size: int, others: dict[int, dict[str, Any]], stranger: Callable[[int], None] | None = None) -> list[Any]:
    """All ranks connect, some with other settings; `stranger` is given rank 0's port before that."""
    made, addresses = listeners(size)
    try:
        if stranger is not None:
            stranger(made[0].getsockname()[1])
        works = [
            lambda rank=rank: _join(rank, size, addresses, made[rank], **others.get(rank, {})) for rank in range(size)
        ]
        return in_threads(works)
    finally:
        for one in made:
            one.close()


OUTSIDERS: list[dict[str, Any]] = [{"key": b"x" * 32}, {"epoch": 2}]


@pytest.mark.parametrize("other", OUTSIDERS, ids=["key", "epoch"])
@pytest.mark.parametrize("who", [0, 2])
def test_another_key_or_epoch_is_not_let_in_and_the_missing_are_named(other: dict[str, Any], who: int) -> None:
    results = _meet(3, {who: other})
    for rank, result in enumerate(results):
        if rank != who and who == 2:
            assert "missing" in str(lost(result))
            assert lost(result).rank == 2
        assert isinstance(result, RankLost)


def test_another_idea_of_the_group_is_not_let_in() -> None:
    made, addresses = listeners(3)
    works = [
        lambda: _join(0, 2, addresses[:2], made[0]),
        lambda: _join(1, 3, addresses, made[1]),
    ]
    for result, missing in zip(in_threads(works), ("1: it did not come", "2: it did not come")):
        assert missing in str(lost(result))
    for one in made:
        one.close()


def test_who_cannot_prove_the_key_is_neither_let_in_nor_given_a_proof() -> None:
    made, addresses = listeners(2)
    greeting = handshake.HELLO.pack(handshake.MAGIC, 3, 2, 1, 0, bytes(32))

    def dialler() -> int:
        with socket.create_connection(made[0].getsockname()) as sock:
            sock.sendall(greeting + bytes(handshake.MAC_BYTES))
            got = 0
            while piece := sock.recv(100):
                got += len(piece)
            return got

    def acceptor() -> bytes:
        made[0].settimeout(20)
        with made[0].accept()[0] as sock:
            sock.recv(handshake.HELLO.size, socket.MSG_WAITALL)
            sock.sendall(bytes(handshake.NONCE_BYTES + handshake.MAC_BYTES))
            return sock.recv(1)

    got, refused = in_threads([dialler, lambda: _join(0, 2, addresses, made[0])])
    assert got == handshake.NONCE_BYTES + handshake.MAC_BYTES  # and no READY after them
    assert "missing" in str(lost(refused))
    got, refused = in_threads([acceptor, lambda: _join(1, 2, addresses, made[1])])
    assert got == b""
    assert "missing" in str(lost(refused))
    for one in made:
        one.close()


def test_strangers_disturb_nobody() -> None:
    kept: list[socket.socket] = []

    def stranger(port: int) -> None:
        dice = random.Random(1)
        for at in range(12):
            sock = socket.create_connection(("127.0.0.1", port))
            kept.append(sock)  # some say nothing at all, and stay
            if at % 3:
                sock.sendall(dice.randbytes(at * 20))

    results = _meet(3, {rank: {"limits": LIMITS} for rank in range(3)}, stranger)
    for sock in kept:
        sock.close()
    assert results == [12.0] * 3


def test_a_rank_that_comes_late_is_waited_for_and_one_that_never_comes_is_named() -> None:
    made, addresses = listeners(3)
    made[1].close()
    made[1] = socket.socket()
    made[1].bind(("127.0.0.1", 0))  # its port is its own, but nobody listens there yet
    addresses[1] = f"127.0.0.1:{made[1].getsockname()[1]}"

    def late() -> Any:
        time.sleep(0.3)
        made[1].listen()
        return _join(1, 3, addresses, made[1], limits=LIMITS)

    works: list[Callable[[], Any]] = [
        lambda: _join(0, 3, addresses, made[0], limits=LIMITS),
        late,
        lambda: _join(2, 3, addresses, made[2], limits=LIMITS),
    ]
    assert in_threads(works) == [12.0] * 3
    begun = time.monotonic()
    with pytest.raises(RankLost, match=r"\(1: it did not come; 2: it did not come\)") as caught:
        _join(0, 3, addresses, made[0])
    assert caught.value.rank == 1
    assert time.monotonic() - begun < 20
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("rank", "addresses", "other", "why"),
    [
        (1, ["192.0.2.1:5", "127.0.0.1:6"], {}, "TLS"),
        (1, ["device.example:5", "127.0.0.1:6"], {}, "TLS"),
        (1, ["127.0.0.1", "127.0.0.1:6"], {}, "host:port"),
        (1, ["127.0.0.1:70000", "127.0.0.1:6"], {}, "host:port"),
        (2, ["127.0.0.1:5", "127.0.0.1:6"], {}, "is no group"),
        (0, ["127.0.0.1:5"] * 3, {"key": b"short"}, "longer"),
        (0, ["127.0.0.1:5"] * 3, {"epoch": -1}, "count from 0"),
        (0, ["127.0.0.1:5"] * 3, {"collective": "ring"}, "choose one of"),
    ],
)
def test_what_can_never_work_is_refused_at_once(
    rank: int, addresses: list[str], other: dict[str, Any], why: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ExperimentError, match=why):
        _join(rank, len(addresses), addresses, listener, **other)


def test_who_still_meets_others_is_not_taken_for_silent() -> None:
    made, addresses = listeners(3)
    patient = replace(LIMITS, step_timeout_s=1.0)
    with Relay(addresses[1]) as relay:
        relay.cut()  # rank 0 meets both others, while they do not meet each other yet
        threading.Timer(1.5, relay.restore).start()
        ways = [addresses, addresses, [addresses[0], relay.address, addresses[2]]]
        works = [
            lambda rank=rank: _join(rank, 3, ways[rank], made[rank], limits=patient, collective="full")
            for rank in range(3)
        ]
        assert in_threads(works) == [12.0] * 3
    for one in made:
        one.close()


def test_a_slow_link_is_measured_and_its_cut_loses_the_rank() -> None:
    made, addresses = listeners(2)
    with Relay(addresses[0], up_bps=50e6, down_bps=50e6, rtt_s=0.02) as relay:

        def work(rank: int, epoch: int) -> Any:
            through = [relay.address, addresses[1]]
            with connect(rank, 2, through, KEY, epoch, listener=made[rank], limits=LIMITS) as mesh:
                if rank:
                    threading.Timer(0.2, relay.cut).start()
                with pytest.raises(RankLost):
                    _sum_forever(mesh, 4)
                return mesh.speed

        for epoch in range(8):  # what holds this machine up while it measures makes the link look slower or faster
            relay.restore()
            speeds = in_threads([partial(work, rank, epoch) for rank in range(2)])
            if isinstance(speeds[0], LinkSpeed) and 5e6 < speeds[0].bandwidth_bps < 70e6:
                break
    for one in made:
        one.close()
    assert speeds[0] == speeds[1]
    assert isinstance(speeds[0], LinkSpeed), speeds
    assert speeds[0].round_trip_s >= 0.02
    assert 5e6 < speeds[0].bandwidth_bps < 70e6


def test_a_mesh_of_a_new_epoch_uses_the_same_listeners() -> None:
    made, addresses = listeners(2)
    for epoch in (1, 2):
        works = [
            lambda rank=rank, epoch=epoch: _join(rank, 2, addresses, made[rank], epoch=epoch, limits=LIMITS)
            for rank in range(2)
        ]
        assert in_threads(works) == [8.0] * 2
    for one in made:
        one.close()
