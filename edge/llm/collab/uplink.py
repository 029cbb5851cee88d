"""The device's line to the cloud that holds the upper layers: states go up by themselves, tokens are asked for.

A thread keeps one stream open, and opens another for as long as there is a device. Owns the stream, the waiting for an
answer, and the counts of bytes. Must never run a layer, choose a token, or decide what is sent next (exchange.py).
"""

import logging
import random
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from fedge.core import addresses
from fedge.core.errors import AddressError, FedgeError, ModelError, TooLate
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.collab import wire
from fedge.edge.llm.collab.exchange import Exchange, Question
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.mesh.control import check_dial
from fedge.edge.llm.mesh.security import SERVER_NAME, Ticket
from fedge.protos import llm_pb2 as pb
from fedge.protos import llm_pb2_grpc as rpc

log = logging.getLogger("fedge")

_TALK = f"/{wire.SERVICE}/Talk"
_FIRST_DELAY_S, _MOST_DELAY_S = 0.05, 2.0  # between two tries to connect
_FIRST_REST_S, _MOST_REST_S = 0.25, 8.0  # after a question without an answer, unless something is heard
_MESSAGE_BYTES = 1 << 16  # of states in one message
_CLOSE_S = 1.0  # gRPC would wait until the link has taken what was written
_MOST_TEXT = 200


class Uplink:
    """The line to the cloud at `address` for a model of this digest, from `layer` on. One sequence at a time.

    `ticket`: the cloud's, where it has one. `sent_bytes` and `received_bytes` are messages of the current sequence.
    `context` positions of a sequence, and `guesses` at a time, are what the cloud takes; any number until it is met.
    `trouble` says why there is no line. Raises AddressError for what is no address, and ExperimentError for another
    machine's without a ticket.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str,
        layer: int,
        hidden: int,
        coding: wire.Coding = "f16",
        limits: LlmLimits = LlmLimits(),
        ticket: Ticket | None = None,
    ) -> None:
        check_dial(address, ticket)
        self._address, self._model, self._layer = address, model, layer
        self._hidden, self._coding, self._limits = hidden, coding, limits
        self._metadata = wire.metadata(secrets.token_hex(16), model, layer, ticket.token if ticket else "")
        self._message_bytes = _MESSAGE_BYTES
        self._changed = threading.Condition()
        self._sequence: Exchange | None = None
        self._over: list[str] = []  # sessions to be forgotten
        self._stream = 0  # number of the one that is open; 0: none
        self._streams = self._sessions = self._questions = self._tries = 0
        self._rest_until, self._rest_s = 0.0, _FIRST_REST_S
        self._ended = threading.Event()
        self.sent_bytes = self.received_bytes = 0
        self.context = self.guesses = sys.maxsize
        self.trouble: FedgeError = AddressError(f"{address} has not been reached yet.")
        self._channel = _channel(address, ticket, limits)
        self._thread = threading.Thread(target=self._run, name="fedge-llm-uplink", daemon=True)
        self._thread.start()

    @property
    def usable(self) -> bool:
        """Whether a question would be sent."""
        refused = self._sequence and self._sequence.refused
        return bool(self._stream) and not refused and time.monotonic() >= self._rest_until

    def wait(self, timeout_s: float) -> bool:
        """Whether there is a line, within this time."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._stream), timeout_s)

    # ---- one sequence --------------------------------------------------------------------------

    def begin(self, sampling: Sampling) -> None:
        """A new sequence, whose tokens are drawn in this way; the one before is over."""
        with self._changed:
            self._end()
            self._sessions += 1
            self.sent_bytes = self.received_bytes = 0
            self._sequence = Exchange(str(self._sessions), sampling, self._hidden, self._coding)

    def push(self, start: int, rows: Array) -> None:
        """States [n, hidden] float32 from position `start` on: they are sent as soon as there is a line, and kept.

        Never waits. Raises ModelError for a number that is none.
        """
        with self._changed:
            if self._sequence and len(rows):
                self._sequence.put(start, rows)
                self._changed.notify_all()

    def back(self, length: int) -> None:
        """Positions from `length` on were guesses, and wrong; the cloud, which said so, has forgotten them too."""
        with self._changed:
            if self._sequence:
                self._sequence.back(length)

    def ask(self, position: int, guesses: Sequence[int] | None, deadline_s: float) -> wire.Told:
        """The token after `position`; with `guesses`, how many of the tokens after it are right, and the one that
        follows those. Waits until there is an answer.

        Raises TooLate after `deadline_s`, and AddressError at once where there is no line or the cloud refuses; for a
        while after that it is not asked again.
        """
        deadline_s = min(deadline_s, self._limits.max_deadline_s)
        with self._changed:
            sequence = self._sequence
            if sequence is None or not self.usable:
                why = (sequence and sequence.refused) or self.trouble
                raise AddressError(f"The cloud is not asked ({why}); it is tried again by itself.")
            self._questions += 1
            due_at = time.monotonic() + deadline_s
            asked = Question(self._questions, position, None if guesses is None else tuple(guesses), due_at)
            sequence.question = asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: asked.told or asked.refused, deadline_s)
            sequence.question = None
            if asked.told:
                self._rest_s = _FIRST_REST_S
                return asked.told
            self._rest_until = time.monotonic() + self._rest_s
            self._rest_s = min(2 * self._rest_s, _MOST_REST_S)
            trouble: FedgeError = TooLate(f"The cloud gave no token within {deadline_s:g} s; allow more time.")
            if asked.refused:
                trouble = AddressError(f"The cloud gave no token ({asked.refused}); it is asked again by itself.")
            self.trouble = trouble
        raise trouble

    def end(self) -> None:
        """The sequence is over: nothing more of it is sent, and the cloud may forget it."""
        with self._changed:
            self._end()
            self._changed.notify_all()

    def close(self) -> None:
        """End it all; who waits for an answer gets AddressError. May be called twice."""
        self._ended.set()
        self._down(AddressError(f"The line to {self._address} was closed."))
        threading.Thread(target=self._channel.close, daemon=True).start()
        self._thread.join(_CLOSE_S)

    def _end(self) -> None:
        if self._sequence and self._sequence.begun and self._stream:
            self._over.append(self._sequence.session)
        self._sequence = None

    # ---- the stream ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended.is_set():
            peace = AddressError(f"{self._address} ended the stream; it is opened again.")
            trouble: FedgeError = peace
            try:
                self._meet()
                self._listen()
                self._tries = 0  # it ended in peace: for silence, say
            except FedgeError as error:
                trouble = error
            except grpc.RpcError as error:
                trouble = _meaning(error, self._address)
            except ValueError:  # gRPC's answer on a channel that has been closed
                trouble = AddressError(f"The line to {self._address} was closed.")
            if trouble is not peace:
                self._warn(trouble)
            self._down(trouble)
            self._tries += 1
            ceiling_s = min(_MOST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(self._tries, 16))
            # Jitter needs no secrecy: it only keeps a thousand devices from coming back at once.
            self._ended.wait(random.uniform(ceiling_s / 4, ceiling_s))  # noqa: S311

    def _meet(self) -> None:
        """Raises ModelError for a cloud with another model."""
        stub: Any = rpc.ContinueStub(self._channel)  # type: ignore[no-untyped-call]
        request = pb.MeetRequest(protocol=wire.PROTOCOL, model=self._model, layer=self._layer)
        reply = stub.Meet(request, timeout=self._limits.connect_timeout_s, metadata=self._metadata)
        if reply.model != self._model:
            raise ModelError(f"{self._address} serves model {reply.model[:12]!r}; give both ends halves of one cut.")
        with self._changed:
            self._message_bytes = min(_MESSAGE_BYTES, reply.max_ask_bytes - wire.SLACK_BYTES)
            self.context, self.guesses = reply.context, reply.max_guesses

    def _listen(self) -> None:
        """Take replies until the stream ends. Raises DataError for what is none."""
        with self._changed:
            self._streams += 1
            self._stream, number = self._streams, self._streams
            self._rest_until, self._rest_s, self._over = 0.0, _FIRST_REST_S, []
            if self._sequence:
                self._sequence.doubt()
            self._changed.notify_all()
        if self._ended.is_set():
            return
        call: Any = self._channel.stream_stream(_TALK, None, None)(self._messages(number), metadata=self._metadata)
        try:
            for data in call:
                with self._changed:
                    self._take(data)
                    self._changed.notify_all()
        finally:
            call.cancel()

    def _warn(self, trouble: FedgeError) -> None:
        """Once for every trouble of another kind, and where the line stood before."""
        if not self._ended.is_set() and (self._stream or str(self.trouble) != str(trouble)):
            log.warning("The cloud cannot be used, exits answer until it can: %s", trouble)

    def _down(self, trouble: FedgeError) -> None:
        """The stream is gone, and with it the question that was on it."""
        with self._changed:
            self._stream, self.trouble = 0, trouble
            if self._sequence and self._sequence.question:
                self._sequence.question.refused = str(trouble)
            self._changed.notify_all()

    def _take(self, data: bytes) -> None:
        """One reply. Those to questions that nobody waits for any more only show that the cloud is there."""
        told, sequence = wire.told(data), self._sequence
        self._rest_until, self._tries = 0.0, 0
        if sequence is None or told.session != sequence.session:
            return
        self.received_bytes += len(data)
        sequence.take(told)

    def _messages(self, number: int) -> Iterator[bytes]:
        """What goes up on one stream, in order; gRPC's thread waits here for the next."""
        while True:
            with self._changed:
                data = None
                while self._stream == number and (data := self._next()) is None:
                    self._changed.wait()
                if data is None:
                    return
                self.sent_bytes += len(data)
            yield data

    def _next(self) -> bytes | None:
        """The next message, if there is one."""
        if self._over:
            return wire.asked_bytes(wire.Forget(self._over.pop(0)))
        return self._sequence.next(time.monotonic(), self._message_bytes) if self._sequence else None


def _channel(address: str, ticket: Ticket | None, limits: LlmLimits) -> grpc.Channel:
    options = [
        *addresses.keepalive(),
        ("grpc.max_send_message_length", limits.max_ask_bytes),
        ("grpc.initial_reconnect_backoff_ms", int(_FIRST_DELAY_S * 1000)),
        ("grpc.min_reconnect_backoff_ms", int(_FIRST_DELAY_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", 1000),  # the waiting is done here, not in the channel
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if ticket is None or not ticket.certificate:
        return grpc.insecure_channel(address, options)
    trusted = grpc.ssl_channel_credentials(root_certificates=ticket.certificate.encode())
    return grpc.secure_channel(address, trusted, [*options, ("grpc.ssl_target_name_override", SERVER_NAME)])


def _meaning(error: grpc.RpcError, address: str) -> FedgeError:
    status, detail = error.code(), (error.details() or "")[:_MOST_TEXT]
    if status in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT):
        return ModelError(f"{address}: {detail}")
    return AddressError(f"{address} cannot be reached ({status.name}: {detail})")
