"""Who may come in, and how much they may send: checks before anything of a request is understood.

Owns the API key, the defence of a server without one against web pages (a browser may be talked into sending requests
to this machine), and the reading of bodies. Must never look into a body.
"""

import asyncio
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedge.core.addresses import is_local
from fedge.core.errors import ExperimentError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.api.openai_errors import ApiError, bad

OPEN = "/health"  # needs no key


def check_key(api_key: str | None) -> None:
    """Raises ExperimentError for a key that no header can carry, or that is none."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ExperimentError("The API key is empty or has spaces or odd characters; use letters and digits.")


class Gate:
    """ASGI middleware. `seen` is told path and status of every answer."""

    def __init__(self, app: ASGIApp, api_key: str | None, seen: Callable[[str, int], None]) -> None:
        self._app, self._key, self._seen = app, api_key, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._seen(scope["path"], message["status"])
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, watched)
        else:
            await self._app(scope, receive, watched)

    def _check(self, path: str, headers: Headers) -> None:
        if self._key is None:
            if not is_local(_host(headers.get("host", "localhost"))):
                raise ApiError(403, "Without an API key this server answers to localhost only; start it with one.")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        known = hmac.compare_digest(key.strip().encode(), self._key.encode())
        if path != OPEN and not (known and scheme.lower() == "bearer"):
            message = "The API key is missing or wrong; send it as Authorization: Bearer."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _host(header: str) -> str:
    """Of a Host header, without the port."""
    return header.partition("]")[0] if header.startswith("[") else header.partition(":")[0]


async def body(request: Request, limits: LlmLimits = LlmLimits()) -> bytes:
    """The whole body. Raises ApiError for one that is no JSON by its header, too large or too slow.

    The header matters: web pages may send every other kind to other servers without being asked.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body has to be JSON; send it with Content-Type: application/json.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.http_timeout_s):
            return await _read(request, limits)
    except TimeoutError as error:
        slow = f"The body took longer than {limits.http_timeout_s:g} seconds; send it at once."
        raise ApiError(408, slow, headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise bad("The body ended early; send all of it.") from error  # nobody is there to read this


async def _read(request: Request, limits: LlmLimits) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limits.max_body_bytes:
            raise _too_large(limits)
        parts.append(part)
    return b"".join(parts)


def _too_large(limits: LlmLimits) -> ApiError:
    return ApiError(413, f"The body has more than {limits.max_body_bytes} bytes; send a shorter prompt.")
