"""What a device and its cloud allow each other, and that both let go of everything: also where they fail half-way."""

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge import llm_runs
from fedge.core.errors import DataError, ExperimentError, ModelError, Overloaded, TooLong
from fedge.core.lanes import plain_products
from fedge.core.limits import LlmLimits
from fedge.edge.llm.api.openai_errors import ApiError
from fedge.edge.llm.api.openai_types import MAX_BIASES, completion
from fedge.edge.llm.collab import halves, wire
from fedge.edge.llm.collab import train as training
from fedge.edge.llm.collab.cloud import cloud_at
from fedge.edge.llm.collab.contexts import Contexts
from fedge.edge.llm.collab.decoder import Decoder, Settings, Token
from fedge.edge.llm.collab.device import device
from fedge.edge.llm.collab.engine import Engine
from fedge.edge.llm.collab.exits import untrained
from fedge.edge.llm.collab.halves import open_halves
from fedge.edge.llm.collab.segments import Segments
from fedge.edge.llm.collab.stream import Stream
from fedge.edge.llm.collab.wire import Told
from fedge.edge.llm.compute import choice, kernels
from fedge.edge.llm.compute.kernels import Kernel
from fedge.edge.llm.engine.requests import Piece, Request
from fedge.edge.llm.mesh.security import Ticket
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.models.tokenizer import Tokenizer
from tests.llm_cloud import Line
from tests.llm_device import GREEDY, KERNEL, Cut, blocks, cut_model, until
from tests.llm_fixture import folder

AWAY = "10.255.255.1:7460"  # nobody's, and never dialled
PROMPT = [3, 17, 90, 4, 55, 21]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Cut:
    return cut_model(tmp_path_factory.mktemp("cut"))


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = plain_products._within
    yield
    assert plain_products._within == before


# ---- who is dialled --------------------------------------------------------------------------------


def test_why_a_cloud_cannot_be_used_is_said_once(model: Cut, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    uplink = model.uplink(f"127.0.0.1:{port}")
    try:
        until(lambda: uplink._tries > 2)
    finally:
        uplink.close()
    said = [record.getMessage() for record in caplog.records if "exits answer until it can" in record.getMessage()]
    assert len(said) == 1
    assert str(port) in said[0]


@pytest.mark.parametrize("ticket", [None, Ticket("", "a token alone")])
def test_another_machine_s_cloud_is_not_dialled_without_a_ticket(model: Cut, ticket: Ticket | None) -> None:
    refused = pytest.raises(ExperimentError, match="give the ticket")
    with refused as caught, device(open_halves(model.halves.path), AWAY, Settings(), kernel=KERNEL, ticket=ticket):
        pass
    assert caught.value.exit_code == 2
    with pytest.raises(ExperimentError, match="another machine"):
        model.uplink(AWAY, ticket=ticket)
    with device(open_halves(model.halves.path), AWAY, Settings("standalone"), kernel=KERNEL):
        pass  # it is never asked


# ---- what a device may have of a cloud -------------------------------------------------------------


def rows(count: int) -> np.ndarray:
    return np.ones((count, 4), np.float32)


def test_a_device_with_many_sessions_loses_its_own_and_nobody_else_s() -> None:
    limits = replace(LlmLimits(), max_device_sessions=3, max_sessions=100)
    store = Contexts(slots=1, context=8, position_bytes=16, limits=limits)
    store.append(("quiet", "a"), 0, rows(1), 0.0)
    for at in range(200):
        store.append(("loud", str(at)), 0, rows(1), 1.0 + at)
    assert set(store.sessions) == {("quiet", "a"), *(("loud", str(at)) for at in (197, 198, 199))}
    for session in store.sessions.values():
        session.wanted = 1
    with pytest.raises(Overloaded, match="of this device"):
        store.append(("loud", "one more"), 0, rows(1), 300.0)
    store.append(("another", "a"), 0, rows(1), 300.0)


def test_a_device_with_long_sessions_loses_its_own_and_nobody_else_s() -> None:
    each = 4 * (16 + 16)  # four positions
    limits = replace(LlmLimits(), max_device_bytes=2 * each, max_context_bytes=100 * each)
    store = Contexts(slots=1, context=8, position_bytes=16, limits=limits)
    store.append(("quiet", "a"), 0, rows(4), 0.0)
    for at in range(5):
        store.append(("loud", str(at)), 0, rows(4), 1.0 + at)
    assert set(store.sessions) == {("quiet", "a"), ("loud", "3"), ("loud", "4")}
    store.forget(("loud", "3"))
    store.append(("loud", "5"), 0, rows(4), 9.0)
    assert set(store.sessions) == {("quiet", "a"), ("loud", "4"), ("loud", "5")}
    assert store.size_bytes == 3 * each


def test_a_cloud_takes_as_many_biases_as_the_api() -> None:
    last = (1 << 31) - 1
    biases = {str(last - at): -1.2345678901234567e-300 for at in range(1024)}
    asked = {"model": "tiny", "prompt": "a", "logit_bias": biases}
    sampling = completion(json.dumps(asked).encode()).template.sampling
    assert len(sampling.logit_bias) == MAX_BIASES
    got = wire.asked(wire.asked_bytes(wire.Want("1", 1, 5, 1.0, sampling)), 64)
    assert isinstance(got, wire.Want)
    assert got.sampling == sampling
    with pytest.raises(ApiError, match="logit_bias"):
        completion(json.dumps(asked | {"logit_bias": {str(last + 1): 1}}).encode())


def test_states_that_are_all_new_are_kept_without_a_copy() -> None:
    store = Contexts(slots=1, context=8, position_bytes=16)
    sent = rows(4)
    store.append(("x", "a"), 0, sent, 0.0)
    assert store.sessions["x", "a"].blocks[0] is sent


def test_a_stream_over_which_nothing_is_said_is_ended_and_the_next_one_goes_on(model: Cut) -> None:
    def said_now_and_then(line: Line) -> str:
        for at in range(4):  # together longer than it may be silent
            line.put("a", at, np.ones((1, 64), np.float32))
            time.sleep(0.2)
        assert line.known("a") == 4
        assert line.told.get(timeout=30) is None
        return line.client

    def goes_on(line: Line) -> None:
        assert line.known("a") == 4

    limits = replace(LlmLimits(), stream_idle_s=0.6)
    with cloud_at(model.cloud, "127.0.0.1:0", kernel=KERNEL, limits=limits) as address:
        client = over_one_that_stands(said_now_and_then, address, model.halves.model)
        over_one_that_stands(goes_on, address, model.halves.model, client=client)


def over_one_that_stands(work: Callable[[Line], Any], address: str, digest: str, **more: Any) -> Any:
    """What the work over a stream returns; where this machine stands still for too long, another has its turn."""
    for _ in range(6):
        line = Line(address, digest, **more)
        try:
            return work(line)
        except EOFError:  # it was ended
            pass
        finally:
            line.close()
    raise AssertionError("six streams were ended in the midst of the work")


def test_who_waits_for_an_answer_may_be_silent() -> None:
    stream = Stream("x", lambda: None, replace(LlmLimits(), stream_idle_s=0.05))
    heard: queue.Queue[Told | None] = queue.Queue()
    with stream.expecting():
        pass
    thread = threading.Thread(target=lambda: heard.put(stream.next()))
    thread.start()
    time.sleep(0.2)
    answer = Told(1, "a", token=7)
    stream.tell(answer)
    thread.join(30)
    assert heard.get(timeout=1) == answer
    assert stream.next() is None  # and now it has nothing to wait for


def test_a_device_that_is_let_go_for_silence_is_back_at_once(model: Cut) -> None:
    with cloud_at(model.cloud, "127.0.0.1:0", kernel=KERNEL, limits=LlmLimits(stream_idle_s=0.02)) as address:
        uplink = model.uplink(address)
        try:
            until(lambda: uplink._streams >= 30, 20.0)  # the 30th would come after 30 s, were each wait twice as long
        finally:
            uplink.close()


# ---- what a cloud says it takes --------------------------------------------------------------------


@pytest.mark.parametrize("limits", [LlmLimits(), LlmLimits(max_session_bytes=40 * (64 * 4 + 2 * 2 * 2 * 16 * 4))])
def test_answers_end_where_the_cloud_s_context_does(model: Cut, limits: LlmLimits) -> None:
    settings, context = Settings(threshold=1.0), 40 if limits == LlmLimits() else 96
    with (
        cloud_at(model.cloud, "127.0.0.1:0", kernel=KERNEL, context=context, limits=limits) as address,
        device(open_halves(model.halves.path), address, settings, coding="f32", kernel=KERNEL, context=96) as made,
    ):
        until(lambda: made.cloud_usable)
        assert made.context == 40
        seen: list[Token] = []
        engine = Engine(made, None, watch=lambda _, what: seen.append(what) if isinstance(what, Token) else None)
        with pytest.raises(TooLong, match="40 tokens, and 40"):
            engine.submit(Request((1,) * 40, 1, GREEDY))
        pieces = list(engine.submit(Request(tuple(PROMPT), 90, GREEDY)))
        engine.close()
    assert pieces[-1].finish == "length"
    assert [token.label for token in seen] == ["cloud"] * (40 - len(PROMPT))


def test_no_more_is_guessed_than_the_cloud_verifies(model: Cut) -> None:
    limits = LlmLimits(max_guesses=2)
    with (
        cloud_at(model.cloud, "127.0.0.1:0", kernel=KERNEL, limits=limits) as address,
        device(open_halves(model.halves.path), address, Settings("speculative"), kernel=KERNEL, context=96) as made,
    ):
        until(lambda: made.cloud_usable)
        assert len(list(made.run(PROMPT, GREEDY, 40))) == 40
    assert made.summary.cloud_failures == 0
    assert 0 < made.summary.guesses <= 2 * made.summary.cloud_requests


@pytest.mark.parametrize("coding", wire.CODINGS)
def test_beyond_the_range_of_float16_states_go_as_float32(coding: wire.Coding) -> None:
    x = np.array([[1.0, -7e4, 3e-3, 1e6]], np.float32)
    (message,) = wire.states("a", 0, x, coding)
    found = wire.asked(message, 4)
    assert isinstance(found, wire.Hidden)
    assert np.array_equal(found.rows, x)


# ---- which kernel ----------------------------------------------------------------------------------


def test_both_ends_measure_matrices_of_the_model_and_once(model: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def choose(*kind: Any, **asked: Any) -> Kernel:
        measured.append((*kind, asked["shape"], asked["invariant"]))
        return kernels.named(KERNEL, "float32")

    monkeypatch.setattr(kernels, "choose", choose)
    choice._fastest.cache_clear()
    with (
        cloud_at(model.cloud, "127.0.0.1:0") as address,
        device(open_halves(model.halves.path), address, Settings()),
    ):
        pass
    choice._fastest.cache_clear()
    config = model.shards[0].config
    assert measured == [("float32", (config.ffn, config.hidden), True)]


# ---- ends ------------------------------------------------------------------------------------------


def test_a_half_that_finds_no_room_lets_go_of_what_it_had(model: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plain_products._within
    for context in (0, 1 << 50):
        with pytest.raises(ExperimentError):
            Segments(model.shards, blocks, context=context)
        assert plain_products._within == before
    with pytest.raises(ExperimentError), cloud_at(model.cloud, "127.0.0.1:0", kernel=KERNEL, slots=0):
        pass
    assert plain_products._within == before

    def fails(*_: Any) -> None:
        raise ModelError("no head")

    monkeypatch.setattr("fedge.edge.llm.collab.cloud.Head", fails)
    with pytest.raises(ModelError), cloud_at(model.cloud, "127.0.0.1:0", kernel=KERNEL):
        pass


def test_an_engine_that_is_closed_waits_for_a_question_that_is_under_way(model: Cut) -> None:
    asked, go = threading.Event(), threading.Event()

    class Slow:
        vocab, context, cloud_usable = 128, 96, True

        def check(self, _: Any) -> None: ...

        def run(self, *_: Any) -> Iterator[Token]:
            asked.set()
            go.wait(30)
            raise DataError("late")
            yield

    slow: Any = Slow()
    slow.summary = Decoder(segments := model.segments(), model.exits, None, Settings("standalone")).summary
    segments.close()
    engine = Engine(slow, None, limits=LlmLimits(step_timeout_s=0.05, max_deadline_s=10.0))
    handle = engine.submit(Request(tuple(PROMPT), 4, GREEDY))
    assert asked.wait(30)
    threading.Timer(0.5, go.set).start()
    engine.close()
    assert go.is_set()
    assert not engine._thread.is_alive()
    assert list(handle)[-1].finish in ("cancelled", "error")


@pytest.mark.parametrize("raises", [False, True])
def test_a_device_ends_with_its_block_however_that_ends(raises: bool, tmp_path: Path) -> None:
    model = cut_model(tmp_path, vocab=320)
    for name in llm_runs.TOKENIZER:
        if (model.model / name).exists():
            (model.halves.path / "edge" / name).write_bytes((model.model / name).read_bytes())
    with (
        contextlib.suppress(KeyboardInterrupt),
        llm_runs.device(model.halves.path, None, Settings("standalone", 0.0), kernel=KERNEL) as made,
    ):
        assert made.told("Hi", 3)["summary"]["cloud_requests"] == 0
        thread = made._engine._thread
        if raises:
            raise KeyboardInterrupt
    assert not thread.is_alive()


def test_a_device_keeps_no_tokens_but_of_the_answer_that_is_to_be_told(tmp_path: Path) -> None:
    model, go = cut_model(tmp_path, vocab=320), threading.Event()
    found: list[dict[str, Any]] = []
    segments = model.segments()
    made = llm_runs.Device(Decoder(segments, model.exits, None, Settings("standalone")), Tokenizer(model.model))
    other = made.submit(Request((3, 4, 5), 9, GREEDY, stop_tokens=()), lambda _: go.wait(30) and None)
    thread = threading.Thread(target=lambda: found.append(made.told("Hi", 3)))
    thread.start()
    until(lambda: made.requests() == (1, 1))
    go.set()
    thread.join(30)
    assert other.usage.completion_tokens == 9
    assert [len(one["tokens"]) for one in found] == [3]
    assert len(list(made.submit(Request((3, 4, 5), 9, GREEDY, stop_tokens=())))) == 9
    assert made._seen is None
    made.close()
    segments.close()


def test_no_tokenizer_of_another_model_stays_in_the_device_s_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = folder(tmp_path, layers=3, vocab=320), tmp_path / "halves"
    with open_folder(model) as opened:
        exits = untrained(opened, (1,))
    monkeypatch.setattr(training, "train_exits", lambda *_, **__: exits)
    asked: dict[str, Any] = {"text": "", "generate": 0, "seconds": 1.0, "agreement": 0.9, "seed": 0}
    asked |= {"kinds": ("float32", "float32"), "progress": lambda *_: None}
    halves.cut(model, out, (1,))
    for name in llm_runs.TOKENIZER:
        (out / "edge" / name).write_text("another model's")
    llm_runs.train_exits(model, (1,), out, **asked)
    there = {name for name in llm_runs.TOKENIZER if (model / name).exists()}
    assert 0 < len(there) < len(llm_runs.TOKENIZER)
    assert {name for name in llm_runs.TOKENIZER if (out / "edge" / name).exists()} == there
    assert all((out / "edge" / name).read_bytes() == (model / name).read_bytes() for name in there)


def test_who_was_cancelled_before_its_first_token_takes_no_part_in_means(model: Cut) -> None:
    first, go = threading.Event(), threading.Event()

    def hold(_: Piece) -> None:
        first.set()
        go.wait(30)

    segments = model.segments()
    engine = Engine(Decoder(segments, model.exits, None, Settings("standalone")), None)
    running = engine.submit(Request(tuple(PROMPT), 3, GREEDY), hold)
    assert first.wait(30)
    waiting = engine.submit(Request(tuple(PROMPT), 3, GREEDY))
    waiting.cancel()
    go.set()
    assert list(waiting)[-1].finish == "cancelled"
    until(lambda: sum(engine.stats()[f"finished_{name}"] for name in ("length", "cancelled")) == 2)
    stats = engine.stats()
    engine.close()
    segments.close()
    assert stats["mean_ttft_s"] == running.usage.ttft_s > 0
    assert stats["mean_tpot_s"] == running.usage.tpot_s > 0
