"""Serving: the coordinator on an address, from start to end.

Owns the gRPC server's settings, the address, and an orderly end (SIGTERM drains). Must never know what a call does.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import grpc

from fedge.core.addresses import check_listen, keepalive_server
from fedge.core.errors import AddressError
from fedge.core.limits import Limits
from fedge.core.params import Vector
from fedge.protos.fedge_pb2_grpc import add_CoordinatorServicer_to_server
from fedge.server.coordinator.coordinator import Coordinator, Evaluate, OnRecord, Watchers
from fedge.server.coordinator.service import Service
from fedge.server.machine import Federation, Machine

GRACE_S = 5.0  # for calls in progress at the end, and for clients to hear that the run is over
_POLL_S = 0.05
_WINDOW_BYTES = 1 << 18  # that one call may be ahead of its reader
_CALLS_PER_CLIENT = 4


def options(limits: Limits) -> list[tuple[str, int]]:
    """Channel arguments of the server, from the limits."""
    return [
        ("grpc.so_reuseport", 0),  # two coordinators on one port would each see half of the calls
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        # gRPC's own estimate of a good window would let every upload fill some 10 MiB before anyone reads them.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        *keepalive_server(limits),
    ]


def check_free(listen: str) -> None:
    """Raises AddressError where host:port cannot be listened on now, with the reason the system gives; port 0 can."""
    host, _, port = listen.rpartition(":")
    reasons = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as tried:
                # As gRPC does it: connections of a coordinator that has just stopped are no hindrance.
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    tried.bind(address)
                except OSError as error:
                    reasons.append(error.errno)
                else:
                    return
    except socket.gaierror:
        reasons = [errno.EADDRNOTAVAIL]
    raise AddressError(f"Cannot listen on {listen}: {_why_not(reasons)}.")


def _why_not(reasons: Sequence[int | None]) -> str:
    if errno.EADDRINUSE in reasons:
        return "the port is in use; stop who uses it, or choose another"
    if errno.EADDRNOTAVAIL in reasons:
        return "this machine has no such address; choose another, such as 127.0.0.1:7443"
    return f"{', '.join(os.strerror(reason or errno.EINVAL) for reason in reasons)}; choose another"


async def listening(coordinator: Coordinator, listen: str) -> tuple[grpc.aio.Server, str]:
    """A started server and the address it got (port 0 draws a free one). Raises AddressError."""
    limits = coordinator.federation.limits
    calls = _CALLS_PER_CLIENT * limits.max_clients
    server = grpc.aio.server(options=options(limits), maximum_concurrent_rpcs=calls)
    add_CoordinatorServicer_to_server(Service(coordinator), server)  # type: ignore[no-untyped-call]
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        check_free(listen)
        raise AddressError(f"Cannot listen on {listen}; stop who uses the port, or choose another.") from None
    await server.start()
    return server, f"{listen.rpartition(':')[0]}:{port}"


async def serve(
    federation: Federation,
    initial: Vector,
    *,
    listen: str,
    state_dir: Path,
    on_record: OnRecord,
    evaluate: Evaluate | None = None,
    recorded: int = 0,
    experiment_text: str = "",
    on_listening: Callable[[str], None] = lambda _: None,
    allow_remote: bool = False,
    keep_all: bool = False,
    limits: Limits | None = None,
) -> Machine:
    """Coordinate one run until it has ended, or SIGTERM or cancellation drains it; the machine as it is then.

    The run lives in `state_dir`: started again on it, the coordinator goes on where the journal ends. `on_record` gets
    every line of the record, from line `recorded` on; `evaluate` measures new versions in a thread. `keep_all` keeps
    the whole journal. Raises AddressError, JournalError, ExperimentError and StrategyError.
    """
    check_listen(listen, allow_remote)
    plan = replace(federation, limits=limits) if limits else federation
    watchers = Watchers(on_record, evaluate, recorded)
    coordinator = Coordinator(plan, initial, state_dir, watchers, experiment_text, keep_all)
    del initial  # the machine has its own
    try:
        server, address = await listening(coordinator, listen)
        try:
            on_listening(address)
            await _until_done(coordinator, server)
        finally:
            await server.stop(None)
    finally:
        machine = coordinator.close()
    return machine


async def _until_done(coordinator: Coordinator, server: grpc.aio.Server) -> None:
    running = asyncio.create_task(coordinator.run())
    with _sigterm() as told:
        ends = [asyncio.create_task(event.wait()) for event in (coordinator.ended, told)]
        try:
            await asyncio.wait([running, *ends], return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            if coordinator.ended.is_set():
                await _say_goodbye(coordinator)
            await server.stop(GRACE_S)
        finally:
            for task in (running, *ends):
                task.cancel()
            await asyncio.gather(running, *ends, return_exceptions=True)


async def _say_goodbye(coordinator: Coordinator) -> None:
    """Until all clients know that the run is over, or the grace is up."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_S):
            while not coordinator.sessions.told():
                await asyncio.sleep(_POLL_S)


@contextlib.contextmanager
def _sigterm() -> Iterator[asyncio.Event]:
    """An event that SIGTERM sets, where this is the main thread."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    main = threading.current_thread() is threading.main_thread()
    if main:
        loop.add_signal_handler(signal.SIGTERM, told.set)
    try:
        yield told
    finally:
        if main:
            loop.remove_signal_handler(signal.SIGTERM)
