"""OpenAI's own client, unchanged, and rough ones against the server on a real socket over a real engine."""

import asyncio
import http.client
import json
import socket
import threading
import time

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.core.errors import AddressError, ExperimentError, ModelError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.engine.requests import Request
from fedge.edge.llm.engine.sampler import Sampling
from tests.llm_server import NAME, ON, VOCAB, call, is_error, served

HI = [{"role": "user", "content": "Hi there"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with served(tmp_path_factory.mktemp("live")) as one:
        yield one


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


class Slow:
    """A model that takes its time; it fails in the passes that `fails` names."""

    def __init__(self, model, pause_s=0.004, fails=(), error=ZeroDivisionError("secret path")):
        self.model, self.pause_s, self.fails, self.passes, self.error = model, pause_s, fails, 0, error

    def run(self, step, tokens, rows):
        self.passes += 1
        if self.passes in self.fails:
            raise self.error
        time.sleep(self.pause_s)
        return self.model.run(step, tokens, rows)


def wanted(live, tokens, most, *, top=None, **sampling):
    """What the engine itself answers."""
    sampling = Sampling(**({"temperature": 0} | sampling))
    return list(live.engine.submit(Request(tuple(tokens), most, sampling, top_logprobs=top)))


def text(pieces):
    return "".join(piece.text for piece in pieces)


def chat_tokens(live, messages=HI):
    return live.tokenizer.encode(live.tokenizer.chat(messages), special=False)


# ---- Answers -----------------------------------------------------------------------------------------------------


def test_a_chat_is_the_engines_answer_whole_and_streamed(live, client):
    expected = wanted(live, chat_tokens(live), 12)
    whole = client.chat.completions.create(model=NAME, messages=HI, temperature=0, max_completion_tokens=12)
    assert (whole.object, whole.model, whole.choices[0].message.role) == ("chat.completion", NAME, "assistant")
    assert whole.choices[0].message.content == text(expected)
    assert whole.choices[0].finish_reason == expected[-1].finish == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(chat_tokens(live)), 12)
    assert whole.usage.prompt_tokens_details.cached_tokens > 10
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model=NAME, messages=HI, temperature=0, max_tokens=12, stream=True, stream_options=options
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text(expected)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_completions_take_texts_and_tokens(live, client):
    tokens = live.tokenizer.encode("the cat")
    expected = text(wanted(live, tokens, 16))
    for prompt in ("the cat", tokens, ["the cat"], [tokens]):
        answer = client.completions.create(model=NAME, prompt=prompt, temperature=0)
        assert answer.choices[0].text == expected
        assert answer.usage.completion_tokens == 16
    both = client.completions.create(model=NAME, prompt=["the cat", "a dog"], temperature=0, n=2, max_tokens=5)
    other = text(wanted(live, live.tokenizer.encode("a dog"), 5))
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[1:3]] == [text(wanted(live, tokens, 5)), other]
    assert both.usage.prompt_tokens == len(tokens) + len(live.tokenizer.encode("a dog"))
    assert both.usage.completion_tokens == 20
    stream = client.completions.create(model=NAME, prompt="the cat", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_the_async_client_streams_several_choices(live):
    async def ask():
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=NAME, messages=HI, n=3, seed=7, temperature=1.5, max_tokens=9, stream=True
            )
            texts = ["", "", ""]
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            return texts

    prompt = chat_tokens(live)
    assert asyncio.run(ask()) == [text(wanted(live, prompt, 9, temperature=1.5, seed=seed)) for seed in (7, 8, 9)]


def test_the_largest_seed_has_successors(live, client):
    answer = client.completions.create(model=NAME, prompt="a", n=2, seed=(1 << 63) - 1, temperature=2, max_tokens=9)
    least = wanted(live, live.tokenizer.encode("a"), 9, temperature=2.0, seed=-(1 << 63))
    assert answer.choices[1].text == text(least)


def test_settings_reach_the_sampler(live, client):
    prompt = live.tokenizer.encode("the")
    token = live.tokenizer.encode("q")[0]
    answer = client.completions.create(
        model=NAME, prompt="the", temperature=0, logit_bias={str(token): 100}, max_tokens=5
    )
    assert answer.choices[0].text == "qqqqq"
    plain = text(wanted(live, prompt, 30))
    for given_, name in (({"frequency_penalty": 2, "presence_penalty": 1}, "penalties"), ({"top_p": 0.5}, "top_p")):
        more = {"seed": 3, "temperature": 1.3} if name == "top_p" else {"temperature": 0}
        answer = client.completions.create(model=NAME, prompt="the", max_tokens=30, **given_, **more)
        assert answer.choices[0].text == text(wanted(live, prompt, 30, **given_, **more)) != plain
    stop = plain[3:5]
    for stops in (stop, [stop, "zzzz"]):
        answer = client.completions.create(model=NAME, prompt="the", temperature=0, max_tokens=30, stop=stops)
        assert answer.choices[0].text == plain[: plain.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


def test_contents_in_parts_and_developers_are_understood(live, client):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    told = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi\nthere"}]
    answer = client.chat.completions.create(model=NAME, messages=told, temperature=0, max_tokens=6)
    assert answer.choices[0].message.content == text(wanted(live, chat_tokens(live, plain), 6))


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_models(live, client, stream):
    expected = wanted(live, chat_tokens(live), 4, top=3)
    asked = {"model": NAME, "temperature": 0, "max_tokens": 4, "stream": stream}
    got = client.chat.completions.create(messages=HI, logprobs=True, top_logprobs=3, **asked)
    chunks = list(got) if stream else [got]
    entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.logprob for entry in entries] == pytest.approx([piece.logprob.logprob for piece in expected])
    for entry, piece in zip(entries, expected, strict=True):
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 3
        written = live.tokenizer.bytes_of(piece.token)
        assert bytes(entry.bytes or []) == written
        assert entry.token in (written.decode(errors="replace"), f"token_id:{piece.token}")
    got = client.completions.create(prompt=chat_tokens(live), logprobs=2, **asked)
    found = [chunk.choices[0].logprobs for chunk in (got if stream else [got])]
    assert [value for one in found for value in one.token_logprobs] == pytest.approx([e.logprob for e in entries])
    offsets = [offset for one in found for offset in one.text_offset]
    assert offsets == [len(text(expected[:at])) for at in range(4)]
    assert {len(top) for one in found for top in one.top_logprobs} == {2}


def test_the_end_token_is_no_part_of_an_answer(client):
    asked = {"model": NAME, "logit_bias": {"2": 100}, "stream": False}
    chat = client.chat.completions.create(messages=HI, logprobs=True, **asked)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("", "stop")
    assert chat.choices[0].logprobs.content == []
    assert chat.usage.completion_tokens == 1
    plain = client.completions.create(prompt="a", logprobs=1, **asked)
    assert plain.choices[0].logprobs.tokens == []


def test_models_are_listed(live, client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "fedge"
    with pytest.raises(openai.NotFoundError, match="is not served here") as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


# ---- What is refused ---------------------------------------------------------------------------------------------

REFUSED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "json_object"},
    "max_tokens": 0,
    "n": 17,
    "temperature": 3,
    "top_logprobs": 3,
    "stop": ["a"] * 17,
    "logit_bias": {"a": 1},
    "stream_options": {"include_usage": True},
    "reasoning_effort": "high",
    "seed": 1 << 63,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(client, name):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=HI, extra_body={name: REFUSED[name]})
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == (name if name != "stop" else None)
    assert caught.value.body["message"].endswith(".")


def test_what_changes_nothing_is_ignored(live, client):
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "functions": None, "odd": None}
    answer = client.chat.completions.create(
        model=NAME, messages=HI, temperature=0, max_tokens=3, user="me", store=False, metadata={"a": "b"},
        service_tier="auto", parallel_tool_calls=True, extra_body=nothing,
    )  # fmt: skip
    assert answer.choices[0].message.content == text(wanted(live, chat_tokens(live), 3))
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model=NAME, prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model=NAME, prompt="a", echo=True)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "4", "tool_call_id": "a"}], "messages[0].role"),
        ([*HI, {"role": "assistant", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "", "function_call": {"name": "f"}}], "messages[0].function_call"),
    ],
)
def test_messages_that_cannot_be_read_are_named(client, messages, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=messages)
    assert caught.value.param == param


def test_prompts_that_do_not_fit_are_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x" * 500}], stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    for prompt in ([], "", [1, VOCAB], [-1], [1, "a"]):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=NAME, prompt=prompt)
        assert (caught.value.code, caught.value.param) == (None, "prompt")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")


def test_rough_requests_get_an_error_of_the_right_kind(live):
    chat, good = "/v1/chat/completions", json.dumps({"model": NAME, "messages": HI, "max_tokens": 1})
    cases = [
        ("POST", "/v1/embeddings", "{}", {}, 404),
        ("POST", chat + "/", good, {}, 404),
        ("GET", chat, None, {}, 405),
        ("DELETE", "/v1/models", None, {}, 405),
        ("OPTIONS", chat, None, {"Origin": "http://evil", "Access-Control-Request-Method": "POST"}, 405),
        ("POST", chat, good, {"Content-Type": "text/plain"}, 415),
        ("POST", chat, good, {"Content-Type": ""}, 415),
        ("POST", chat, good, {"Host": "evil.example:8000"}, 403),
        ("POST", chat, "", {}, 400),
        ("POST", chat, "{", {}, 400),
        ("POST", chat, "[" * 100_000, {}, 400),
        ("POST", chat, '{"metadata":' * 50_000, {}, 400),
        ("POST", chat, good[:-1] + ', "tools": ' + "[" * 900 + "]" * 900 + "}", {}, 400),
        ("POST", chat, b'{"model": "\xff"}', {}, 400),
        ("POST", chat, good.replace("Hi there", "\\ud800"), {}, 400),
        ("POST", chat, " " * LlmLimits().max_body_bytes + good, {}, 413),
        ("POST", chat, iter([b" " * (1 << 18)] * 20), {}, 413),
    ]
    for method, path, body, headers, status in cases:
        got, seen, answer = call(live, method, path, body, headers)
        assert (got, is_error(got, answer)) == (status, True), (method, path, str(body)[:40], answer)
        assert "access-control-allow-origin" not in {name.lower() for name in seen}
    assert call(live, "POST", chat, good, {"Content-Type": "application/json; charset=utf-8"})[0] == 200


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "text", NAME]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = """model stream stream_options n stop max_tokens temperature top_p top_k min_p seed presence_penalty logprobs
    frequency_penalty logit_bias messages max_completion_tokens top_logprobs prompt echo tools user other"""
NAMES = st.sampled_from(FIELDS.split())
BODIES = st.one_of(
    st.dictionaries(NAMES, VALUES, max_size=3).map(
        lambda more: json.dumps({"model": NAME, "messages": HI, "max_tokens": 2} | more)
    ),
    st.dictionaries(NAMES, VALUES, max_size=3).map(lambda more: json.dumps({"model": NAME, "prompt": "a"} | more)),
    VALUES.map(json.dumps),
    st.binary(max_size=30),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
def test_any_body_is_answered_or_refused(live, body, path):
    line = http.client.HTTPConnection(live.address, timeout=20)
    try:
        line.request("POST", path, body, {"Content-Type": "application/json"})
        response = line.getresponse()
        data = response.read()
    finally:
        line.close()
    if response.status != 200:
        assert response.status in (400, 404), (body, data)
        assert is_error(response.status, json.loads(data))
    elif response.getheader("Content-Type").startswith("text/event-stream"):
        assert data.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in data
    else:
        assert json.loads(data)["usage"]["completion_tokens"] >= 1


# ---- Many, and those who leave -------------------------------------------------------------------------------------


def test_fifty_users_get_what_each_gets_alone_while_ten_hang_up(tmp_path):
    def prompt(at):
        return f"User {at % 7} says {'abc' * (at % 5)} {at}"

    def ask(live, at):
        asked = {
            "model": NAME,
            "prompt": prompt(at),
            "max_tokens": 100 if at % 5 == 0 else 8 + at % 9,
            "stream": at % 2,
        }
        asked |= ON if at % 5 == 0 else {}
        asked |= {"temperature": 0.0} if at % 3 else {"temperature": 1.2, "seed": at}
        line = http.client.HTTPConnection(live.address, timeout=30)
        try:
            line.request("POST", "/v1/completions", json.dumps(asked | {"stream": bool(at % 2)}), JSON)
            if at % 5 == 0:  # hang up: while it waits, or in the middle of the answer
                if at % 2:
                    line.getresponse().read(300)
                else:
                    time.sleep(0.05)
                return None
            response = line.getresponse()
            assert response.status == 200
            data = response.read()
        finally:
            line.close()
        if not at % 2:
            return json.loads(data)["choices"][0]["text"]
        events = [json.loads(event[6:]) for event in data.decode().split("\n\n")[:-2]]
        return "".join(event["choices"][0]["text"] for event in events)

    with served(tmp_path, wrap=lambda model: Slow(model, 0.004)) as live:
        answers = [None] * 50

        def one(at):
            answers[at] = ask(live, at)

        threads = [threading.Thread(target=one, args=(at,)) for at in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        stats = live.settle()
        assert stats["finished_length"] + stats["finished_stop"] == 40
        assert stats["finished_cancelled"] <= 10  # and those who left before their prompt was read
        assert stats["finished_error"] == 0
        for at in range(50):
            assert answers[at] == (None if at % 5 == 0 else ask(live, at)), at


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rudely", [False, True])
def test_a_request_ends_when_its_client_hangs_up(tmp_path, stream, rudely):
    with served(tmp_path, wrap=lambda model: Slow(model, 0.02)) as live:
        line = http.client.HTTPConnection(live.address, timeout=20)
        body = {"model": NAME, "prompt": "a", "max_tokens": 150, "n": 3, "stream": stream} | ON
        line.request("POST", "/v1/completions", json.dumps(body), JSON)
        while live.engine.stats()["generated_tokens"] < 6:
            time.sleep(0.005)
        if rudely:
            line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        line.close()
        stats = live.settle()
        assert stats["finished_cancelled"] == 3
        assert stats["generated_tokens"] < 300  # of 450


def test_those_who_dawdle_lose_their_connection_and_nobody_else_waits(tmp_path):
    limits = LlmLimits(http_timeout_s=0.5)
    with served(tmp_path, limits=limits, slots=8) as live:
        host, port = live.address.split(":")
        reader, silent, drips, half = (socket.socket() for _ in range(4))
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for one in (reader, silent, drips, half):
            one.settimeout(20)
            one.connect((host, int(port)))
        body = {"model": NAME, "prompt": "a", "max_tokens": 150, "n": 16, "stream": True, "logprobs": 20}
        data = json.dumps(body | ON).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        reader.sendall(head + b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
        drips.sendall(b"POST /v1")
        half.sendall(head + b"Content-Length: 100\r\n\r\n{")
        assert call(live, "GET", "/health")[2]["status"] == "ok"
        assert silent.recv(100) == b""
        assert drips.recv(100) == b""
        assert half.recv(100).startswith(b"HTTP/1.1 408")
        # The one that reads nothing is dropped once the buffers are full; what it has asked for does not wait for it.
        live.settle()
        until = time.monotonic() + 20
        while live.server._server.server_state.connections:
            assert time.monotonic() < until
            time.sleep(0.05)
        for one in (reader, silent, drips, half):
            one.close()


def test_more_connections_than_the_limit_are_turned_away(tmp_path):
    def status():
        line = http.client.HTTPConnection(live.address, timeout=20)
        line.request("GET", "/health")
        response = line.getresponse()
        response.read()
        line.close()
        return response.status

    def becomes(wanted_status):
        until = time.monotonic() + 20
        while status() != wanted_status:
            assert time.monotonic() < until
            time.sleep(0.01)

    with served(tmp_path, limits=LlmLimits(max_connections=4)) as live:
        host, port = live.address.split(":")
        becomes(200)
        idle = [socket.create_connection((host, int(port))) for _ in range(3)]
        becomes(503)
        for one in idle:
            one.close()
        becomes(200)


# ---- Failures ----------------------------------------------------------------------------------------------------


def test_a_failure_reaches_the_client_whole_and_in_the_middle_of_a_stream(tmp_path):
    # A failing pass ends the request; the engine goes on with the next.
    with (
        served(tmp_path, wrap=lambda model: Slow(model, 0, fails=(5, 8))) as live,
        openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        asked = {"model": NAME, "prompt": "a", "max_tokens": 9, "temperature": 0} | ON
        stream = client.completions.create(**asked, stream=True)
        got = []
        with pytest.raises(openai.APIError, match="The model failed") as caught:
            got.extend(chunk.choices[0].text for chunk in stream)
        assert "secret" not in str(caught.value.body)
        assert len(got) >= 2
        with pytest.raises(openai.InternalServerError, match="The model failed"):
            client.completions.create(**asked)
        assert client.completions.create(**asked).usage.completion_tokens == 9
        body = json.dumps(asked | {"stream": True})
        line = http.client.HTTPConnection(live.address, timeout=20)
        line.request("POST", "/v1/completions", body, JSON)
        assert line.getresponse().read().endswith(b"data: [DONE]\n\n")
        line.close()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ModelError("/home/me/secret cannot be read; free some space."), 500, "model_failed"),
        (ExperimentError("The folder /home/me/secret cannot be used."), 500, "model_failed"),
        (RankLost("b has not loaded its shard (/home/me/secret is full).", 1), 503, "unavailable"),
        (AddressError("/home/me/secret"), 503, "unavailable"),
    ],
)
def test_a_request_that_fails_says_whether_to_come_again_and_no_path(tmp_path, error, status, code):
    with served(tmp_path, wrap=lambda model: Slow(model, 0, fails=(1, 2), error=error)) as live:
        asked = {"model": NAME, "prompt": "a", "max_tokens": 9}
        got, headers, answer = call(live, "POST", "/v1/completions", json.dumps(asked))
        assert (got, answer["error"]["code"]) == (status, code)
        assert ("retry-after" in {name.lower() for name in headers}) == (status == 503)
        assert "secret" not in str(answer)
        line = http.client.HTTPConnection(live.address, timeout=20)
        line.request("POST", "/v1/completions", json.dumps(asked | {"stream": True}), JSON)
        stream = line.getresponse().read()
        line.close()
        assert code.encode() in stream
        assert b"secret" not in stream


def test_too_many_are_told_to_come_again(tmp_path):
    limits = LlmLimits(max_requests=3)
    with served(tmp_path, limits=limits, slots=1, wrap=lambda model: Slow(model, 0.05)) as live:
        with openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0) as client:
            asked = {"model": NAME, "prompt": "a", "max_tokens": 100} | ON
            stream = client.completions.create(**asked, n=2, stream=True)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**asked, n=2)  # the first of the two fits, and does not stay
            assert caught.value.response.headers["retry-after"] == "1"
            while live.engine.stats()["running"] + live.engine.stats()["waiting"] > 2:
                time.sleep(0.005)
            assert live.engine.stats()["finished_cancelled"] == 1
            stream.close()
            live.settle()
            assert client.completions.create(model=NAME, prompt="a", max_tokens=1).usage.completion_tokens == 1
        live.engine.close()
        status, _, answer = call(live, "POST", "/v1/completions", json.dumps({"model": NAME, "prompt": "a"}))
        assert (status, is_error(status, answer)) == (503, True)


def test_no_prompt_is_read_for_those_who_are_refused_or_gone(tmp_path):
    first, go, read, seen = threading.Event(), threading.Event(), [], []
    with served(tmp_path, limits=LlmLimits(max_requests=2)) as live:
        encode, requests = live.tokenizer.encode, live.engine.requests

        def slow(text, special=True):
            read.append(text)
            first.set()
            assert go.wait(30)
            return encode(text, special)

        def counted():
            seen.append(requests())
            return seen[-1]

        def ask(text):
            line = http.client.HTTPConnection(live.address, timeout=30)
            line.request("POST", "/v1/completions", json.dumps({"model": NAME, "prompt": text, "max_tokens": 1}), JSON)
            return line

        def becomes(condition):
            until = time.monotonic() + 30
            while not condition():
                assert time.monotonic() < until
                time.sleep(0.005)

        live.tokenizer.encode, live.engine.requests = slow, counted
        stays = ask("stays")
        assert first.wait(30)
        leaves = ask("leaves")
        becomes(lambda: len(seen) == 2)  # it waits for its turn
        leaves.close()
        becomes(lambda: len(live.server._server.server_state.connections) == 1)
        live.engine.requests = lambda: (1, 1)
        refused = call(live, "POST", "/v1/completions", json.dumps({"model": NAME, "prompt": "refused"}))
        assert (refused[0], is_error(429, refused[2])) == (429, True)
        live.engine.requests = requests
        go.set()
        assert stays.getresponse().status == 200
        assert call(live, "POST", "/v1/completions", json.dumps({"model": NAME, "prompt": "next"}))[0] == 200
        stays.close()
    assert read == ["stays", "next"]


def test_answers_under_way_end_with_the_server(tmp_path):
    limits = LlmLimits(shutdown_s=1)
    with served(tmp_path, limits=limits, wrap=lambda model: Slow(model, 0.03)) as live:
        line = http.client.HTTPConnection(live.address, timeout=20)
        line.request(
            "POST", "/v1/completions", json.dumps({"model": NAME, "prompt": "a", "max_tokens": 150} | ON), JSON
        )
        while not live.engine.stats()["generated_tokens"]:
            time.sleep(0.005)
        live.server.stop()
        assert live.settle()["finished_cancelled"] == 1
        line.close()


def test_a_model_without_template_says_to_use_completions(tmp_path):
    with served(tmp_path, template=None) as live:
        status, _, answer = call(live, "POST", "/v1/chat/completions", json.dumps({"model": NAME, "messages": HI}))
        assert (status, is_error(status, answer)) == (400, True)
        assert "/v1/completions" in answer["error"]["message"]
        assert str(tmp_path) not in answer["error"]["message"]
