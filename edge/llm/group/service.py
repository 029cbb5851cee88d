"""The service `Ranks` of protos/llm.proto on an address: who may call it, and what each caller is sent.

A stream occupies two threads for as long as a device is there, a download one; there are as many as the limits allow.
Must never decide what a group looks like.
"""

import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from fedge.core.addresses import is_local
from fedge.core.errors import DataError, ExperimentError, FedgeError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group import messages
from fedge.edge.llm.group.roster import Roster, Seat
from fedge.edge.llm.mesh import control
from fedge.edge.llm.mesh.security import Ticket
from fedge.protos import llm_pb2 as pb

SERVICE = "fedge.llm.v1.Ranks"
Context = Any  # grpc.ServicerContext; grpcio is not typed
Find = Callable[[str], Path | None]


class Ranks:
    """The two calls. `find` gives the file of a shard that may be fetched, by its digest."""

    def __init__(
        self, roster: Roster, welcome: pb.Welcome, find: Find, ticket: Ticket | None, limits: LlmLimits
    ) -> None:
        self._roster, self._find, self._limits = roster, find, limits
        self._secure = bool(ticket and ticket.certificate)
        self._welcome = pb.Order(welcome=welcome)

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server. Reports stay bytes, so that what is no message is answered with a sentence."""
        calls = {
            "Join": grpc.stream_stream_rpc_method_handler(self.join, None, pb.Order.SerializeToString),
            "Fetch": grpc.stream_stream_rpc_method_handler(
                self.fetch, pb.FetchRequest.FromString, pb.Chunk.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, calls)

    def join(self, reports: Iterator[bytes], context: Context) -> Iterator[pb.Order]:
        """One device's stream."""
        try:
            told = messages.report(control.first(reports, context, self._limits.connect_timeout_s), self._limits)
            hello = messages.hello(told.hello, _host(context.peer()), self._limits, secure=self._secure)
            seat = self._roster.enter(hello)
        except ExperimentError as error:
            yield messages.dismiss("PROTOCOL", str(error))
            return
        except FedgeError as error:
            yield messages.dismiss(error.reason, str(error))
            return
        try:
            threading.Thread(target=self._listen, args=(reports, seat), name="fedge-reports", daemon=True).start()
            yield self._welcome
            while (order := seat.orders.get()) is not None:
                yield order
        finally:
            self._roster.leave(seat)

    def fetch(self, requests: Iterator[pb.FetchRequest], context: Context) -> Iterator[pb.Chunk]:
        """The bytes of a shard from an offset to its end."""
        request = control.first(requests, context, self._limits.connect_timeout_s)
        path = self._find(request.digest)
        if path is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "There is no such shard any more; wait for the next order.")
            return
        try:
            with path.open("rb") as file:
                file.seek(min(request.offset, path.stat().st_size))
                while data := file.read(self._limits.fetch_chunk_bytes):
                    yield pb.Chunk(data=data)
        except OSError as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"The shard cannot be read ({error.strerror}); try again.")

    def _listen(self, reports: Iterator[bytes], seat: Seat) -> None:
        """Until the device hangs up, or says what cannot be."""
        try:
            for data in reports:
                self._roster.report(seat, messages.report(data, self._limits))
        except DataError as error:
            seat.put(messages.dismiss(error.reason, str(error)))
        except grpc.RpcError:  # the device is gone
            pass
        finally:
            seat.put(None)
            self._roster.leave(seat)


def _host(peer: str) -> str:
    """The host of gRPC's "ipv4:10.0.0.7:41234" or "ipv6:[::1]:41234"; empty for this machine."""
    host = urllib.parse.unquote(peer.partition(":")[2]).rpartition(":")[0]
    return "" if is_local(host) else host
