"""A language model over HTTP, by OpenAI's API: chat and text completions, whole or streamed, models, health, metrics.

Owns the routes, and the way of one request: body, tokens, engine, answer. There is no thread per request: pieces come
from the engine's thread to the event loop, and a request whose client hangs up is cancelled. Must never choose a token,
and never log what users write.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fedge.core.errors import Overloaded, TooLong
from fedge.core.limits import LlmLimits
from fedge.edge.llm.api import metrics, openai_types
from fedge.edge.llm.api.http_gate import Gate, body, check_key
from fedge.edge.llm.api.http_stream import EventStream, Flight, Submits, unless_gone
from fedge.edge.llm.api.openai_answers import Form, usage
from fedge.edge.llm.api.openai_errors import ApiError, bad, failed, told
from fedge.edge.llm.api.openai_types import Asked, check_model
from fedge.edge.llm.engine.answer import Detokenizer
from fedge.edge.llm.engine.requests import Piece
from fedge.edge.llm.models.template import Messages

DONE = b"[DONE]"
_GONE = 499  # the status where nobody is there to read it


class Engine(Submits, Protocol):
    """What is needed of the engine."""

    def requests(self) -> tuple[int, int]:
        """How many run, and how many wait; told at once, as anybody may ask for it."""

    def stats(self) -> dict[str, float]:
        """Its figures; see metrics.py."""


class Tokenizer(Protocol):
    """What is needed of the tokenizer."""

    vocab: int
    eos: tuple[int, ...]

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text to tokens."""

    def chat(self, messages: Messages) -> str:
        """Messages to text."""

    def bytes_of(self, token: int) -> bytes:
        """What one token writes."""

    def stream(self) -> Detokenizer:
        """Tokens to text, where a prompt has ended."""


def app(
    engine: Engine,
    tokenizer: Tokenizer,
    model_name: str,
    *,
    limits: LlmLimits = LlmLimits(),
    api_key: str | None = None,
) -> Starlette:
    """The ASGI application; engine and tokenizer stay the caller's. Without `api_key` it answers to localhost only.

    Raises ExperimentError for a key that no header can carry.
    """
    check_key(api_key)
    figures = metrics.Metrics()
    service = _Service(engine, tokenizer, model_name, limits, figures)
    routes = [
        Route("/v1/chat/completions", _guarded(service.chat), methods=["POST"]),
        Route("/v1/completions", _guarded(service.completion), methods=["POST"]),
        Route("/v1/models", _guarded(service.models), methods=["GET"]),
        Route("/v1/models/{id:path}", _guarded(service.model), methods=["GET"]),
        Route("/health", _guarded(service.health), methods=["GET"]),
        Route("/metrics", _guarded(service.metrics), methods=["GET"]),
    ]
    gate = Middleware(Gate, api_key=api_key, seen=figures.seen)
    made = Starlette(routes=routes, middleware=[gate], exception_handlers={HTTPException: _unrouted})
    made.router.redirect_slashes = False
    made.state.protected = api_key is not None
    return made


def _guarded(answer: Callable[[Request], Awaitable[ASGIApp]]) -> Callable[[Request], Awaitable[ASGIApp]]:
    """An endpoint of which every error is told in OpenAI's form."""

    async def guarded(request: Request) -> ASGIApp:
        try:
            return await answer(request)
        except Exception as error:  # also mistakes of ours: a user gets an answer, the log the rest
            return told(error).response()

    return guarded


async def _unrouted(request: Request, error: Exception) -> Response:
    """No such path, or another method."""
    found = error if isinstance(error, HTTPException) else HTTPException(500)
    says = {404: "There is no such path here; use /v1/chat/completions, /v1/completions or /v1/models."}
    says[405] = f"{request.method[:20]} is not possible here; use the method of OpenAI's API."
    message = says.get(found.status_code, "The request failed; try again.")
    return ApiError(found.status_code, message, headers=found.headers).response()


class _Service:
    """The endpoints. They run on one event loop."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, name: str, limits: LlmLimits, figures: metrics.Metrics
    ) -> None:
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self._limits, self._figures, self._started = limits, figures, int(time.time())
        self._reading = asyncio.Lock()

    async def chat(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions."""
        return await self._answer(request, openai_types.chat(await body(request, self._limits), self._limits))

    async def completion(self, request: Request) -> ASGIApp:
        """POST /v1/completions."""
        return await self._answer(request, openai_types.completion(await body(request, self._limits), self._limits))

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        check_model(request.path_params["id"], self._name)
        return _json(self._model())

    async def health(self, _: Request) -> Response:
        """GET /health: the server lives, and how many requests it has."""
        running, waiting = self._engine.requests()
        return _json({"status": "ok", "running": running, "waiting": waiting})

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self._figures.text(self._engine.stats()), media_type=metrics.TYPE)

    def _model(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._started, "owned_by": "fedge"}

    async def _answer(self, request: Request, asked: Asked) -> ASGIApp:
        check_model(asked.model, self._name)
        prompts = await self._read(request, asked)
        if prompts is None:
            return Response(status_code=_GONE)
        form = self._form(asked)
        flight = self._flight(asked, prompts)
        if asked.stream:
            return EventStream(self._events(asked, form, flight), flight)
        try:
            answers = await unless_gone(request.receive, self._whole(flight))
        finally:
            flight.cancel()
        if answers is None:
            return Response(status_code=_GONE)
        return _json(form.whole(answers, usage(flight.usages, asked.choices)))

    async def _read(self, request: Request, asked: Asked) -> list[Sequence[int]] | None:
        """The tokens of each prompt, or None where the client has hung up. Raises Overloaded, before anything is read,
        where the engine takes no more.
        """
        if sum(self._engine.requests()) >= self._limits.max_requests:
            raise Overloaded("Too many requests wait or run already; ask again later.")
        # Long prompts take longer to read than streams should wait: in a thread, one at a time, as the model needs the
        # other cores.
        async with self._reading:
            if await request.is_disconnected():
                return None
            return await anyio.to_thread.run_sync(self._prompts, asked)

    def _prompts(self, asked: Asked) -> list[Sequence[int]]:
        """The tokens of each prompt."""
        if asked.chat:
            return [self._tokenizer.encode(self._tokenizer.chat(asked.messages), special=False)]
        return [self._tokenizer.encode(one) if isinstance(one, str) else one for one in asked.prompts]

    def _form(self, asked: Asked) -> Form:
        number = ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12)
        logprobs = asked.template.top_logprobs is not None
        ends = frozenset(self._tokenizer.eos)
        return Form(asked.chat, number, int(time.time()), self._name, logprobs, self._tokenizer.bytes_of, ends)

    def _flight(self, asked: Asked, prompts: Sequence[Sequence[int]]) -> Flight:
        """Submit all. Raises ApiError for prompts that the model cannot take, and what the engine raises."""
        for tokens in prompts:
            if not tokens:
                raise bad("The prompt is empty; send at least one token.", "prompt")
            if not all(0 <= token < self._tokenizer.vocab for token in tokens):
                raise bad(f"A token is none of the model's {self._tokenizer.vocab}; use its tokenizer.", "prompt")
        try:
            return Flight(self._engine, asked.requests(prompts))
        except TooLong as error:
            param = "messages" if asked.chat else "prompt"
            raise bad(str(error), param, "context_length_exceeded") from error

    async def _whole(self, flight: Flight) -> list[list[Piece]]:
        """The pieces of every request. Raises ApiError where one fails."""
        answers: list[list[Piece]] = [[] for _ in flight.usages]
        async for number, piece in flight.pieces():
            _check(piece)
            answers[number].append(piece)
            self._note(flight, number, piece)
        return answers

    async def _events(self, asked: Asked, form: Form, flight: Flight) -> AsyncGenerator[bytes, None]:
        """The stream: chunks as they come, an error where there is one, and the end."""
        encode = msgspec.json.encode
        more = {"usage": None} if asked.include_usage else {}
        offsets = [0] * len(flight.usages)
        for number in range(len(offsets)):
            if opening := form.opening(number):
                yield encode(opening | more)
        try:
            async for number, piece in flight.pieces():
                _check(piece)
                if chunk := form.chunk(number, piece, offsets[number]):
                    yield encode(chunk | more)
                offsets[number] += len(piece.text)
                self._note(flight, number, piece)
            if asked.include_usage:
                yield encode(form.cost(usage(flight.usages, asked.choices)))
        except Exception as error:
            yield encode(told(error).body())
        yield DONE

    def _note(self, flight: Flight, number: int, piece: Piece) -> None:
        if piece.finish:
            self._figures.ended(flight.usages[number])


def _check(piece: Piece) -> None:
    """Raises ApiError for a piece that ends a request without an answer."""
    if piece.finish == "error":
        raise failed(piece.cause)
    if piece.finish == "cancelled":
        raise ApiError(503, "The server ends; ask again later.", code="unavailable")


def _json(data: Any) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")
