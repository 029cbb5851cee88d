"""One TCP connection between two ranks, in the clear (loopback only) or in TLS: bytes out as far as they go, bytes in.

Owns the socket's options and its waiting. Writing never waits, so that two ranks that send each other more than the
kernel holds cannot wait for each other (`frames` takes turns). Must never know what the bytes mean.

In the clear the socket is a blocking one and the kernel keeps the time (SO_RCVTIMEO): one system call per message and
way, where a socket with Python's own timeout makes two. Before it blocks it is asked some times, because ranks on one
machine wait for each other more shortly than it takes to wake a thread. In TLS the socket
does not block, and `poll` waits.
"""

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from math import inf
from typing import Protocol

IDLE_S = 5.0  # how often a rank that waits for work looks whether its own side has been closed
POLLS = 300  # before a read blocks: about 0.4 ms
RECORD_BYTES = 1 << 14  # the most that one TLS record holds (RFC 8446, section 5.1)
KEEPALIVE_S, KEEPALIVE_PROBES = 10, 3

Buffer = bytes | memoryview


class Wire(Protocol):
    """What a link needs of a connection. Everything raises OSError where the connection is lost or closed."""

    def fileno(self) -> int:
        """The descriptor, to poll on; -1 once closed."""

    def write(self, *buffers: Buffer) -> int:
        """Send as much of the buffers, one after the other, as goes without waiting; how many bytes. 0: no room."""

    def read(self, view: memoryview, wait: bool) -> int:
        """Fill the beginning of `view`; how many bytes. 0: none there, and not to wait. Raises TimeoutError."""

    def idle(self, timeout_s: float = inf) -> bool:
        """Wait until there is something to read, or the end; False after `timeout_s`."""

    def close(self) -> None:
        """End it, and wake who waits for it."""


class Plain:
    """In the clear. `silence_s` is how long `read` waits for a byte; `polls` how often it asks before it sleeps.

    Where ranks have to share a processor there must be no polls: each would take the time that the other one needs.
    """

    def __init__(self, sock: socket.socket, silence_s: float, polls: int = 0) -> None:
        sock.setblocking(True)
        whole, part = divmod(max(1, round(silence_s * 1e6)), 1_000_000)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", whole, part))
        except OSError:  # a system of 32 bits whose time has 64
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", whole, part))
        self._sock, self._polls = sock, polls

    def fileno(self) -> int:
        """See `Wire`."""
        return self._sock.fileno()

    def write(self, *buffers: Buffer) -> int:
        """See `Wire`."""
        try:
            return self._sock.sendmsg(buffers, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def read(self, view: memoryview, wait: bool) -> int:
        """See `Wire`."""
        for _ in range(self._polls if wait else 1):
            try:
                return _no_end(self._sock.recv_into(view, 0, socket.MSG_DONTWAIT))
            except BlockingIOError:
                continue
        if not wait:
            return 0
        try:
            return _no_end(self._sock.recv_into(view))
        except BlockingIOError:
            raise TimeoutError("silence") from None

    def idle(self, timeout_s: float = inf) -> bool:
        """See `Wire`."""
        return _idle(self._sock, timeout_s)

    def close(self) -> None:
        """See `Wire`."""
        _close(self._sock)


class Secure:
    """In TLS; see `Plain`. A record that found no room is kept, because OpenSSL wants the very same bytes again."""

    def __init__(self, sock: ssl.SSLSocket, silence_s: float) -> None:
        sock.setblocking(False)
        self._sock, self._silence_s = sock, silence_s
        self._record: bytes | None = None

    def fileno(self) -> int:
        """See `Wire`."""
        return self._sock.fileno()

    def write(self, *buffers: Buffer) -> int:
        """See `Wire`."""
        if self._record is None:
            self._record = _first(buffers)
        try:
            gone = self._sock.send(self._record)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0
        self._record = None
        return gone

    def read(self, view: memoryview, wait: bool) -> int:
        """See `Wire`."""
        while True:
            try:
                return _no_end(self._sock.recv_into(view))
            except ssl.SSLWantReadError:
                if not wait:
                    return 0
            except ssl.SSLWantWriteError as error:  # only where keys are renewed, which we never ask for
                raise ConnectionError("the peer renews its keys") from error
            if not ready([self], [], self._silence_s):
                raise TimeoutError("silence")

    def idle(self, timeout_s: float = inf) -> bool:
        """See `Wire`."""
        return bool(self._sock.pending()) or _idle(self._sock, timeout_s)

    def close(self) -> None:
        """See `Wire`."""
        _close(self._sock)


def ready(readers: Sequence[Wire], writers: Sequence[Wire], timeout_s: float) -> bool:
    """Wait until one of `readers` has bytes or one of `writers` room (or has failed); False after `timeout_s`."""
    events: dict[int, int] = {}
    for wires, event in ((readers, select.POLLIN), (writers, select.POLLOUT)):
        for wire in wires:
            number = wire.fileno()
            if number < 0:
                raise ConnectionError("closed on this side")
            events[number] = events.get(number, 0) | event
    poller = select.poll()
    for number, event in events.items():
        poller.register(number, event)
    return bool(poller.poll(timeout_s * 1000))


def prepare(sock: socket.socket, silence_s: float) -> None:
    """Small messages leave at once, and a peer that is gone without a word is found out by the kernel."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = (
        ("TCP_KEEPIDLE", KEEPALIVE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", max(1, round(silence_s * 1000))),
    )
    for name, value in wanted:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _no_end(got: int) -> int:
    if not got:
        raise ConnectionError("the connection has ended")
    return got


def _first(buffers: tuple[Buffer, ...]) -> bytes:
    """The first bytes of the buffers, as many as fit into one record."""
    pieces, room = [], RECORD_BYTES
    for buffer in buffers:
        pieces.append(buffer[:room])
        room -= len(pieces[-1])
    return b"".join(pieces)


def _idle(sock: socket.socket, timeout_s: float) -> bool:
    due_at = time.monotonic() + timeout_s
    while True:
        number = sock.fileno()
        if number < 0:
            raise ConnectionError("closed on this side")
        poller = select.poll()
        poller.register(number, select.POLLIN)
        left_s = due_at - time.monotonic()
        if poller.poll(1000 * max(0.0, min(IDLE_S, left_s))):
            return True
        if left_s <= 0:
            return False


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended already
        # Of the class, because TLS' own would forget the keys under a thread that is just reading.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    sock.close()
