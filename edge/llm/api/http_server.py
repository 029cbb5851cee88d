"""The HTTP server as a process sees it: a socket, uvicorn, and how long a connection may keep it waiting.

Owns the socket and its timeouts. What others can reach needs an API key. A client that sends its request too slowly,
or (on Linux) reads nothing of its answer, loses its connection. Must never look at a request.
"""

import asyncio
import signal
import socket
from types import FrameType, TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedge.core.addresses import check_listen, parse
from fedge.core.errors import AddressError
from fedge.core.limits import LlmLimits


class Server:
    """Listens on `listen` ("127.0.0.1:8000"; port 0: any) from now on and answers while `run` runs.

    Raises AddressError where that is not possible, or where others could reach an application without API key.
    """

    def __init__(self, app: Starlette, listen: str, limits: LlmLimits = LlmLimits()) -> None:
        self._socket = _listener(listen, app.state.protected, limits)
        name, number = self._socket.getsockname()[:2]
        self.address = f"[{name}]:{number}" if ":" in name else f"{name}:{number}"
        self._server = _Uvicorn(_config(app, limits))

    def run(self) -> None:
        """Answer requests until `stop`, or a signal in the main thread; then answers under way may end, for a while.

        Returns after `stop` and SIGTERM; raises KeyboardInterrupt after SIGINT.
        """
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Let `run` return; from any thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """Give the socket back; `run` has returned, or has never been called."""
        self._socket.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def check(listen: str, protected: bool, limits: LlmLimits = LlmLimits()) -> None:
    """Whether a server could listen there: before a model is loaded for it. Raises AddressError."""
    _listener(listen, protected, limits).close()


def _listener(listen: str, protected: bool, limits: LlmLimits) -> socket.socket:
    address, port = parse(listen)
    try:
        check_listen(listen, protected)
    except AddressError as error:
        remedy = "set an API key, or listen on 127.0.0.1"
        raise AddressError(f"{listen} can be reached by other machines; {remedy}.") from error
    host = address.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=limits.max_connections)
    except OSError as error:
        raise AddressError(f"{host}:{port} cannot be listened on ({error}); name another address.") from error
    # Connections inherit these: peers that are gone are found, and on Linux those that do not read are dropped, too.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(limits.http_timeout_s)))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(limits.http_timeout_s * 1000))
    return made


def _config(app: Starlette, limits: LlmLimits) -> uvicorn.Config:
    class Timed(_Timed):
        head_s = limits.http_timeout_s

    return uvicorn.Config(
        app,
        http=Timed,
        ws="none",
        loop="asyncio",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=max(1, round(limits.max_idle_s)),
        timeout_graceful_shutdown=max(1, round(limits.shutdown_s)),
    )


class _Uvicorn(uvicorn.Server):
    """uvicorn's, which raises signals again when it has ended: SIGTERM would kill who has others to dismiss first."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Overrides uvicorn's."""
        if sig == signal.SIGTERM:
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)


class _Timed(H11Protocol):
    """uvicorn's, which waits for the head of a request without end: a connection has to send one within `head_s`."""

    head_s = 30.0
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Overrides uvicorn's."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Overrides uvicorn's."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Overrides uvicorn's."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._due is None and not self.transport.is_closing():
            self._due = self.loop.call_later(self.head_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
