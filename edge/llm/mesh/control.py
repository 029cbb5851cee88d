"""gRPC servers of a model's head and of its cloud: who may listen and dial where, by TLS with a ticket.

Owns the way a server is opened and ended, how many calls it takes, and the check of a caller's token. Must never know
what is served.
"""

import contextlib
import hmac
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from fedge.core import addresses
from fedge.core.errors import AddressError, ExperimentError
from fedge.edge.llm.mesh.handshake import is_loopback
from fedge.edge.llm.mesh.security import Ticket

TOKEN = "fedge-token"  # noqa: S105 -- the name of the metadata, not what it holds
_GRACE_S = 0.5
Context = Any  # grpc.ServicerContext, which has no types


@dataclass(frozen=True, slots=True)
class Listening:
    """A server that runs, and its `address` with the port it has got."""

    address: str
    _server: grpc.Server
    _pool: ThreadPoolExecutor

    def stop(self) -> None:
        """End all calls, within a moment."""
        self._server.stop(_GRACE_S).wait(2 * _GRACE_S)
        self._pool.shutdown(wait=False, cancel_futures=True)


def serve(
    handler: grpc.GenericRpcHandler, listen: str, ticket: Ticket | None, key: str, *, calls: int, most_bytes: int
) -> Listening:
    """Answer at `listen` up to `calls` at a time, of messages of up to `most_bytes`.

    A ticket with a certificate, and its `key` (PEM), mean TLS; without, only loopback is listened on. Raises
    AddressError.
    """
    host, _ = addresses.parse(listen)
    secure = bool(ticket and ticket.certificate)
    if not secure and not is_local(host):
        raise AddressError(f"{listen} can be reached by other machines; give a ticket, or listen on 127.0.0.1.")
    pool = ThreadPoolExecutor(calls, "fedge-control")
    options = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", most_bytes),
        *addresses.keepalive_server(),
    ]
    server = grpc.server(pool, options=options, maximum_concurrent_rpcs=calls)
    server.add_generic_rpc_handlers((handler,))
    port = 0
    with contextlib.suppress(RuntimeError):
        if ticket and secure:
            pair = (key.encode(), ticket.certificate.encode())
            port = server.add_secure_port(listen, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(listen)
    if not port:
        pool.shutdown(wait=False)
        raise AddressError(f"Cannot listen on {listen}; stop who uses the port, or choose another.")
    server.start()
    return Listening(f"{host}:{port}", server, pool)


def admit(token: str, context: Context) -> None:
    """End a call that does not bring the ticket's token."""
    given = str(dict(context.invocation_metadata()).get(TOKEN, ""))
    if not hmac.compare_digest(given.encode(), token.encode()):
        context.abort(
            grpc.StatusCode.UNAUTHENTICATED, "The ticket is another one; copy ticket.json from the other end's machine."
        )


def check_dial(address: str, ticket: Ticket | None) -> None:
    """Raises AddressError for what is no address, and ExperimentError for another machine's without a certificate: what
    is sent there could be read by anybody, and anybody could answer.
    """
    host, _ = addresses.parse(address)
    if not (ticket and ticket.certificate) and not is_local(host):
        raise ExperimentError(f"{address} is another machine; give the ticket that its model was started with.")


def is_local(host: str) -> bool:
    """Whether a host never leaves this machine."""
    try:
        return host == "localhost" or is_loopback(host.strip("[]"))
    except ValueError:  # a name
        return False
