"""Answers of a device and its cloud: the whole model's where they must be, labelled, and ended, come what may."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.core.errors import AddressError, DataError, ExperimentError, Overloaded, TooLong
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.api.http import app
from fedge.edge.llm.api.http_server import Server
from fedge.edge.llm.collab import exits
from fedge.edge.llm.collab.cloud import cloud_at
from fedge.edge.llm.collab.decoder import Decoder, Mode, Settings, Summary, Token
from fedge.edge.llm.collab.device import device
from fedge.edge.llm.collab.engine import Engine
from fedge.edge.llm.collab.halves import open_halves
from fedge.edge.llm.collab.wire import Want
from fedge.edge.llm.engine.requests import Piece, Request
from fedge.edge.llm.engine.sampler import Sampling, sample
from fedge.edge.llm.models.tokenizer import Tokenizer
from fedge.edge.llm.ranks.model import Model
from tests.llm_device import (
    GREEDY,
    KERNEL,
    CloudProcess,
    Cut,
    Scripted,
    answer,
    cut_model,
    decoder,
    logits_of,
    says,
    until,
    whole,
)
from tests.relay import Relay

PROMPT = [3, 17, 90, 4, 55, 21]
SAMPLED = Sampling(temperature=0.8, top_p=0.95, seed=11)
PATIENT_S = 30.0  # for one question, where the cloud shall answer all
MODES: tuple[Mode, ...] = ("exits", "speculative")
LAWS = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Cut:
    return cut_model(tmp_path_factory.mktemp("cut"))


@pytest.fixture(scope="module")
def full(model: Cut, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with whole(model.model, tmp_path_factory.mktemp("whole")) as made:
        yield made


@pytest.fixture(scope="module")
def address(model: Cut) -> Iterator[str]:
    with cloud_at(model.cloud, "127.0.0.1:0", kernel=KERNEL) as found:
        yield found


@pytest.fixture(scope="module")
def process(model: Cut) -> Iterator[CloudProcess]:
    with CloudProcess(model.cloud) as made:
        yield made


@pytest.fixture
def cloud(process: CloudProcess) -> Iterator[CloudProcess]:
    yield process
    process.heal()


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def check(full: Model, tokens: Sequence[Token], sampling: Sampling = GREEDY, prompt: Sequence[int] = PROMPT) -> None:
    """Whatever the text is, tokens of the cloud, and guesses it has confirmed, are the whole model's for that text."""
    text = [*prompt, *ids(tokens)]
    logits = logits_of(full, text)
    for at, token in enumerate(tokens, len(prompt)):
        if token.label in ("cloud", "draft"):
            assert token.id == sample(logits[at - 1], sampling, {}, at), f"token {at - len(prompt)}: {token}"


# ---- equal to the whole model ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_with_a_threshold_of_1_and_with_guesses_the_text_is_the_whole_models(family: str, tmp_path: Path) -> None:
    layers = {"llama": (1, 3), "mistral": (2,), "qwen2": (1, 2, 3), "qwen3": (3,)}[family]
    model = cut_model(tmp_path, family=family, exits=layers, seed=len(family), layers=4)
    with whole(model.model, tmp_path) as full:
        greedy, sampled = says(full, PROMPT, 24), says(full, PROMPT, 24, SAMPLED)
    with cloud_at(model.cloud, "127.0.0.1:0", kernel=KERNEL) as address:
        for mode in MODES:
            with decoder(model, address, Settings(mode, 1.0, PATIENT_S)) as made:
                assert ids(answer(made, PROMPT, 24)) == greedy
                assert ids(answer(made, PROMPT, 24, SAMPLED)) == sampled
                assert made.summary.cloud_failures == 0
                assert set(made.summary.tokens) <= {"cloud", "draft"}


def test_with_states_in_float16_too(model: Cut, full: Model, address: str) -> None:
    wanted = says(full, PROMPT, 30)
    for mode in MODES:
        with decoder(model, address, Settings(mode, 1.0), "f16") as made:
            assert ids(answer(made, PROMPT, 30)) == wanted


def test_prompts_longer_than_an_upload(model: Cut, full: Model, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedge.edge.llm.collab.decoder._PROMPT_ROWS", 8)
    for count in (1, 8, 9, 33):
        prompt = [(7 * at) % 128 for at in range(count)]
        with decoder(model, address, Settings(threshold=1.0, deadline_s=PATIENT_S)) as made:
            assert ids(answer(made, prompt, 5)) == says(full, prompt, 5)


def test_a_prompt_that_nobody_wants_any_more_is_read_no_further(model: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedge.edge.llm.collab.decoder._PROMPT_ROWS", 8)
    with decoder(model, None, Settings("standalone")) as made:
        for asked, read in ((0, 0), (2, 16), (4, 33)):
            left = iter([True] * asked + [False])
            assert not list(made.run([1] * 33, GREEDY, 5, (), lambda left=left: next(left)))
            assert made._segments.length == read
        engine, given_, reads, reach = Engine(made, None), threading.Event(), [], made._segments.reach

        def cancel(number: int) -> Array:
            reads.append(number)
            assert given_.wait(30)
            handle.cancel()
            return reach(number)

        monkeypatch.setattr(made._segments, "reach", cancel)
        handle = engine.submit(Request((1,) * 33, 5, GREEDY, stop_tokens=()))
        given_.set()
        assert list(handle) == [Piece(None, finish="cancelled")]
        assert len(reads) == 1
        monkeypatch.undo()
        assert len(list(engine.submit(Request((1,) * 33, 5, GREEDY, stop_tokens=())))) == 5
        engine.close()


def test_guesses_save_round_trips(model: Cut, full: Model, address: str) -> None:
    with decoder(model, address, Settings("speculative", deadline_s=PATIENT_S)) as made:
        answer(made, PROMPT, 1)
        assert made.summary.guesses == 0  # none is left to be guessed
        tokens = answer(made, PROMPT, 40)
    found = made.summary
    assert ids(tokens) == says(full, PROMPT, 40)
    assert found.tokens["draft"] > 5
    assert found.cloud_requests == found.tokens["cloud"] == 40 - found.tokens["draft"]
    assert found.received_bytes <= 20 * found.cloud_requests  # nobody has to say that states are missing


@given(
    thresholds=st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 1.0)),
    prompt=st.lists(st.integers(0, 127), min_size=1, max_size=40),
    sampled=st.booleans(),
)
@LAWS
def test_whatever_was_put_off_tokens_of_the_cloud_are_the_whole_models(
    model: Cut, full: Model, address: str, thresholds: tuple[float, float], prompt: list[int], sampled: bool
) -> None:
    sampling = SAMPLED if sampled else GREEDY
    with decoder(model, address, Settings(threshold=thresholds, deadline_s=PATIENT_S)) as made:
        tokens = answer(made, prompt, 30, sampling)
    assert len(tokens) == 30
    check(full, tokens, sampling, prompt)
    by_layer = dict(zip(model.halves.exits, thresholds))
    for token in tokens:
        if token.label == "cloud":
            assert thresholds[-1] == 1 or token.confidence < thresholds[-1]
        else:
            assert token.label == f"exit:{token.layer}"
            assert by_layer[token.layer] <= token.confidence
    assert made.summary.tokens.total() == 30
    assert made.summary.cloud_requests == made.summary.tokens["cloud"]


def test_answers_of_exits_cost_less_than_two_bytes_a_number(model: Cut, address: str) -> None:
    """The states, and less than 20 bytes beside each; questions apart, as they are not states."""
    with decoder(model, address, Settings(threshold=0.5, deadline_s=PATIENT_S), "f16") as made:
        answer(made, PROMPT, 60)
    found = made.summary
    assert found.tokens["exit:1"] > 5
    assert 0 < found.sent_bytes <= (len(PROMPT) + 60) * (2 * 64 + 20) + 20 * found.cloud_requests
    assert 0 < found.received_bytes <= 20 * found.cloud_requests


def test_no_more_than_16_rows_wait_and_states_go_up_though_nobody_asks(model: Cut) -> None:
    with Scripted(model, lambda _: []) as cloud, decoder(model, cloud.address, Settings(threshold=(0.0, 1.0))) as made:
        prompt = PROMPT * 4
        run, waited = made.run(prompt, GREEDY, 51), []
        for _ in range(50):
            assert next(run).label == "exit:1"
            waited.append(made._segments.deferred)
        until(lambda: len(cloud.positions) > len(prompt) + 50 - 18)
        run.close()
    assert waited[0] == len(prompt)
    assert max(waited[1:]) == 16
    assert cloud.positions == list(range(len(cloud.positions)))
    assert not [one for one in cloud.asked if isinstance(one, Want)]


# ---- alone -----------------------------------------------------------------------------------------


def test_alone_every_token_is_an_exits_and_the_same_again(model: Cut) -> None:
    with decoder(model, None, Settings("standalone", (0.6, 0.6))) as made:
        tokens = answer(made, PROMPT, 40, SAMPLED)
        assert ids(answer(made, PROMPT, 40, SAMPLED)) == ids(tokens)
        assert ids(answer(made, PROMPT, 40)) != ids(tokens)
        assert {token.label for token in tokens} == {"exit:1", "exit:2"}
        assert made.summary.cloud_requests == made.summary.sent_bytes == 0
        penalised = Sampling(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
        repeated, varied = answer(made, PROMPT, 40), answer(made, PROMPT, 40, penalised)
        assert len(set(ids(varied))) > len(set(ids(repeated)))


def test_an_exit_draws_with_the_random_number_of_the_position(model: Cut) -> None:
    segments = model.segments()
    with decoder(model, None, Settings("standalone", 1.0)) as made:
        for count in range(1, 7):
            segments.clear()
            segments.feed(PROMPT[:count])
            row = segments.reach(1)[-1:]
            logits = exits.logits(model.exits[1], row, segments.head, segments.config.eps)[0]
            drawn = sample(logits * model.exits[1].temperature, SAMPLED, {}, count)
            assert ids(answer(made, PROMPT[:count], 1, SAMPLED)) == [drawn]
    segments.close()


def test_what_cannot_be_is_said(model: Cut, address: str) -> None:
    for wrong in ({"mode": "dream"}, {"deadline_s": 0.0}, {"deadline_s": float("nan")}):
        with pytest.raises(ExperimentError):
            Settings(**wrong)
    segments = model.segments()
    with pytest.raises(ExperimentError, match="needs a cloud"):
        Decoder(segments, model.exits, None)
    with pytest.raises(ExperimentError, match="cut the model again"):
        Decoder(segments, model.exits[:1], None, Settings("standalone"))
    segments.close()
    with decoder(model, address, Settings()) as made:
        for prompt, most in (([], 1), ([1] * 50, 50)):
            with pytest.raises(DataError, match="tokens"):
                answer(made, prompt, most)
        with pytest.raises(DataError, match="penalties"):
            answer(made, PROMPT, 1, Sampling(presence_penalty=1.0))
        assert len(answer(made, PROMPT, 2)) == 2


# ---- clouds that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_cloud_that_is_killed_is_done_without_and_taken_up_again(
    mode: Mode, model: Cut, full: Model, cloud: CloudProcess
) -> None:
    with decoder(model, cloud.address, Settings(mode, 1.0, PATIENT_S)) as made:
        run = made.run(PROMPT, GREEDY, 60)
        before = [next(run) for _ in range(12)]
        cloud.kill()
        without = [next(run) for _ in range(20)]
        cloud.start()
        until(lambda: made.cloud_usable)
        tokens = [*before, *without, *run]
    assert len(tokens) == 60
    assert {token.label for token in before} <= {"cloud", "draft"}
    assert "fallback" in {token.label for token in without}
    assert [token.label for token in tokens[40:]].count("fallback") == 0
    assert {token.label for token in tokens} <= {"cloud", "draft", "fallback"}
    check(full, tokens)
    assert ids(before) == says(full, PROMPT, 12)


def test_a_cloud_that_falls_silent_costs_one_deadline_and_is_heard_again(
    model: Cut, full: Model, cloud: CloudProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedge.edge.llm.collab.uplink._FIRST_REST_S", 60.0)
    with decoder(model, cloud.address, Settings("exits", 1.0, 2.0)) as made:
        run = made.run(PROMPT, GREEDY, 40)
        before = [next(run) for _ in range(5)]
        cloud.signal(signal.SIGSTOP)
        silent = [next(run) for _ in range(10)]
        requests = made.summary.cloud_requests
        cloud.signal(signal.SIGCONT)
        until(lambda: made.cloud_usable)  # its late answer is heard
        tokens = [*before, *silent, *run]
    assert [token.label for token in silent] == ["fallback"] * 10
    assert requests == 6  # the other nine do not wait
    assert "cloud" in {token.label for token in tokens[15:]}
    check(full, tokens)


def test_a_link_that_is_cut_costs_tokens_but_no_states_twice(model: Cut, full: Model, address: str) -> None:
    with (
        Relay(address) as relay,
        decoder(model, relay.address, Settings(threshold=1.0, deadline_s=PATIENT_S), "f32") as made,
    ):

        def cut() -> None:
            relay.cut()
            until(lambda: not made.cloud_usable)
            relay.restore()

        run = made.run(PROMPT, GREEDY, 60)
        tokens = [next(run) for _ in range(30)]
        cut()
        tokens.append(next(run))
        until(lambda: made.cloud_usable)
        tokens += run
    assert [token.label for token in tokens[-20:]] == ["cloud"] * 20
    check(full, tokens)
    row = 4 * 64
    assert made.summary.sent_bytes < (len(PROMPT) + 60 + 10) * (row + 40)


@pytest.mark.parametrize("mode", MODES)
def test_a_slow_link_leaves_the_text_the_same_or_the_tokens_labelled(
    mode: Mode, model: Cut, full: Model, address: str
) -> None:
    with Relay(address, up_bps=400_000, down_bps=400_000, rtt_s=0.02) as relay:
        with decoder(model, relay.address, Settings(mode, 1.0, PATIENT_S)) as made:
            assert ids(answer(made, PROMPT, 10)) == says(full, PROMPT, 10)
        with decoder(model, relay.address, Settings(mode, 1.0, 0.005)) as made:
            tokens = answer(made, PROMPT, 30)
    assert len(tokens) == 30
    assert {token.label for token in tokens} == {"fallback"}


def test_no_cloud_at_all(model: Cut) -> None:
    with decoder(model, "127.0.0.1:1", Settings("exits", 0.5), wait=False) as made:
        tokens = answer(made, PROMPT, 30)
    assert len(tokens) == 30
    assert {token.label for token in tokens} == {"exit:1", "exit:2", "fallback"}
    assert made.summary.cloud_requests == 0
    with decoder(model, "127.0.0.1:1", Settings("exits", (0.6, 1.0)), wait=False) as made:
        tokens = answer(made, PROMPT, 30)
    assert {(token.label, token.layer) for token in tokens} == {("exit:1", 1), ("fallback", 2)}


# ---- as an engine ----------------------------------------------------------------------------------


def pieces_of(pieces: Iterator[Piece]) -> tuple[list[int], Piece]:
    found = list(pieces)
    assert all(piece.finish is None for piece in found[:-1])
    return [piece.token for piece in found if piece.token is not None], found[-1]


def test_the_engine_answers_requests_one_after_the_other(model: Cut, full: Model, address: str) -> None:
    seen: list[tuple[int, Token | Summary]] = []
    with decoder(model, address, Settings(threshold=1.0, deadline_s=PATIENT_S)) as made:
        engine = Engine(made, Tokenizer(model.model), watch=lambda key, what: seen.append((key, what)))
        prompts = [PROMPT, [5, 6], [99] * 30]
        handles = [engine.submit(Request(tuple(one), 8, GREEDY, stop_tokens=())) for one in prompts]
        for prompt, handle in zip(prompts, handles):
            tokens, last = pieces_of(handle)
            assert tokens == says(full, prompt, 8)
            assert last.finish == "length"
            assert handle.usage.completion_tokens == 8
        unseeded = [pieces_of(engine.submit(Request(tuple(PROMPT), 20, stop_tokens=())))[0] for _ in range(2)]
        assert unseeded[0] != unseeded[1]
        stats = engine.stats()
        assert stats["finished_length"] == 5
        assert stats["generated_tokens"] == stats['tokens{by="cloud"}'] == stats["cloud_requests"] == 64
        assert stats["running"] == stats["waiting"] == 0
        engine.close()
    assert [key for key, what in seen if isinstance(what, Summary)] == [1, 2, 3, 4, 5]
    assert [key for key, what in seen if isinstance(what, Token)][:24] == [1] * 8 + [2] * 8 + [3] * 8


def test_the_engine_stops_where_it_is_told(model: Cut, full: Model, address: str) -> None:
    wanted = says(full, PROMPT, 20)
    with decoder(model, address, Settings("speculative", deadline_s=PATIENT_S)) as made:
        assert ids(list(made.run(PROMPT, GREEDY, 20, (wanted[7],)))) == wanted[: wanted.index(wanted[7]) + 1]
        engine = Engine(made, Tokenizer(model.model))
        tokens, last = pieces_of(engine.submit(Request(tuple(PROMPT), 20, GREEDY, stop_tokens=(wanted[7],))))
        assert (tokens, last.finish) == (wanted[: wanted.index(wanted[7]) + 1], "stop")
        stream = Tokenizer(model.model).stream(start=True)
        text = "".join(map(stream.push, wanted)) + stream.flush()
        stop = text[4:7]
        found = list(engine.submit(Request(tuple(PROMPT), 20, GREEDY, stop=(stop,), stop_tokens=())))
        assert found[-1].finish == "stop"
        assert "".join(piece.text for piece in found) == text[: text.index(stop)]
        engine.close()


def test_the_engine_cancels_what_runs_and_what_waits(model: Cut, address: str) -> None:
    go, first = threading.Event(), threading.Event()
    held: list[Piece] = []

    def hold(piece: Piece) -> None:
        held.append(piece)
        first.set()
        go.wait(30)

    with decoder(model, address, Settings(threshold=1.0, deadline_s=PATIENT_S)) as made:
        limits = LlmLimits(max_requests=2)
        engine = Engine(made, None, limits=limits)
        running = engine.submit(Request(tuple(PROMPT), 80, GREEDY), hold)
        assert first.wait(30)
        waiting = engine.submit(Request(tuple(PROMPT), 80, GREEDY))
        other = engine.submit(Request(tuple(PROMPT), 80, GREEDY))
        with pytest.raises(Overloaded):
            engine.submit(Request(tuple(PROMPT), 80, GREEDY))
        waiting.cancel()
        running.cancel()
        go.set()
        assert pieces_of(waiting) == ([], Piece(None, finish="cancelled"))
        tokens, last = pieces_of(other)
        assert (len(tokens), last.finish) == (80, "length")
        assert held[-1].finish == "cancelled"
        assert len(held) < 80
        left = engine.submit(Request(tuple(PROMPT), 80, GREEDY))
        engine.close()
        assert pieces_of(left)[1].finish in ("cancelled", "length")
        assert engine.stats()["finished_cancelled"] >= 2
        with pytest.raises(AddressError):
            engine.submit(Request(tuple(PROMPT), 1))


def test_the_engine_refuses_what_it_cannot_do_and_outlives_what_fails(model: Cut, address: str) -> None:
    with decoder(model, address, Settings(threshold=0.5, deadline_s=PATIENT_S)) as made:
        engine = Engine(made, None)
        bad = [
            Request(tuple(PROMPT), 1, top_logprobs=2),
            Request(tuple(PROMPT), 1, Sampling(frequency_penalty=1.0)),
            Request((128,), 1),
            Request((), 1),
        ]
        for request in bad:
            with pytest.raises(DataError) as caught:
                engine.submit(request)
            assert not isinstance(caught.value, TooLong)
        with pytest.raises(TooLong, match="96 tokens, and 96"):
            engine.submit(Request((1,) * 96, 1))
        made._segments.reach = lambda _: np.full((1, 64), np.nan, np.float32)  # type: ignore[method-assign,assignment]
        last = list(engine.submit(Request(tuple(PROMPT), 4, GREEDY)))[-1]
        assert last.finish == "error"
        assert last.error
        del made._segments.reach
        assert pieces_of(engine.submit(Request(tuple(PROMPT), 4, SAMPLED)))[1].finish == "length"
        engine.close()


def test_it_is_served_over_http(tmp_path: Path) -> None:
    model = cut_model(tmp_path, vocab=320)
    tokenizer = Tokenizer(model.model)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "seed": 1}
    with ExitStack() as opened:
        address = opened.enter_context(cloud_at(model.cloud, "127.0.0.1:0", kernel=KERNEL))
        halves, settings = open_halves(model.halves.path), Settings(threshold=0.5, deadline_s=PATIENT_S)
        made = opened.enter_context(device(halves, address, settings, kernel=KERNEL))
        until(lambda: made.cloud_usable)
        engine = Engine(made, tokenizer)
        opened.callback(engine.close)
        server = opened.enter_context(Server(app(engine, tokenizer, "tiny"), "127.0.0.1:0", LlmLimits()))
        thread = threading.Thread(target=server.run)
        thread.start()
        url = f"http://{server.address}"
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)
        again = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)
        refused = [
            httpx.post(f"{url}/v1/chat/completions", json=body | more, timeout=20)
            for more in (
                {"logprobs": True},
                {"presence_penalty": 1},
                {"messages": [{"role": "user", "content": "x" * 9000}]},
            )
        ]
        figures = httpx.get(f"{url}/metrics", timeout=20).text
        server.stop()
        thread.join(20)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] in range(1, 13)
    assert reply.json()["choices"][0]["message"] == again.json()["choices"][0]["message"]
    assert [answer.status_code for answer in refused] == [400] * 3
    told = [answer.json()["error"] for answer in refused]
    assert "log-probabilities" in told[0]["message"]
    assert "penalties" in told[1]["message"]
    assert [one["code"] for one in told] == [None, None, "context_length_exceeded"]
    assert [one["param"] for one in told] == [None, None, "messages"]
    assert 'fedge_llm_tokens{by="cloud"}' in figures
