"""The service `Continue` of protos/llm.proto on an address: devices come, send states, and are told tokens.

A device keeps one stream, over which it may have many sequences; a second stream of the same device takes the place of
the first. A message that is none, or out of order, is refused by itself, and the stream goes on. A stream occupies two
threads for as long as it is open, and there are as many as the limits allow. One over which nothing is said is ended,
and its device opens the next. Owns who may call, and what each caller is sent. Must never compute.
"""

import contextlib
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from fedge.core.errors import FedgeError, ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.collab import wire
from fedge.edge.llm.collab.continuer import Continuer
from fedge.edge.llm.collab.stream import Stream
from fedge.edge.llm.collab.wire import Forget, Hidden, Told
from fedge.edge.llm.compute.choice import kernel_for
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.mesh import control
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.mesh.security import Ticket
from fedge.edge.llm.ranks.head import Head
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.shards.shard import Shard, open_shard
from fedge.protos import llm_pb2 as pb

Context = Any  # grpc.ServicerContext; grpcio is not typed
_CLIENT = re.compile("[0-9a-f]{32}")
_SPARE_CALLS = 8  # beside the streams: devices that come
_log = logging.getLogger("fedge")


class ContinueService:
    """The two calls, for the model of digest `model` from `layer` on."""

    def __init__(self, continuer: Continuer, model: str, layer: int, limits: LlmLimits) -> None:
        self._continuer, self._model, self._layer, self._limits = continuer, model, layer, limits
        self._streams: dict[str, Stream] = {}
        self._lock = threading.Lock()

    def handler(self) -> grpc.GenericRpcHandler:
        """For a server. Messages of Talk stay bytes, so that each is judged by itself."""
        calls = {
            "Meet": grpc.stream_unary_rpc_method_handler(
                self.meet, pb.MeetRequest.FromString, pb.MeetReply.SerializeToString
            ),
            "Talk": grpc.stream_stream_rpc_method_handler(self.talk, None, wire.told_bytes),
        }
        return grpc.method_handlers_generic_handler(wire.SERVICE, calls)

    def meet(self, requests: Iterator[pb.MeetRequest], context: Context) -> pb.MeetReply:
        """What is served, to a device that has the other half of it."""
        request = control.first(requests, context, self._limits.connect_timeout_s)
        self._compare(request.protocol, request.model, request.layer, context)
        return pb.MeetReply(
            model=self._model,
            context=self._continuer.context,
            max_ask_bytes=self._limits.max_ask_bytes,
            max_guesses=self._limits.max_guesses,
        )

    def talk(self, messages: Iterator[bytes], context: Context) -> Iterator[Told]:
        """One device's stream, until it hangs up and has its answers, says nothing for long, or its next one comes."""
        stream = Stream(self._talker(context), context.cancel, self._limits)
        self._let_in(stream, context)
        try:
            # Messages only end, as if the device still listened, where it says that it is finished before it hangs up.
            if not context.add_callback(stream.gone):
                stream.gone()
            threading.Thread(target=self._listen, args=(messages, stream), name="fedge-asks", daemon=True).start()
            while reply := stream.next():
                yield reply
        finally:
            stream.end()
            self._continuer.leave(stream)
            with self._lock:
                if self._streams.get(stream.client) is stream:
                    del self._streams[stream.client]

    def _let_in(self, stream: Stream, context: Context) -> None:
        """Take the place of the device's last stream, or a free one; ends the call where there is none."""
        with self._lock:
            older = self._streams.get(stream.client)
            if older is None and len(self._streams) >= self._limits.max_devices:
                detail = f"The cloud has its {self._limits.max_devices} devices; it is tried again when one has left."
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, detail)
            self._streams[stream.client] = stream
        if older:
            older.cut()

    def _listen(self, messages: Iterator[bytes], stream: Stream) -> None:
        try:
            for data in messages:
                stream.heard()
                with stream.turn:
                    if stream.ended:
                        return
                    reply = self._take(data, stream)
                if reply:
                    stream.reply(reply)
            stream.finish()
        except Exception as error:  # gRPC's own way to say that the stream is over
            _log.debug("a device's stream has ended", exc_info=error)
            stream.end()

    def _take(self, data: bytes, stream: Stream) -> Told | None:
        """One message, and the reply to it if there is one at once."""
        try:
            asked = wire.asked(data, self._continuer.hidden, self._limits)
            key = (stream.client, asked.session)
            if isinstance(asked, Hidden):
                return stream.news(self._continuer.take(key, asked), asked.session)
            if isinstance(asked, Forget):
                self._continuer.forget(key)
                return None
            with stream.expecting():
                self._continuer.ask(key, asked, stream, stream.tell)
            return None
        except FedgeError as error:
            number, session = wire.origin(data)
            known = self._continuer.known((stream.client, session))
            return Told(number, session, known, reason=error.reason, detail=str(error))

    def _talker(self, context: Context) -> str:
        given = {key: str(value) for key, value in context.invocation_metadata()}
        client, protocol, layer = (given.get(key, "") for key in (wire.CLIENT, wire.VERSION, wire.LAYER))
        numbers = [int(text) if text.isdecimal() and len(text) < 10 else -1 for text in (protocol, layer)]
        self._compare(numbers[0], given.get(wire.MODEL, ""), numbers[1], context)
        if not _CLIENT.fullmatch(client):
            detail = f"The device names itself {client[:40]!r}; send 32 random hexadecimal digits."
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, detail)
        return client

    def _compare(self, protocol: int, model: str, layer: int, context: Context) -> None:
        detail = ""
        if protocol != wire.PROTOCOL:
            detail = f"Protocol {wire.PROTOCOL} is spoken here, not {protocol}; install the same fedge."
        elif model != self._model:
            detail = f"The cloud continues model {self._model[:12]}, not {model[:12]!r}; use the halves of one cut."
        elif layer != self._layer:
            detail = f"The cloud continues at layer {self._layer}, not {layer}; use the halves of one cut."
        if detail:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, detail)


@contextlib.contextmanager
def cloud_at(
    path: Path,
    listen: str,
    *,
    ticket: Ticket | None = None,
    key: str = "",
    slots: int = LlmLimits().max_slots,
    context: int | None = None,
    kernel: str | None = None,
    limits: LlmLimits = LlmLimits(),
) -> Iterator[str]:
    """The shard at `path`, the upper layers of a model with its head, answering at the address that this yields.

    `slots` sequences have their keys and values in memory at a time, of `context` tokens each (None: the model's own).
    A `ticket` with a certificate, and its `key` (PEM), mean TLS, which `listen` needs off loopback; port 0 draws a free
    one. `kernel` None: the fastest of those that compute each sequence as if it were alone. Raises AddressError,
    ExperimentError and ModelError.
    """
    shard = _upper(open_shard(path, limits))
    longest = shard.config.room(context)
    with contextlib.ExitStack() as opened:
        blocks = Resident(shard, kernel_for(shard, kernel, limits, invariant=True))
        opened.callback(blocks.close)
        rank = Rank(shard, blocks, Alone(), slots=slots, context=longest, limits=limits)
        continuer = Continuer(rank, Head(shard, blocks), limits)
        opened.callback(continuer.close)
        service = ContinueService(continuer, shard.model, shard.layers.start, limits)
        listening = serve(service, listen, ticket, key, limits)
        opened.callback(listening.stop)
        yield listening.address


def serve_cloud(
    path: Path,
    listen: str,
    *,
    on_listening: Callable[[str], None] = lambda _: None,
    ended: threading.Event | None = None,
    **settings: Any,
) -> None:
    """Serve until SIGTERM, where this is the main thread, or until `ended` is set; for the rest see `cloud_at`."""
    told = ended or threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set()) if main else None
    try:
        with cloud_at(path, listen, **settings) as address:
            on_listening(address)
            told.wait()
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _upper(shard: Shard) -> Shard:
    """The shard, if it is what a cloud needs. Raises ModelError."""
    if shard.ranks > 1 or shard.layers.stop != shard.config.layers or not shard.about.head:
        raise ModelError(f"{shard.path} is not the upper part of a model as a whole; give the cloud's half of a cut.")
    return shard


def serve(
    service: ContinueService, listen: str, ticket: Ticket | None, key: str, limits: LlmLimits
) -> control.Listening:
    """The service at an address. Raises AddressError."""
    most = 2 * limits.max_ask_bytes  # what is a little too long is told so
    calls = limits.max_devices + _SPARE_CALLS
    return control.serve(service.handler(), listen, ticket, key, calls=calls, most_bytes=most)
