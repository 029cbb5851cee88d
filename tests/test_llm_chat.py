"""The chat without a terminal: lines in, text out, against the real server and against servers that misbehave."""

import io
import json
import signal
import socket
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core.errors import AddressError, DataError, ExperimentError, Overloaded
from fedge.core.limits import LlmLimits
from fedge.edge.llm.api.chat import Answer, Client, ask, chat, plain
from fedge.edge.llm.engine.requests import Request
from fedge.edge.llm.engine.sampler import Sampling
from tests.llm_server import NAME, served
from tests.test_llm_http import Slow

COLD = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with served(tmp_path_factory.mktemp("live"), api_key="s3cret", slots=2, context=256) as one:
        yield one


def expected(live, *messages, most=8):
    roles = ("user", "assistant")
    told = [{"role": roles[at % 2], "content": content} for at, content in enumerate(messages)]
    tokens = tuple(live.tokenizer.encode(live.tokenizer.chat(told), special=False))
    return "".join(piece.text for piece in live.engine.submit(Request(tokens, most, Sampling(temperature=0))))


def talk(client, *lines, **more):
    out = io.StringIO()
    chat(client, io.StringIO("".join(line + "\n" for line in lines)), out, **more)
    return out.getvalue()


def test_a_conversation_goes_on_until_it_is_reset(live):
    client = Client(live.url, None, "s3cret")
    first = expected(live, "Hi")
    second = expected(live, "Hi", first, "And you")
    assert second != first != expected(live, "And you") != second
    shown = talk(client, "Hi", "", "And you", "/reset", "Hi", "/help", "/quit", "Hi", **COLD)
    greeting, *turns = shown.split("> ")
    assert greeting.startswith(NAME)
    assert turns[:5] == [plain(first) + "\n", "", plain(second) + "\n", "", plain(first) + "\n"]
    assert len(turns) == 7
    assert turns[5] == greeting.removeprefix(f"{NAME}. ")
    assert talk(client, "Hi", **COLD).endswith(plain(first) + "\n> ")


def test_figures_follow_an_answer(live):
    shown = talk(Client(live.url + "/v1/", NAME, "s3cret"), "Hi", figures=True, **COLD)
    line = shown.splitlines()[-2]
    seconds, speed = (float(word) for word in line.strip("()").split() if word[0].isdigit())
    assert 0 <= seconds < 20
    assert speed > 0


def test_one_question_gives_plain_data(live):
    found = ask(Client(live.url, None, "s3cret"), "Hi", **COLD)
    assert json.loads(json.dumps(found)) == found
    assert (found["model"], found["answer"], found["finish_reason"]) == (NAME, expected(live, "Hi"), "length")
    assert found["completion_tokens"] == 8
    assert found["prompt_tokens"] > 8
    assert found["tokens_per_s"] > 0


def test_a_question_that_is_no_text_is_told_and_the_next_one_answered(live):
    client = Client(live.url, None, "s3cret")
    with pytest.raises(DataError, match="no valid UTF-8"):
        ask(client, "\udcff", **COLD)
    typed, out = io.TextIOWrapper(io.BytesIO(b"\xff\nHi\n\xe2"), "utf-8"), io.StringIO()
    chat(client, typed, out, **COLD)
    first, second, third, *rest = out.getvalue().split("> ")[1:]
    assert "no valid UTF-8" in first
    assert second == plain(expected(live, "Hi")) + "\n"
    assert "no valid UTF-8" in third
    assert rest == [""]


class Interrupted(io.StringIO):
    """Whoever reads along presses Ctrl-C when the third piece of an answer comes."""

    pieces = 0

    def write(self, text):
        if text.strip() and not text.startswith((">", NAME)):
            self.pieces += 1
            if self.pieces == 3:
                signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_ends_the_answer_and_nothing_else(tmp_path):
    with served(tmp_path, wrap=lambda model: Slow(model, 0.02)) as live:
        out, more = Interrupted(), {"temperature": 0, "max_tokens": 120, "logit_bias": {"2": -100}}
        chat(Client(live.url), io.StringIO("Hi\n"), out, **more)
        assert out.getvalue().endswith(" (ended)\n> ")
        stats = live.settle()
        assert stats["finished_cancelled"] == 1
        assert stats["generated_tokens"] < 60


def test_ctrl_c_between_answers_begins_a_new_line(live):
    class Keyboard(io.StringIO):
        presses = 2

        def readline(self):
            self.presses -= 1
            if self.presses >= 0:
                signal.raise_signal(signal.SIGINT)
            return super().readline()

    out = io.StringIO()
    chat(Client(live.url, None, "s3cret"), Keyboard("/quit\n"), out)
    assert out.getvalue().endswith("> \n> \n> ")


def test_what_the_server_refuses_is_shown_and_forgotten(live):
    client = Client(live.url, None, "s3cret")
    shown = talk(client, "x" * 2000, "Hi", **COLD)
    assert "shorten it." in shown
    assert plain(expected(live, "Hi")) in shown
    with pytest.raises(ExperimentError, match="shorten it"):
        ask(client, "x" * 2000)
    with pytest.raises(ExperimentError, match="API key is missing or wrong"):
        ask(Client(live.url, NAME, "wrong"), "Hi")
    with pytest.raises(ExperimentError, match="not served here"):
        ask(Client(live.url, "gpt-4", "s3cret"), "Hi")
    with pytest.raises(AddressError, match="does not answer"):
        ask(Client(live.url, NAME, "two\nlines"), "Hi")


def test_a_full_server_says_so(tmp_path):
    with served(tmp_path, limits=LlmLimits(max_requests=1), wrap=lambda model: Slow(model, 0.02)) as live:
        holding = live.engine.submit(Request((1,), 100, Sampling(), stop_tokens=()))
        with pytest.raises(Overloaded, match="ask again later"):
            ask(Client(live.url), "Hi")
        holding.cancel()


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://[", "http://a:99999"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ExperimentError, match="is no address"):
        Client(url)


# ---- Servers that misbehave ----------------------------------------------------------------------------------------


@contextmanager
def answering(data):
    """A server that sends `data` to whoever connects, after the request; and its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        line, _ = listener.accept()
        with line:
            line.settimeout(10)
            line.recv(65536)
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            while line.recv(65536):  # what is left unread would cut the answer off
                pass

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join(10)
        listener.close()


def stream(*events):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    return head + b"".join(b"data: " + event + b"\n\n" for event in events)


def says(text):
    return json.dumps({"choices": [{"delta": {"content": text}}]}).encode()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "does not answer"),
        (b"SSH-2.0-OpenSSH\r\n", "does not answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "cut off"),
        (stream(says("Hi")), "cut off"),
        (stream(b"{}", b"[DONE]"), "does not say why"),
        (stream(b"{", b"[DONE]"), "not in OpenAI's form"),
        (stream(b"[1]", b"[DONE]"), "not in OpenAI's form"),
        (stream(b"[" * 5000, b"[DONE]"), "not in OpenAI's form"),
        (stream(b'{"choices": [{"delta": 4}]}', b"[DONE]"), "not in OpenAI's form"),
        (stream(says("Hi"), b'{"error": {"message": "Rank 1 fell silent."}}', b"[DONE]"), "Rank 1 fell silent"),
        (b"HTTP/1.1 502 Bad\r\n\r\n<html>", "answers 502"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1\r\n\r\n", "answers 302"),
    ],
)
def test_a_server_that_misbehaves_is_told_in_one_sentence(data, error):
    with answering(data) as url, pytest.raises(AddressError, match=error):
        ask(Client(url, NAME, timeout_s=10), "Hi")


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(AddressError, match="check that the server runs"):
        ask(Client(url, timeout_s=5), "Hi")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(AddressError, match="timed out"):
        ask(Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2), "Hi")


def test_a_terminal_gets_no_orders_from_a_model():
    with answering(stream(says("a\x1b]0;evil\x07\x9b2Jb\r\nc\u202e"), b"[DONE]")) as url:
        assert talk(Client(url, NAME), "Hi").endswith("> a]0;evil2Jb\nc\n> ")


@given(st.text())
def test_plain_text_keeps_what_can_be_seen(text):
    assert all(letter.isprintable() or letter in "\n\t" for letter in plain(text))
    assert [one for one in text if one.isprintable()] == [one for one in plain(text) if one.isprintable()]


WORDS = st.sampled_from(["choices", "delta", "content", "usage", "finish_reason", "error", "message"])
CHUNKS = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
)


@given(CHUNKS.map(lambda chunk: json.dumps(chunk).encode()) | st.binary(max_size=9))
def test_any_chunk_is_understood_or_refused(chunk):
    answer = Answer()
    try:
        fresh = answer.add(chunk, 1.0)
    except AddressError:
        fresh = ""
    assert answer.text == fresh
    assert answer.tokens_per_s == 0
