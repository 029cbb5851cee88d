"""Who may hold a call of a model's head or of its cloud, and for how long: without the ticket nobody, with it nobody
who says nothing, and at the end of the interpreter nothing is waited for.
"""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from fedge.core.limits import LlmLimits
from fedge.edge.llm.collab import cloud, wire
from fedge.edge.llm.collab.cloud import ContinueService
from fedge.edge.llm.group import speeds
from fedge.edge.llm.group.messages import PROTOCOL
from fedge.edge.llm.group.roster import Roster
from fedge.edge.llm.group.service import SERVICE as RANKS
from fedge.edge.llm.group.service import Ranks
from fedge.edge.llm.mesh import control
from fedge.edge.llm.mesh.control import TOKEN
from fedge.edge.llm.mesh.security import Ticket
from fedge.protos import llm_pb2 as pb
from tests.llm_cloud import Line, meet
from tests.llm_device import until
from tests.llm_fixture import folder
from tests.llm_group_head import MEMORY, SPEED

MODEL = "a" * 64
LAYER = 2
WORD = Ticket("", "the word of the test")
WAIT_S = 60.0
METHODS = (f"{wire.SERVICE}/Meet", f"{wire.SERVICE}/Talk", f"{RANKS}/Join", f"{RANKS}/Fetch")


class NoContinuer:
    """What a cloud has, without a model."""

    context = hidden = 8

    def leave(self, owner: object) -> None:
        pass


@contextlib.contextmanager
def served(calls: int, limits: LlmLimits, ticket: Ticket | None = WORD) -> Iterator[str]:
    """Both services, for `calls` at a time."""
    service = ContinueService(NoContinuer(), MODEL, LAYER, limits)  # type: ignore[arg-type]
    ranks = Ranks(Roster(limits), pb.Welcome(protocol=PROTOCOL), lambda _: None, ticket, limits)

    class Both(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            return service.handler().service(details) or ranks.handler().service(details)

    listening = control.serve(Both(), "127.0.0.1:0", ticket, "", calls=calls, most_bytes=1 << 16)
    try:
        yield listening.address
    finally:
        listening.stop()


@contextlib.contextmanager
def silent(address: str, method: str, count: int, token: str) -> Iterator[list[Any]]:
    """So many calls of which only the headers are sent."""
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(2 * WAIT_S)
        return
        yield

    metadata = wire.metadata("0" * 32, MODEL, LAYER, token)
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.stream_stream(f"/{method}")
        try:
            yield [call(nothing(), metadata=metadata, timeout=WAIT_S) for _ in range(count)]
        finally:
            over.set()


def met(address: str) -> bool:
    """Whether a device with the ticket finds a call free."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary(f"/{METHODS[0]}", pb.MeetRequest.SerializeToString, pb.MeetReply.FromString)
        request = pb.MeetRequest(protocol=wire.PROTOCOL, model=MODEL, layer=LAYER)
        with contextlib.suppress(grpc.RpcError):
            return bool(call(request, metadata=[(TOKEN, WORD.token)], timeout=WAIT_S).model == MODEL)
        return False


@pytest.mark.parametrize("token", ["", "another word", "the word of the test "])
@pytest.mark.parametrize("method", METHODS)
def test_who_has_not_the_ticket_holds_no_call_though_he_says_nothing(method: str, token: str) -> None:
    with served(2, LlmLimits()) as address, silent(address, method, 2, token) as calls:
        assert [call.code() for call in calls] == [grpc.StatusCode.UNAUTHENTICATED] * 2
        assert "copy ticket.json" in calls[0].details()
        until(lambda: met(address))


@pytest.mark.parametrize("method", [one for one in METHODS if not one.endswith("Talk")])
def test_who_has_the_ticket_and_says_nothing_is_sent_away_after_a_while(method: str) -> None:
    with (
        served(2, replace(LlmLimits(), connect_timeout_s=0.2)) as address,
        silent(address, method, 2, WORD.token) as calls,
    ):
        assert [call.code() for call in calls] == [grpc.StatusCode.CANCELLED] * 2
        until(lambda: met(address))


@pytest.mark.parametrize("method", [one for one in METHODS if not one.endswith("Talk")])
def test_a_call_that_ends_without_a_message_is_told_so(method: str) -> None:
    with served(2, LlmLimits()) as address, grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{method}")(iter(()), metadata=[(TOKEN, WORD.token)], timeout=WAIT_S)
        assert (call.code(), call.details()) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "The call says nothing; install the same version of fedge.",
        )


def test_a_cloud_has_so_many_devices_at_a_time_and_one_that_comes_again_is_not_one_more() -> None:
    limits = replace(LlmLimits(), max_devices=2)
    service = ContinueService(NoContinuer(), MODEL, LAYER, limits)  # type: ignore[arg-type]
    listening = cloud.serve(service, "127.0.0.1:0", None, "", limits)
    with contextlib.ExitStack() as opened:
        opened.callback(listening.stop)
        lines = [opened.enter_context(talking(listening.address, str(one) * 32)) for one in range(2)]
        until(lambda: len(service._streams) == 2)
        with talking(listening.address, "2" * 32) as third, pytest.raises(grpc.RpcError, match="has its 2 devices"):
            third.hear()
        first = service._streams["0" * 32]
        opened.enter_context(talking(listening.address, "0" * 32))
        until(lambda: service._streams["0" * 32] is not first)
        assert meet(listening.address, MODEL).model == MODEL  # also where all streams are taken
        lines[1].close()
        until(lambda: len(service._streams) == 1)
        opened.enter_context(talking(listening.address, "2" * 32))
        until(lambda: len(service._streams) == 2)


@contextlib.contextmanager
def talking(address: str, client: str) -> Iterator[Line]:
    opened = Line(address, MODEL, client=client, layer=LAYER)
    try:
        yield opened
    finally:
        opened.close()


class Call:
    """What a handler is given, of a call that is not made."""

    def invocation_metadata(self) -> Any:
        return wire.metadata("0" * 32, MODEL, LAYER)

    def add_callback(self, _: object) -> bool:
        return True

    def peer(self) -> str:
        return "ipv4:127.0.0.1:7000"

    def cancel(self) -> None:
        pass


def test_a_device_that_no_thread_can_listen_to_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LlmLimits()
    service = ContinueService(NoContinuer(), MODEL, LAYER, limits)  # type: ignore[arg-type]
    roster = Roster(limits)
    ranks = Ranks(roster, pb.Welcome(protocol=PROTOCOL), lambda _: None, None, limits)
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name in ("fedge-asks", "fedge-reports"):
            raise RuntimeError("can't start new thread")
        start(thread)

    told = pb.Hello(protocol=PROTOCOL, name="a", incarnation="0" * 32, disk_bps=1.0, data_address=":7000")
    hello = pb.Report(hello=told).SerializeToString()
    monkeypatch.setattr(threading.Thread, "start", fail)
    for stream in (service.talk(iter(()), Call()), ranks.join(iter([hello]), Call())):
        with pytest.raises(RuntimeError, match="new thread"):
            next(stream)
    assert not service._streams
    assert not roster.members


def test_a_call_for_which_there_is_no_thread_is_lost_and_not_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert isinstance(control._Threads().submit(print).exception(), RuntimeError)  # gRPC's loop must see no exception


_SCRIPT = """
import sys
from pathlib import Path
import fedge.llm
from tests.llm_group_head import KERNEL
model, store, ranks, memory, code = sys.argv[1:]
settings = {"kind": "float32", "kernel": KERNEL, "memory_bytes": int(memory), "slots": 1, "context": 64}
engine = fedge.llm.Engine(model, ranks=int(ranks), store=Path(store), use_all=True, **settings)
print(len(engine.group.names), len(list(engine.generate([1, 5, 9], max_tokens=3))), flush=True)
sys.exit(int(code)) if int(code) > 1 else 1 / 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("memory", "code"), [(MEMORY, 7), (MEMORY, 1), (400_000, 7)])
def test_a_script_that_does_not_close_its_engine_ends_with_its_own_code(
    tmp_path: Path, ranks: int, memory: int, code: int
) -> None:
    """Also where its weights pass through a window, and by an exception."""
    store = tmp_path / "store"
    store.mkdir()
    (store / speeds.FILE).write_bytes(msgspec.json.encode(replace(SPEED, machine=speeds._machine())))
    model = folder(tmp_path, vocab=320, layers=6)
    words = [str(model), str(store), str(ranks), str(memory), str(code)]
    with subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as script:
        try:
            said, wrong = script.communicate(timeout=WAIT_S)
        finally:
            script.kill()
    assert script.returncode == code, wrong
    assert said.split()[0] == str(ranks)
    assert ("ZeroDivisionError" in wrong, wrong.count("Traceback")) == (code == 1, code == 1), wrong
