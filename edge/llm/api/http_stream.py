"""The requests of one HTTP request on their way through the engine, and answers that are sent as they grow.

Owns the way from the engine's thread to the server's event loop, server-sent events (HTML standard, section 9.2), and
that a request ends when its client hangs up. A client that does not read stops its own answer only: what waits for it
is bounded by the number of its tokens. Must never block, or start a thread.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from starlette.types import Receive, Scope, Send

from fedge.edge.llm.engine.handle import Handle
from fedge.edge.llm.engine.requests import Piece, Request, Usage

T = TypeVar("T")
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Submits(Protocol):
    """What is needed of the engine."""

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None, /) -> Handle:
        """Let a request wait for its turn."""


class Flight:
    """Several requests, merged into one stream of (number, piece). Made on the event loop.

    Raises what `submit` raises; then none of them runs.
    """

    def __init__(self, engine: Submits, requests: Sequence[Request]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._handles: list[Handle] = []
        try:
            for number, request in enumerate(requests):
                self._handles.append(engine.submit(request, self._receiver(number)))
        except BaseException:
            self.cancel()
            raise

    @property
    def usages(self) -> list[Usage]:
        """What each has cost so far."""
        return [handle.usage for handle in self._handles]

    def cancel(self) -> None:
        """End all that still run."""
        for handle in self._handles:
            handle.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """All pieces of all requests, in the order in which they came."""
        left = len(self._handles)
        while left:
            number, piece = await self._queue.get()
            left -= piece.finish is not None
            yield number, piece

    def _receiver(self, number: int) -> Callable[[Piece], None]:
        def receive(piece: Piece) -> None:
            if not self._loop.is_closed():  # the server has ended before the engine
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, piece))

        return receive


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives, or None where the client hangs up first; then it is cancelled. The body has been read."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI answer of server-sent events, each the bytes of one `data` field. However it ends, `flight` ends too."""

    def __init__(self, events: AsyncGenerator[bytes, None], flight: Flight) -> None:
        self._events, self._flight = events, flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them as they come, until there are no more or the client hangs up."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._flight.cancel()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            async for event in self._events:
                await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
                await asyncio.sleep(0)  # neither waits where there is a backlog, and others want their turn
            await send({"type": "http.response.body", "body": b""})
