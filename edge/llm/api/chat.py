"""A chat in a terminal with a language model behind OpenAI's API, and one question with its answer as JSON.

Owns the conversation, the reading of the stream, and the figures of an answer. What a model writes is shown without
control characters: a terminal obeys them. Must never import what computes a model.
"""

import http.client
import io
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO
from urllib.parse import urlsplit

import msgspec

from fedge.core.errors import AddressError, DataError, ExperimentError, FedgeError, Overloaded

MAX_LINE_BYTES = 1 << 20  # of a stream, and of an error
HELP = "/reset forgets the conversation, /quit ends it, Ctrl-C ends an answer."

Message = dict[str, str]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(slots=True)
class Answer:
    """One answer, as it grows. Times in seconds since the question was sent."""

    text: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    def add(self, data: bytes, now_s: float) -> str:
        """What a chunk of the stream adds to the text. Raises AddressError for one that is none, or an error."""
        try:
            chunk = msgspec.json.decode(data, type=_Chunk)
        except (ValueError, RecursionError) as error:
            raise AddressError("The answer is not in OpenAI's form; check the address.") from error
        if chunk.error is not None or chunk.choices is None:
            raise _told(500, data)
        if chunk.usage is not None:
            self.prompt_tokens, self.completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        choice = chunk.choices[0] if chunk.choices else _Choice()
        self.finish = choice.finish_reason or self.finish
        fresh = choice.delta.content or ""
        if fresh:
            self.first_s, self.last_s = self.first_s or now_s, now_s
        self.text += fresh
        return fresh

    @property
    def tokens_per_s(self) -> float:
        """After the first one; 0 where there is nothing to tell."""
        tokens, seconds = self.completion_tokens - 1, self.last_s - self.first_s
        return tokens / seconds if tokens > 0 and seconds > 0 else 0.0


class Client:
    """One server. `url` is http://host:port, with or without /v1. `model` None: the first one that is served.

    Raises ExperimentError for what is no such address.
    """

    def __init__(
        self, url: str, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
    ) -> None:
        try:
            self._url = urlsplit(url.rstrip("/"))
            port = self._url.port
        except ValueError as error:
            raise ExperimentError(f"{url!r} is no address ({error}); write http://127.0.0.1:8000.") from error
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ExperimentError(f"{url!r} is no address; write http://127.0.0.1:8000.")
        self._base = self._url.path.removesuffix("/v1") + "/v1"
        self._host, self._port, self._timeout_s = self._url.hostname, port, timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._model = model

    def model(self) -> str:
        """The model that is asked. Raises AddressError where the server does not answer."""
        if self._model is None:
            with self._opened("GET", "/models", None) as response:
                try:
                    self._model = msgspec.json.decode(response.read(MAX_LINE_BYTES), type=_Models).data[0].id
                except (ValueError, LookupError, RecursionError) as error:
                    raise AddressError("The server names no model; check the address.") from error
        return self._model

    def ask(self, messages: list[Message], answer: Answer, **settings: Any) -> Generator[str, None, None]:
        """The answer's text as it comes; `answer` holds what has come so far, also where this ends early.

        Raises AddressError, Overloaded, ExperimentError for what the server refuses, or DataError for a text that is
        no Unicode.
        """
        body = {"model": self.model(), "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        started = time.monotonic()
        with self._opened("POST", "/chat/completions", body | settings) as response:
            for chunk in _chunks(response):
                fresh = answer.add(chunk, time.monotonic() - started)
                if fresh:
                    yield fresh

    @contextmanager
    def _opened(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        """One request on its own connection; closing that tells the server to stop. Errors become fedge's."""
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        line = kind(self._host, self._port, timeout=self._timeout_s)
        data = None if body is None else _encoded(body)
        try:
            line.request(method, self._base + path, data, self._headers)
            with line.getresponse() as response:
                if response.status != 200:
                    raise _told(response.status, response.read(MAX_LINE_BYTES))
                yield response
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last: a key or path that cannot be sent
            why = str(error) or type(error).__name__
            where = f"{self._host}:{line.port}"
            raise AddressError(f"{where} does not answer ({why:.200}); check that the server runs.") from error
        finally:
            line.close()


def _encoded(body: Any) -> bytes:
    """JSON. Raises DataError for a text with what was no UTF-8 when it was typed, which is a lone surrogate here."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        raise DataError("The question is no valid UTF-8; type it again.") from None


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The data of a stream of events, up to its end. Raises AddressError where it ends without one."""
    while line := response.readline(MAX_LINE_BYTES):
        name, _, data = line.strip().partition(b":")
        if name == b"data":
            if data.strip() == b"[DONE]":
                return
            yield data
    raise AddressError("The answer was cut off; ask again.")


def _told(status: int, data: bytes) -> FedgeError:
    """A server's error as fedge's."""
    try:
        error = msgspec.json.decode(data)["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        error = f"The server answers {status} and does not say why; check the address."
    message = plain(str(error))
    if status == 429:
        return Overloaded(message)
    return ExperimentError(message) if 400 <= status < 500 else AddressError(message)


def plain(text: str) -> str:
    """Text for a terminal: without control characters, but for ends of lines and tabs."""
    return "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())


def chat(client: Client, source: TextIO, out: TextIO, *, figures: bool = False, **settings: Any) -> None:
    """Questions by lines from `source`, answers to `out`, until /quit or the end. `figures`: times behind each answer.

    Errors of an answer are shown, and its question forgotten; the conversation goes on.
    """
    if isinstance(source, io.TextIOWrapper):
        source.reconfigure(errors="surrogateescape")  # bytes that are no text spoil their own question only
    print(f"{client.model()}. {HELP}", file=out)
    messages: list[Message] = []
    while (line := _line(source, out)) is not None:
        question = line.strip()
        if question == "/quit":
            return
        if question == "/reset":
            messages.clear()
        elif question.startswith("/"):
            print(HELP, file=out)
        elif question:
            messages += _turn(client, messages, question, out, figures, settings)


def _line(source: TextIO, out: TextIO) -> str | None:
    """The next line; None at the end. Ctrl-C begins a new one."""
    while True:
        try:
            print("> ", end="", file=out, flush=True)
            return source.readline() or None
        except KeyboardInterrupt:
            print(file=out)


def _turn(
    client: Client, messages: list[Message], question: str, out: TextIO, figures: bool, settings: dict[str, Any]
) -> list[Message]:
    """One question and what is kept of it."""
    asked, answer, note = {"role": "user", "content": question}, Answer(), ""
    stream = client.ask([*messages, asked], answer, **settings)
    try:
        for fresh in stream:
            print(plain(fresh), end="", file=out, flush=True)
    except KeyboardInterrupt:
        note = " (ended)"
    except FedgeError as error:
        print(f"\n{error}", file=out)
        return []
    finally:
        stream.close()
    print(note, file=out)
    if figures:
        print(f"({answer.first_s:.2f} s to the first token, {answer.tokens_per_s:.1f} tokens/s)", file=out)
    return [asked, {"role": "assistant", "content": answer.text}]


def ask(client: Client, question: str, **settings: Any) -> dict[str, Any]:
    """One question, and the answer as plain data: text, why it ended, what it cost, how fast it came.

    Raises what Client.ask does.
    """
    answer = Answer()
    for _ in client.ask([{"role": "user", "content": question}], answer, **settings):
        pass
    return {
        "model": client.model(),
        "answer": answer.text,
        "finish_reason": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "ttft_s": round(answer.first_s, 4),
        "tokens_per_s": round(answer.tokens_per_s, 2),
    }
