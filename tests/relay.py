"""A narrow, long or broken link: a TCP relay that limits the rate, adds delay, and can be cut and restored.

Each direction is a token bucket of BURST_S shared by all connections, followed by a delay line of half the round trip.
All settings may change while bytes flow. It runs in a thread of its own.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Self

BURST_S = 0.005  # credit that a late timer may use up, so that the mean rate is exact
_READ_BYTES = 1 << 16
_LEAST_BYTES = 1 << 9
_BUFFER_BYTES = 1 << 16  # what may hide in the relay's own sockets


class _Direction:
    """One way: `bps` bits per second (None: no limit). `forwarded` counts bytes that have passed the bucket."""

    def __init__(self, bps: float | None) -> None:
        self.bps, self.forwarded, self._free_at = bps, 0, 0.0

    def chunk_bytes(self) -> int:
        """At most BURST_S of link time, so that a new rate is felt at once."""
        return _READ_BYTES if self.bps is None else min(_READ_BYTES, max(_LEAST_BYTES, int(self.bps * BURST_S / 8)))

    async def pass_through(self, size: int) -> None:
        """Wait until the bucket has let `size` bytes through."""
        now = asyncio.get_running_loop().time()
        self.forwarded += size
        if self.bps is None:
            return
        self._free_at = max(self._free_at, now - BURST_S) + size * 8 / self.bps
        await asyncio.sleep(max(0.0, self._free_at - now))


class Relay:
    """A relay to `target` ("host:port"), listening at `address`. `up` is the way from who connects to the target.

    Rates in bit/s, None for no limit; `rtt_s` seconds for both ways together. A context manager.
    """

    def __init__(
        self, target: str, *, up_bps: float | None = None, down_bps: float | None = None, rtt_s: float = 0.0
    ) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._up, self._down, self._rtt_s, self._open = _Direction(up_bps), _Direction(down_bps), rtt_s, True
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()
        self._server = self._do(self._listen())
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def forwarded_bytes(self) -> tuple[int, int]:
        """Bytes that have passed so far, up and down."""
        return self._up.forwarded, self._down.forwarded

    def change(self, *, up_bps: float | None, down_bps: float | None, rtt_s: float) -> None:
        """New rates and delay, for what has not passed the bucket yet."""
        self._up.bps, self._down.bps, self._rtt_s = up_bps, down_bps, rtt_s

    def cut(self) -> None:
        """Reset every connection, and each new one, until `restore`."""
        self._open = False
        self._do(self._reset())

    def restore(self) -> None:
        """Let connections through again."""
        self._open = True

    def retarget(self, target: str) -> None:
        """Let new connections go to another target, and reset the others."""
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._do(self._reset())

    def close(self) -> None:
        """End it; the port is free afterwards."""
        self.cut()
        self._do(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> asyncio.Server:
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        return await asyncio.start_server(self._connected, sock=listener, limit=_BUFFER_BYTES)

    async def _reset(self) -> None:
        for writer in tuple(self._writers):
            _reset(writer)

    async def _finish(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        self._writers.add(writer)
        try:
            if not self._open:
                return
            far_reader, far_writer = await asyncio.open_connection(*self._target, limit=_BUFFER_BYTES)
            ends.append(far_writer)
            self._writers.add(far_writer)
            if not self._open:
                return
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, far_writer, self._up))
                pumps.create_task(self._pump(far_reader, writer, self._down))
        except* (OSError, asyncio.CancelledError):
            pass  # either end is gone, the target refuses, or all is over: so both ends shall go
        finally:
            for end in ends:
                _reset(end)
                self._writers.discard(end)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: _Direction) -> None:
        """Bytes from one end to the other; raises ConnectionResetError when they end."""
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                due_at, data = await line.get()
                await asyncio.sleep(max(0.0, due_at - loop.time()))
                writer.write(data)
                await writer.drain()
                if not data:
                    raise ConnectionResetError

        async def collect() -> None:
            data = b"."
            while data:
                data = await reader.read(way.chunk_bytes())
                await way.pass_through(len(data))
                line.put_nowait((loop.time() + self._rtt_s / 2, data))

        async with asyncio.TaskGroup() as both:
            both.create_task(collect())
            both.create_task(deliver())


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection the hard way: what is on its way is lost, and the other end sees a reset."""
    if not writer.transport.is_closing():
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
