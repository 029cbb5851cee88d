"""A worker: joins a head, obeys its orders, and comes back whenever the head does, until it is told to stop.

Owns the connection to the head and the law of trying again. Must never plan, nor compute in the thread that listens.
"""

import contextlib
import logging
import queue
import random
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from fedge.core import addresses
from fedge.core.errors import AddressError, DataError, ExperimentError, StaleIncarnation
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group import messages
from fedge.edge.llm.group.service import SERVICE
from fedge.edge.llm.group.speeds import Speeds, speeds
from fedge.edge.llm.group.store import Store
from fedge.edge.llm.group.work import Self, Work
from fedge.edge.llm.mesh import security
from fedge.edge.llm.mesh.control import TOKEN, check_dial
from fedge.edge.llm.mesh.security import SERVER_NAME, Ticket
from fedge.edge.runtime.memory import resident
from fedge.protos import llm_pb2 as pb

log = logging.getLogger("fedge")
_POLL_S = 0.2
OnState = Callable[[str], None]
_NO_MATTER_HOW_OFTEN = {  # what trying again will not mend
    "PROTOCOL": ExperimentError,
    DataError.reason: ExperimentError,
    "REPLACED": StaleIncarnation,
}


@dataclass(frozen=True, slots=True)
class _Device:
    """Settings of one worker."""

    address: str
    ticket: Ticket | None
    hello: pb.Hello
    own: Self
    stop: threading.Event
    on_state: OnState
    limits: LlmLimits = field(repr=False)


def run(
    address: str,
    *,
    name: str,
    memory_bytes: int,
    store: Path,
    ticket: Ticket | None = None,
    data_port: int = 0,
    kernel: str | None = None,
    speed: Speeds | None = None,
    on_state: OnState = lambda _: None,
    stop: threading.Event | None = None,
    limits: LlmLimits = LlmLimits(),
) -> None:
    """Work for the head at `address` ("host:port") until SIGTERM, or until `stop` is set.

    `memory_bytes` are for weights, keys and values; `store` is this worker's own folder for shards. A `ticket` with a
    certificate means TLS, which a head on another machine needs. `data_port` is where other ranks dial (0: any).
    `kernel` names one of kernels.KERNELS, `speed` replaces the measurement. `on_state` is told what the worker does, in
    a few words. Raises ExperimentError for settings that cannot work or a head that refuses them for good,
    StaleIncarnation where another device has taken the name.
    """
    check_dial(address, ticket)
    host, _ = addresses.parse(address)
    secure = bool(ticket and ticket.certificate)
    told = threading.Event() if stop is None else stop
    with contextlib.ExitStack() as opened:
        folder = Store(store, limits)
        opened.callback(folder.close)
        listener = opened.enter_context(listen("" if secure else host.strip("[]"), data_port))
        identity = security.identity() if secure else None
        known = speed or speeds(store)
        hello = pb.Hello(
            protocol=messages.PROTOCOL,
            name=name,
            incarnation=secrets.token_hex(16),
            weights_per_s=dict(known.weights_per_s),
            memory_bytes=memory_bytes,
            disk_bps=known.disk_bytes_per_s,
            layer_s=known.layer_s,
            data_address=f":{listener.getsockname()[1]}",
            certificate=identity[0] if identity else "",
        )
        opened.enter_context(_sigterm(told))
        own = Self(folder, listener, identity, kernel, limits)
        _persist(_Device(address, ticket, hello, own, told, on_state, limits))


def listen(host: str, port: int) -> socket.socket:
    """A socket for other ranks; an empty host means all of this machine's. Raises AddressError."""
    try:
        if not host and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise AddressError(f"Cannot listen on port {port} ({error}); choose another.") from error


def _persist(device: _Device) -> None:
    """One session after another."""
    limits, tries = device.limits, 0
    before: Work | None = None
    state = "connecting"
    device.on_state(state)
    while not device.stop.is_set():
        session = _Session(device, before)
        try:
            session.run()
        finally:
            before = session.close()
        tries = 0 if session.welcome else tries + 1
        last, state = state, _waiting(session)
        if (session.welcome or state != last) and not device.stop.is_set():
            device.on_state(state)
        ceiling = min(limits.max_reconnect_s, limits.reconnect_s * 2.0 ** min(tries, 32))
        # Jitter needs no secrecy: it only keeps many workers from coming back at once.
        device.stop.wait(random.uniform(ceiling / 2, ceiling))  # noqa: S311
    if before is not None:
        before.join(limits.step_timeout_s)
    device.on_state("stopped")


def _waiting(session: "_Session") -> str:
    """Why there is no head, if anything is known: a port where nobody is, or a ticket of another one."""
    return f"waiting for the head ({messages.clip(session.why)})" if session.why else "waiting for the head"


class _Session:
    """One stream to the head, and the work it has ordered last."""

    def __init__(self, device: _Device, work: Work | None) -> None:
        self.welcome = False
        self._device, self._work = device, work
        self._orders: queue.SimpleQueue[pb.Order | None] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[pb.Report] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._channel = _channel(device)
        token = device.ticket.token if device.ticket else ""
        self._metadata = ((TOKEN, token),)
        self._fetch_call = self._channel.unary_stream(
            f"/{SERVICE}/Fetch", pb.FetchRequest.SerializeToString, pb.Chunk.FromString
        )
        self.why = ""

    def run(self) -> None:
        """Until the stream ends or the device is to stop. Raises what trying again will not mend."""
        join = self._channel.stream_stream(f"/{SERVICE}/Join", pb.Report.SerializeToString, pb.Order.FromString)
        call = join(self._told(), metadata=self._metadata)
        threading.Thread(target=self._listen, args=(call,), name="fedge-orders", daemon=True).start()
        try:
            while not self._device.stop.is_set():
                with contextlib.suppress(queue.Empty):
                    order = self._orders.get(timeout=_POLL_S)
                    if order is None:
                        break
                    self._obey(order)
        finally:
            self._closed.set()
            call.cancel()

    def close(self) -> Work | None:
        """End the work as well, without waiting for it; returns it."""
        self._closed.set()
        if self._work is not None:
            self._work.end()
        self._channel.close()
        return self._work

    def _told(self) -> Iterator[pb.Report]:
        """What the head is told; gRPC's own thread asks for it."""
        yield pb.Report(hello=self._device.hello)
        while not self._closed.is_set():
            try:
                yield self._reports.get(timeout=self._device.limits.beat_s)
            except queue.Empty:
                held = resident()
                beat = pb.Beat(private_bytes=held.private, mapped_bytes=held.mapped) if held else pb.Beat()
                yield pb.Report(beat=beat)

    def _listen(self, call: Any) -> None:
        try:
            for order in call:
                self._orders.put(order)
        except grpc.RpcError as error:
            self.why = f"{error.code().name}: {error.details()}"
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                self._orders.put(messages.dismiss("PROTOCOL", str(error.details())))
        finally:
            self._orders.put(None)

    def _obey(self, order: pb.Order) -> None:
        match order.WhichOneof("what"):
            case "welcome":
                if order.welcome.protocol != messages.PROTOCOL:
                    raise ExperimentError("The head speaks another protocol; install the same version of fedge there.")
                self.welcome = True
                self._device.on_state("waiting for work")
            case "load":
                self._load(order.load)
            case "start" if self._work is not None and self._work.epoch == order.start.epoch:
                self._device.on_state(f"computing, epoch {order.start.epoch}")
                self._work.start()
            case "end" if self._work is not None and self._work.epoch == order.end.epoch:
                self._device.on_state("waiting for work")
                self._work.end()
            case "dismiss":
                self._dismissed(order.dismiss)

    def _load(self, load: pb.Load) -> None:
        try:
            messages.check_load(load, self._device.limits)
        except DataError as error:
            self._reports.put(pb.Report(broken=pb.Broken(epoch=load.epoch, rank=-1, detail=str(error))))
            return
        self._device.on_state(f"loading rank {load.rank} of {len(load.peers)}, epoch {load.epoch}")
        host, _ = addresses.parse(self._device.address)
        self._work = Work(load, self._device.own, self._fetch, host, self._reports.put, self._work)

    def _dismissed(self, dismiss: pb.Dismiss) -> None:
        detail = messages.clip(dismiss.detail) or "The head has dismissed this device."
        self._device.on_state(f"dismissed: {detail}")
        refusal = _NO_MATTER_HOW_OFTEN.get(dismiss.reason)
        if refusal is not None:
            raise refusal(detail)

    def _fetch(self, request: pb.FetchRequest) -> Any:
        try:
            return self._fetch_call(request, metadata=self._metadata)
        except ValueError as error:  # the channel has been closed meanwhile
            raise AddressError("The connection to the head has ended; it is made again.") from error


def _channel(device: _Device) -> grpc.Channel:
    options = [
        *addresses.keepalive(),
        ("grpc.max_receive_message_length", 4 * device.limits.max_report_bytes),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    ]
    ticket = device.ticket
    if ticket is None or not ticket.certificate:
        return grpc.insecure_channel(device.address, options)
    trusted = grpc.ssl_channel_credentials(root_certificates=ticket.certificate.encode())
    return grpc.secure_channel(device.address, trusted, [*options, ("grpc.ssl_target_name_override", SERVER_NAME)])


@contextlib.contextmanager
def _sigterm(told: threading.Event) -> Iterator[None]:
    """SIGTERM sets `told`, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
