"""A tail on an address, from start to end: settings of the gRPC server, and SIGTERM drains.

Must never know what a call does.
"""

import asyncio
import contextlib
import platform
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc

from fedge.core.addresses import check_listen, keepalive_server
from fedge.core.errors import AddressError, DataError
from fedge.core.limits import EdgeLimits
from fedge.edge import bundle as bundles
from fedge.edge.cloud import wire
from fedge.edge.cloud.engine import Engine
from fedge.edge.cloud.tail import TailService
from fedge.edge.plan import profile as profiles
from fedge.edge.plan.profile import Profile
from fedge.edge.runtime.measure import profile_roughly

GRACE_S = 5.0  # for requests in progress at the end


def options(limits: EdgeLimits) -> list[tuple[str, int]]:
    """Channel arguments of the server."""
    longest_s = limits.stream_timeout_s + limits.max_deadline_s
    return [
        ("grpc.so_reuseport", 0),  # two tails on one port would each see half of the devices
        ("grpc.max_receive_message_length", wire.most_message_bytes(limits)),
        ("grpc.max_send_message_length", wire.most_message_bytes(limits)),
        # To end a stream waits until the device has read what was written; one that never reads is cut off by this.
        ("grpc.max_connection_age_ms", int(limits.stream_timeout_s * 1000)),
        ("grpc.max_connection_age_grace_ms", int(longest_s * 1000)),
        *keepalive_server(),
    ]


@contextlib.asynccontextmanager
async def tail_at(
    folder: Path,
    listen: str,
    *,
    profile: Profile | None = None,
    threads: int = 1,
    workers: int = 2,
    allow_remote: bool = False,
    limits: EdgeLimits = EdgeLimits(),
) -> AsyncIterator[str]:
    """The tail of the bundle in `folder`, answering at the address that this yields (port 0 draws a free one).

    `workers` batches run at a time, each on `threads` threads. Without a `profile` it is measured roughly. At the end
    requests in progress are answered. Raises AddressError, BadBundle and DataError (a profile of another bundle).
    """
    check_listen(listen, allow_remote)
    bundle = bundles.load(folder, limits)
    if profile and profile.version != bundle.version:
        raise DataError("The profile is of another bundle than the one to serve; measure this one with `bench`.")
    engine = Engine(folder, bundle, limits, threads)
    known = profile or profile_roughly(bundle, engine.runners, device=platform.node() or "cloud", threads=threads)
    service = TailService(bundle, engine, profile=profiles.encode(known), workers=workers, limits=limits)
    server = grpc.aio.server(options=options(limits))
    server.add_generic_rpc_handlers((service.handler(),))
    running = asyncio.create_task(service.run())
    try:
        yield await _start(server, listen)
        await service.drain(GRACE_S)
    finally:
        await server.stop(None)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        service.close()
        engine.close()


async def serve_tail(
    folder: Path,
    *,
    listen: str,
    profile: Profile | None = None,
    threads: int = 1,
    workers: int = 2,
    on_listening: Callable[[str], None] = lambda _: None,
    allow_remote: bool = False,
    limits: EdgeLimits = EdgeLimits(),
) -> None:
    """Serve until SIGTERM, or cancellation; see `tail_at`."""
    with _sigterm() as told:
        async with tail_at(
            folder,
            listen,
            profile=profile,
            threads=threads,
            workers=workers,
            allow_remote=allow_remote,
            limits=limits,
        ) as address:
            on_listening(address)
            await told.wait()


async def _start(server: grpc.aio.Server, listen: str) -> str:
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        raise AddressError(f"Cannot listen on {listen}; stop who uses the port, or choose another.") from None
    await server.start()
    return f"{listen.rpartition(':')[0]}:{port}"


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
