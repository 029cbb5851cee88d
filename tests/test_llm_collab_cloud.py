"""A cloud that continues what devices begin gives the whole model's tokens, whatever comes in between."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedge.core.errors import AddressError, ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.collab import wire
from fedge.edge.llm.collab.cloud import cloud_at, serve_cloud
from fedge.edge.llm.collab.wire import GREEDY, STATES_MISSING, Forget, Hidden, Want
from fedge.edge.llm.engine.sampler import Sampling, sample
from fedge.edge.llm.mesh.security import Ticket, make_ticket, read_key, read_ticket
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.shards.shard import export
from fedge.edge.llm.shards.shares import even
from fedge.protos import llm_pb2 as pb
from tests.llm_cloud import KERNEL, LAYER, LAYERS, Halves, Line, halves, line, meet
from tests.llm_reference import logits

IDS = np.random.default_rng(7).integers(0, 128, 40).tolist()
OTHERS = np.random.default_rng(8).integers(0, 128, 40).tolist()


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    return halves(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(cut: Halves) -> Iterator[str]:
    with cloud_at(cut.cloud, "127.0.0.1:0", kernel=KERNEL, slots=3) as found:
        yield found


@pytest.fixture
def device(address: str, cut: Halves) -> Iterator[Line]:
    with line(address, cut.digest) as opened:
        yield opened


@pytest.mark.parametrize("sizes", [[1] * 40, [40], [7, 1, 1, 20, 11]], ids=["one by one", "at once", "some"])
def test_every_token_is_the_whole_model_s(device: Line, cut: Halves, sizes: list[int]) -> None:
    x, wanted = cut.states(IDS), cut.greedy(IDS)
    start = 0
    for size in sizes:
        device.put("a", start, x[start : start + size])
        start += size
        assert device.token("a", start - 1) == wanted[start - 1]


def test_a_token_may_be_asked_for_while_later_states_have_come_and_again(device: Line, cut: Halves) -> None:
    device.put("a", 0, cut.states(IDS))
    wanted = cut.greedy(IDS)
    for position in (5, 5, 6, 30, 30, 39, 39):
        assert device.token("a", position) == wanted[position]
    device.want("a", 38)
    assert (device.hear().reason, device.known("a")) == (STATES_MISSING, 0)  # too far back: all from the start


def test_states_that_repeat_or_overlap_change_nothing(device: Line, cut: Halves) -> None:
    x, wanted = cut.states(IDS), cut.greedy(IDS)
    for start, stop in ((0, 9), (0, 9), (3, 12), (11, 12), (2, 5), (0, 20)):
        device.put("a", start, x[start:stop])
    assert device.known("a") == 20
    assert device.token("a", 19) == wanted[19]
    device.put("a", 0, np.zeros((20, 64), np.float32))
    device.put("a", 15, x[15:25])
    assert device.token("a", 24) == wanted[24]


def test_a_gap_is_told_once_and_mended_from_what_is_known(device: Line, cut: Halves) -> None:
    x, wanted = cut.states(IDS), cut.greedy(IDS)
    device.put("a", 0, x[:8])
    device.put("a", 10, x[10:12])
    device.put("a", 12, x[12:14])
    told = device.hear()
    assert (told.id, told.session, told.reason, told.known) == (0, "a", STATES_MISSING, 8)
    number = device.want("a", 13)
    told = device.hear()
    assert (told.id, told.reason, told.known) == (number, STATES_MISSING, 8)
    device.put("a", 8, x[8:14])
    assert device.token("a", 13) == wanted[13]
    for _ in range(2):  # another gap is told again, be it the same
        device.put("b", 5, x[5:6])
        told = device.hear()
        assert (told.session, told.reason, told.known) == ("b", STATES_MISSING, 0)
        device.put("b", 0, x[:5])
        device.send(wire.asked_bytes(Forget("b")))


def test_a_cut_stream_goes_on_over_the_next_one(address: str, cut: Halves) -> None:
    x, wanted = cut.states(IDS), cut.greedy(IDS)
    with line(address, cut.digest) as first:
        first.put("a", 0, x[:10])
        assert first.token("a", 9) == wanted[9]
        first.put("a", 10, x[10:15])
    with line(address, cut.digest, client=first.client) as second:
        known = second.known("a")
        assert 10 <= known <= 15
        assert second.known("b") == 0
        second.put("a", 8, x[8:20])
        assert second.token("a", 19) == wanted[19]
        with line(address, cut.digest) as other:  # of another device, though by the same name
            assert other.known("a") == 0


def test_a_device_s_next_stream_takes_the_place_of_the_one_before(address: str, cut: Halves) -> None:
    x = cut.states(IDS)
    with line(address, cut.digest) as first:
        first.put("a", 0, x[:4])
        assert first.known("a") == 4
        with line(address, cut.digest, client=first.client) as second:
            assert second.known("a") == 4
            with pytest.raises((EOFError, grpc.RpcError)):
                first.hear()
            first.put("a", 4, x[4:8])
            assert second.known("a") == 4


def test_who_says_nothing_more_is_still_answered(device: Line, cut: Halves) -> None:
    device.put("a", 0, cut.states(IDS))
    device.want("a", 39)
    device.finish()
    assert device.hear().token == cut.greedy(IDS)[39]
    with pytest.raises(EOFError):
        device.hear()


def test_tenants_that_share_passes_get_the_tokens_of_each_alone(address: str, cut: Halves) -> None:
    texts = [IDS, OTHERS, IDS[::-1], OTHERS[::-1]]  # more than there are slots
    sent = [cut.states(ids) for ids in texts]
    found: list[list[int]] = [[] for _ in texts]

    def work(at: int) -> None:
        with line(address, cut.digest) as one:
            while len(found[at]) < len(IDS):
                position = len(found[at])
                one.put("a", position, sent[at][position : position + 1])
                one.want("a", position)
                while (told := one.hear()).reason == STATES_MISSING:  # its slot has gone to another
                    one.put("a", told.known, sent[at][told.known : position + 1])
                    if told.id:
                        one.want("a", position)
                assert told.reason == ""
                found[at].append(told.token)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [cut.greedy(ids) for ids in texts]


def test_many_sessions_over_one_stream_are_answered_each_by_its_name(device: Line, cut: Halves) -> None:
    lengths = {"a": 40, "b": 3, "c": 17}
    x, wanted = cut.states(IDS), cut.greedy(IDS)
    for session, length in lengths.items():
        device.put(session, 0, x[:length])
    for session, length in lengths.items():
        device.want(session, length - 1)
    told = [device.hear() for _ in lengths]
    assert {one.session: one.token for one in told} == {name: wanted[length - 1] for name, length in lengths.items()}


def _continued(cut: Halves, ids: list[int], count: int) -> list[int]:
    """The whole model's own continuation."""
    found = list(ids)
    for _ in range(count):
        found.append(cut.greedy(found)[-1])
    return found[len(ids) :]


@pytest.mark.parametrize("right", range(5))
def test_guesses_are_counted_until_the_first_wrong_one(device: Line, cut: Halves, right: int) -> None:
    prompt, more = IDS[:6], _continued(cut, IDS[:6], 8)
    guesses = more[:right] + [(token + 1) % 128 for token in more[right:4]]
    device.put("a", 0, cut.states(prompt + guesses))
    number = device.verify("a", 5, guesses)
    told = device.hear()
    assert (told.id, told.reason, told.accepted, told.token) == (number, "", right, more[right])
    assert told.known == device.known("a") == 6 + right
    ids = prompt + more[: right + 1]  # what is right goes on
    device.put("a", 6 + right, cut.states(ids)[6 + right :])
    assert device.token("a", len(ids) - 1) == more[right + 1]
    assert device.known("a") == len(ids)


def test_a_verification_may_be_asked_for_again(device: Line, cut: Halves) -> None:
    more = _continued(cut, IDS[:6], 4)
    guesses = [more[0], (more[1] + 1) % 128, 5]
    for _ in range(2):
        device.put("a", 0, cut.states(IDS[:6] + guesses))
        device.verify("a", 5, guesses)
        told = device.hear()
        assert (told.reason, told.accepted, told.token, told.known) == ("", 1, more[1], 7)
    device.verify("a", 5, [])
    assert (device.hear().token, device.known("a")) == (more[0], 6)


def test_tokens_are_drawn_by_seed_and_position_on_both_ends(device: Line, cut: Halves) -> None:
    sampling = Sampling(temperature=1.5, top_k=20, seed=11, logit_bias={3: 1.0})
    whole = logits(cut.whole, IDS)
    wanted = [sample(row, sampling, {}, at + 1) for at, row in enumerate(whole)]
    assert wanted != cut.greedy(IDS)
    device.put("a", 0, cut.states(IDS))
    assert [device.token("a", at, sampling=sampling) for at in (3, 4, 20)] == [wanted[at] for at in (3, 4, 20)]
    device.put("b", 0, cut.states([*IDS[:10], wanted[9], 0]))
    device.verify("b", 9, [wanted[9], 0], sampling=sampling)
    assert device.hear().accepted >= 1


def _states(message: bytes) -> Hidden:
    found = wire.asked(message, 64)
    assert isinstance(found, Hidden)
    return found


@pytest.mark.parametrize(("coding", "most"), [("f32", 0.0), ("f16", 5e-3), ("u8", 0.1)])
def test_states_survive_their_coding(coding: Any, most: float) -> None:
    x = np.random.default_rng(1).standard_normal((300, 64), np.float32) * 4
    x[7] = 1.25  # a row without a range
    messages = wire.states("s", 5, x, coding, max_bytes=8000)
    assert len(messages) > 1
    assert max(map(len, messages)) <= 8000
    found = [_states(message) for message in messages]
    assert [one.start for one in found] == [5, *(5 + np.cumsum([len(one.rows) for one in found])[:-1])]
    assert np.abs(np.concatenate([one.rows for one in found]) - x).max() <= most
    large = _states(wire.states("s", 0, x * 1e5, coding)[0]).rows
    assert np.abs(large / 1e5 - x).max() <= 1e-5


def test_what_would_be_late_is_not_computed(address: str, device: Line, cut: Halves) -> None:
    device.put("a", 0, cut.states(IDS))
    assert device.token("a", 10) == cut.greedy(IDS)[10]
    number = device.want("a", 39, deadline_s=1e-6)
    told = device.hear()
    assert (told.id, told.reason, told.known) == (number, "TOO_LATE", 40)
    assert device.token("a", 39) == cut.greedy(IDS)[39]


def test_a_session_that_is_over_is_gone(device: Line, cut: Halves) -> None:
    device.put("a", 0, cut.states(IDS))
    assert device.token("a", 39) == cut.greedy(IDS)[39]
    device.send(wire.asked_bytes(Forget("a")))
    assert device.known("a") == 0
    device.put("a", 0, cut.states(OTHERS))
    assert device.token("a", 39) == cut.greedy(OTHERS)[39]


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "noise": (lambda: b"\xff\xff\xff", "BAD_DATA"),
    "nothing": (lambda: b"", "BAD_DATA"),
    "no question": (lambda: pb.Ask(session="s").SerializeToString(), "BAD_DATA"),
    "no session": (lambda: wire.asked_bytes(Want("", 1, 0, 1.0)), "BAD_DATA"),
    "a long name": (lambda: wire.asked_bytes(Want("s" * 65, 1, 0, 1.0)), "BAD_DATA"),
    "no deadline": (lambda: wire.asked_bytes(Want("s", 1, 0, 0.0)), "BAD_DATA"),
    "no time": (lambda: wire.asked_bytes(Want("s", 1, 0, float("nan"))), "BAD_DATA"),
    "no states": (lambda: wire.asked_bytes(Want("s", 1, 0, 1.0)), STATES_MISSING),
    "too many guesses": (lambda: wire.asked_bytes(wire.Verify("s", 1, 0, (1,) * 17, 1.0)), "BAD_DATA"),
    "penalties": (lambda: wire.asked_bytes(Want("s", 1, 0, 1.0, Sampling(presence_penalty=1.0))), "BAD_DATA"),
    "no sampling": (lambda: _want(sampling=b"{"), "BAD_DATA"),
    "cold": (lambda: _want(sampling=b'{"temperature":-1}'), "BAD_EXPERIMENT"),
    "a coding": (lambda: _hidden(count=1, coding="f64", data=bytes(512)), "BAD_DATA"),
    "few bytes": (lambda: _hidden(count=2, coding="f32", data=bytes(256)), "BAD_DATA"),
    "no number": (lambda: _hidden(count=1, coding="f32", data=b"\xff" * 256), "BAD_DATA"),
    "no range": (lambda: _hidden(count=1, coding="u8", data=b"\xff\xff\x7f\x7f" * 18), "BAD_DATA"),
    "too long": (lambda: _hidden(count=1, coding="f32", data=bytes((4 << 20) + 1)), "BAD_DATA"),
    "beyond the context": (lambda: wire.states("s", 0, np.zeros((257, 64), np.float32), "f32")[0], "BAD_DATA"),
}


def _want(**fields: Any) -> bytes:
    data: bytes = pb.Ask(session="s", want=pb.Want(id=1, deadline_s=1.0, **fields)).SerializeToString()
    return data


def _hidden(**fields: Any) -> bytes:
    data: bytes = pb.Ask(session="s", hidden=pb.Hidden(**fields)).SerializeToString()
    return data


@pytest.mark.parametrize("name", REFUSED)
def test_a_message_out_of_order_is_refused_by_itself(device: Line, cut: Halves, name: str) -> None:
    make, reason = REFUSED[name]
    device.put("a", 0, cut.states(IDS[:3]))
    device.send(make())
    told = device.hear()
    assert told.reason == reason
    assert told.detail.endswith(".")
    assert device.known("s") == 0
    assert device.token("a", 2) == cut.greedy(IDS[:3])[2]


def test_who_comes_with_another_model_is_told_so(address: str, cut: Halves) -> None:
    met = meet(address, cut.digest)
    assert (met.model, met.context) == (cut.digest, 256)
    others: list[dict[str, Any]] = [{"protocol": 9}, {"layer": 1}, {"model": "0" * 64}]
    for other in others:
        with pytest.raises(grpc.RpcError) as refused:
            meet(address, **{"model": cut.digest, **other})
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert refused.value.details().endswith(("fedge.", "cut."))
    for other in [*others[1:], {"client": "me"}]:
        with line(address, **{"model": cut.digest, **other}) as stream, pytest.raises(grpc.RpcError, match="use|send"):
            stream.hear()


def test_off_loopback_there_is_tls_and_a_ticket(cut: Halves, tmp_path: Path) -> None:
    with pytest.raises(AddressError, match="ticket"), cloud_at(cut.cloud, "0.0.0.0:0", kernel=KERNEL):
        pass
    ticket = read_ticket(make_ticket(tmp_path / "right"))
    other = read_ticket(make_ticket(tmp_path / "wrong"))
    more: dict[str, Any] = {"ticket": ticket, "key": read_key(tmp_path / "right"), "kernel": KERNEL, "slots": 1}
    with cloud_at(cut.cloud, "0.0.0.0:0", **more) as address:
        address = f"127.0.0.1:{address.rpartition(':')[2]}"
        assert meet(address, cut.digest, ticket=ticket).model == cut.digest
        with line(address, cut.digest, ticket=ticket) as device:
            device.put("a", 0, cut.states(IDS[:5]))
            assert device.token("a", 4) == cut.greedy(IDS[:5])[4]
        stolen = Ticket(ticket.certificate, other.token)
        with pytest.raises(grpc.RpcError, match="ticket"):
            meet(address, cut.digest, ticket=stolen)
        with line(address, cut.digest, ticket=stolen) as device, pytest.raises(grpc.RpcError, match="ticket"):
            device.hear()
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            meet(address, cut.digest, ticket=other)


@pytest.fixture
def small(cut: Halves, request: pytest.FixtureRequest) -> Iterator[str]:
    limits = replace(LlmLimits(), **request.param)
    with cloud_at(cut.cloud, "127.0.0.1:0", kernel=KERNEL, slots=2, limits=limits) as found:
        yield found


POSITION_BYTES = 64 * 4 + (LAYERS - LAYER) * 2 * 2 * 16 * 4  # a state, and keys and values of the upper layers


@pytest.mark.parametrize("small", [{"max_session_bytes": 30 * POSITION_BYTES}], indirect=True)
def test_a_session_has_a_most(small: str, cut: Halves) -> None:
    x = cut.states(IDS)
    with line(small, cut.digest) as device:
        assert meet(small, cut.digest).context == 30
        device.put("a", 0, x[:30])
        device.put("a", 30, x[30:31])
        told = device.hear()
        assert (told.reason, told.session, told.known) == ("BAD_DATA", "a", 30)
        assert device.token("a", 29) == cut.greedy(IDS)[29]


@pytest.mark.parametrize("small", [{"max_context_bytes": 90 * POSITION_BYTES}, {"max_sessions": 2}], indirect=True)
def test_where_all_is_full_the_longest_unused_session_leaves(small: str, cut: Halves) -> None:
    x, wanted = cut.states(IDS), cut.greedy(IDS)
    with line(small, cut.digest) as one, line(small, cut.digest) as other:
        one.put("a", 0, x)
        one.put("b", 0, x)
        assert one.token("a", 39) == wanted[39]  # used after b
        other.put("c", 0, x)
        assert other.token("c", 39) == wanted[39]
        assert (one.known("b"), one.known("a"), other.known("c")) == (0, 40, 40)
        number = one.want("b", 39)
        told = one.hear()
        assert (told.id, told.reason, told.known) == (number, STATES_MISSING, 0)


@pytest.mark.parametrize("small", [{"max_untold": 4, "unread_s": 0.2}], indirect=True)
def test_who_reads_no_reply_is_cut_off_and_holds_nobody_up(small: str, cut: Halves) -> None:
    little = [("grpc.http2.lookahead_bytes", 1 << 14), ("grpc.http2.bdp_probe", 0)]  # that gRPC reads by itself
    with grpc.insecure_channel(small, little) as opened, line(small, cut.digest) as device:
        talk = opened.stream_stream(f"/{wire.SERVICE}/Talk", None, None)
        assert _listeners(1)
        deaf = talk(itertools.repeat(b"\xff"), metadata=wire.metadata("0" * 32, cut.digest, LAYER))
        assert _listeners(2)
        device.put("a", 0, cut.states(IDS))
        assert device.token("a", 39) == cut.greedy(IDS)[39]
        assert _listeners(1)
        assert device.token("a", 39) == cut.greedy(IDS)[39]
        deaf.cancel()


def _listeners(count: int) -> bool:
    """Whether so many streams come to be open in this process."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if sum(thread.name == "fedge-asks" for thread in threading.enumerate()) == count:
            return True
        time.sleep(0.002)
    return False


def _serve(path: Path, listen: str, pipe: Any) -> None:
    serve_cloud(path, listen, on_listening=pipe.send, kernel=KERNEL, slots=2)


@contextmanager
def process(cut: Halves, listen: str) -> Iterator[tuple[Any, str]]:
    """A cloud of its own, and its address."""
    ours, theirs = multiprocessing.Pipe()
    running = multiprocessing.get_context("spawn").Process(target=_serve, args=(cut.cloud, listen, theirs))
    running.start()
    try:
        assert ours.poll(60)
        yield running, ours.recv()
    finally:
        running.kill()
        running.join()
        ours.close()
        theirs.close()


@pytest.mark.slow
def test_a_cloud_that_was_killed_begins_anew_and_one_that_is_told_to_end_ends(cut: Halves) -> None:
    x, wanted = cut.states(IDS), cut.greedy(IDS)
    with process(cut, "127.0.0.1:0") as (first, address), line(address, cut.digest) as device:
        device.put("a", 0, x[:20])
        assert device.token("a", 19) == wanted[19]
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(grpc.RpcError):
            device.hear()
        client = device.client
    with process(cut, address) as (second, _):
        with line(address, cut.digest, client=client) as device:
            device.put("a", 20, x[20:21])
            assert (device.hear().reason, device.known("a")) == (STATES_MISSING, 0)
            device.put("a", 0, x[:21])
            assert device.token("a", 20) == wanted[20]
        os.kill(second.pid, signal.SIGTERM)
        second.join(60)
        assert second.exitcode == 0


def test_only_the_upper_part_of_a_model_is_served(cut: Halves, tmp_path: Path) -> None:
    with open_folder(cut.whole) as opened:
        lower = export(opened, tmp_path, even(opened.config, 1), "float32", layers=(0, 2), with_head=True)[0]
        ranks = export(opened, tmp_path, even(opened.config, 2), "float32", layers=(2, 4))
    for path in (lower, *ranks):
        with pytest.raises(ModelError, match="upper part"), cloud_at(path, "127.0.0.1:0", kernel=KERNEL):
            pass


def _mutated(random: np.random.Generator, seeds: list[bytes]) -> bytes:
    """A message, some of whose bytes are others, or gone, or more."""
    data = bytearray(seeds[int(random.integers(len(seeds)))])
    for _ in range(int(random.integers(1, 6))):
        at = int(random.integers(len(data) + 1))
        match int(random.integers(4)):
            case 0:
                data[at : at + 1] = random.bytes(1)
            case 1:
                del data[at : at + int(random.integers(1, 9))]
            case 2:
                data[at:at] = random.bytes(int(random.integers(1, 9)))
            case _:
                data = bytearray(random.bytes(int(random.integers(40)))) if not random.integers(8) else data
    return bytes(data)


@pytest.mark.slow
def test_ten_thousand_messages_that_may_be_anything_break_nothing(address: str, cut: Halves) -> None:
    random = np.random.default_rng(3)
    x, wanted = cut.states(IDS), cut.greedy(IDS)
    sampling = Sampling(temperature=0.7, seed=1, logit_bias={1: 1.0})
    seeds = [
        wire.states(name, start, x[start : start + 3], coding)[0]
        for name in "st"
        for start in (0, 3)
        for coding in wire.CODINGS
    ]
    seeds += [wire.asked_bytes(Want("s", 1, 2, 1.0, how)) for how in (GREEDY, sampling)]
    seeds += [wire.asked_bytes(wire.Verify("t", 2, 1, (3, 4), 1.0, sampling)), wire.asked_bytes(Forget("s"))]
    with line(address, cut.digest) as wild, line(address, cut.digest) as good:
        good.put("a", 0, x)
        for _ in range(10):
            wild.send(*(_mutated(random, seeds) for _ in range(1000)))
            assert good.token("a", 39) == wanted[39]
        wild.put("a", 0, x)
        last = 1 << 40
        wild.send(wire.asked_bytes(Want("a", last, 39, 60.0)))
        reasons: dict[str, int] = {}
        while (told := wild.hear()).id != last or told.session != "a":
            reasons[told.reason] = reasons.get(told.reason, 0) + 1
        assert told.token == wanted[39]
    assert set(reasons) <= {"", "BAD_DATA", "BAD_EXPERIMENT", "BAD_MODEL", "OVERLOADED", "TOO_LATE", STATES_MISSING}
    assert reasons["BAD_DATA"] > 1000
    assert reasons[""] > 10
