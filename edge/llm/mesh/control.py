"""gRPC servers of a model's head and of its cloud: who may listen and dial where, by TLS with a ticket.

Owns the way a server is opened and ended, how many calls it takes, and who may hold one: a caller without the ticket's
token is sent away before it has said anything, one that says nothing after a while. Must never know what is served.
"""

import contextlib
import hmac
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from fedge.core import addresses
from fedge.core.errors import AddressError, ExperimentError
from fedge.edge.llm.mesh.security import Ticket

TOKEN = "fedge-token"  # noqa: S105 -- the name of the metadata, not what it holds
_GRACE_S = 0.5
Context = Any  # grpc.ServicerContext, which has no types
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listening:
    """A server that runs, and its `address` with the port it has got."""

    address: str
    _server: grpc.Server

    def stop(self) -> None:
        """End all calls, within a moment; at the end of the interpreter they end by themselves."""
        if not sys.is_finalizing():  # then no thread can be started, and gRPC would wait for one
            self._server.stop(_GRACE_S).wait(2 * _GRACE_S)


def serve(
    handler: grpc.GenericRpcHandler, listen: str, ticket: Ticket | None, key: str, *, calls: int, most_bytes: int
) -> Listening:
    """Answer at `listen` up to `calls` at a time, of messages of up to `most_bytes`.

    A ticket with a certificate, and its `key` (PEM), mean TLS; without, only loopback is listened on. Raises
    AddressError.
    """
    host, _ = addresses.parse(listen)
    secure = bool(ticket and ticket.certificate)
    if not secure and not addresses.is_local(host):
        raise AddressError(f"{listen} can be reached by other machines; give a ticket, or listen on 127.0.0.1.")
    options = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", most_bytes),
        *addresses.keepalive_server(),
    ]
    door = _Door(ticket.token if ticket else "")
    server = grpc.server(_Threads(), interceptors=(door,), options=options, maximum_concurrent_rpcs=calls)
    server.add_generic_rpc_handlers((handler,))
    port = 0
    with contextlib.suppress(RuntimeError):
        if ticket and secure:
            pair = (key.encode(), ticket.certificate.encode())
            port = server.add_secure_port(listen, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(listen)
    if not port:
        raise AddressError(f"Cannot listen on {listen}; stop who uses the port, or choose another.")
    server.start()
    return Listening(f"{host}:{port}", server)


def first(messages: Iterator[T], context: Context, within_s: float) -> T:
    """A call's first message. Ends the call where none comes in time, and where it has none."""
    patience = threading.Timer(within_s, context.cancel)
    patience.daemon = True
    patience.start()
    try:
        return next(messages)
    except StopIteration:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The call says nothing; install the same version of fedge.")
        raise
    finally:
        patience.cancel()


def check_dial(address: str, ticket: Ticket | None) -> None:
    """Raises AddressError for what is no address, and ExperimentError for another machine's without a certificate: what
    is sent there could be read by anybody, and anybody could answer.
    """
    host, _ = addresses.parse(address)
    if not (ticket and ticket.certificate) and not addresses.is_local(host):
        raise ExperimentError(f"{address} is another machine; give the ticket that its model was started with.")


class _Door(grpc.ServerInterceptor):  # type: ignore[misc]
    """Sends away who does not bring the token: a handler of gRPC's would wait for the message of such a call first."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def intercept_service(self, go_on: Callable[[Any], Any], details: Any) -> Any:
        """The handler of a call."""
        given = str(dict(details.invocation_metadata).get(TOKEN, ""))
        if hmac.compare_digest(given.encode(), self._token):
            return go_on(details)
        return grpc.stream_stream_rpc_method_handler(_refuse)  # of any kind: it does not look at messages


class _Threads(Executor):
    """A daemon thread for each call, of which gRPC bounds the number: the interpreter's end waits for none of them."""

    def submit(self, work: Callable[..., T], /, *args: Any, **more: Any) -> "Future[T]":
        """Begin at once."""
        found: Future[T] = Future()

        def run() -> None:
            try:
                found.set_result(work(*args, **more))
            except BaseException as error:
                found.set_exception(error)

        try:
            threading.Thread(target=run, name="fedge-control", daemon=True).start()
        except RuntimeError as error:  # no thread is left: this call is lost, and not the server
            found.set_exception(error)
        return found


def _refuse(_messages: Any, context: Context) -> None:
    detail = "The ticket is another one; copy ticket.json from the other end's machine."
    context.abort(grpc.StatusCode.UNAUTHENTICATED, detail)
