"""A network between processes of this machine: every device has one link of a rate, and a delay to all others.

A relay in a thread. What a device sends leaves one byte after the other at its link's rate, whoever it is for, and
arrives `delay_s` later. Owns the relay. Unlike tests/relay.py it gives no credit to a link that was idle, and its waits
are exact to about a tenth of a millisecond. Must never be used for more than a benchmark: it trusts both ends.
"""

import contextlib
import heapq
import itertools
import socket
import threading
import time
from collections.abc import Sequence
from select import select

LOOK_S = 0.1  # how often it sees that it shall end
_BYTES = 1 << 16


class Net:
    """Between ranks that listen at `addresses`. `change` may come at any time."""

    def __init__(self, addresses: Sequence[str], delay_s: float = 0.0, bandwidth_bps: float = 1e9) -> None:
        self._addresses = list(addresses)
        self._delay_s, self._bandwidth_bps = delay_s, bandwidth_bps
        self._free_at = [0.0] * len(addresses)  # when a device's link is free again
        pairs = itertools.combinations(range(len(addresses)), 2)
        self._listeners = {socket.create_server(("127.0.0.1", 0)): pair for pair in pairs}
        self._ways: dict[socket.socket, tuple[int, socket.socket]] = {}  # from a socket: whose it is, and where to
        self._ended: list[socket.socket] = []  # of which nothing comes any more, though something may go to them
        self._due: list[tuple[float, int, socket.socket, bytes]] = []
        self._last_due: dict[socket.socket, float] = {}  # a shorter delay must not let the end overtake what was said
        self._numbers = itertools.count()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="net", daemon=True)
        self._thread.start()

    def change(self, delay_s: float, bandwidth_bps: float) -> None:
        """From now on."""
        self._delay_s, self._bandwidth_bps = delay_s, bandwidth_bps

    def addresses(self, rank: int) -> list[str]:
        """Where a rank finds those below it."""
        found = list(self._addresses)
        for listener, (low, high) in self._listeners.items():
            if high == rank:
                found[low] = f"127.0.0.1:{listener.getsockname()[1]}"
        return found

    def close(self) -> None:
        """End all connections."""
        self._ending = True
        self._thread.join()
        for one in (*self._listeners, *self._ways, *self._ended):
            one.close()

    def __enter__(self) -> "Net":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._ending:
            wait_s = min(LOOK_S, max(0.0, self._due[0][0] - time.monotonic())) if self._due else LOOK_S
            readable, _, _ = select([*self._listeners, *self._ways], [], [], wait_s)
            for one in readable:
                if one in self._listeners:
                    self._meet(one)
                else:
                    self._take(one)
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, to, data = heapq.heappop(self._due)
                _deliver(to, data)

    def _meet(self, listener: socket.socket) -> None:
        low, high = self._listeners[listener]
        near, _ = listener.accept()
        host, _, port = self._addresses[low].rpartition(":")
        far = socket.create_connection((host, int(port)))
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ways[near], self._ways[far] = (high, far), (low, near)

    def _take(self, one: socket.socket) -> None:
        device, to = self._ways[one]
        try:
            data = one.recv(_BYTES)
        except OSError:
            data = b""
        if not data:
            del self._ways[one]
            self._ended.append(one)
        gone_at = max(time.monotonic(), self._free_at[device]) + 8 * len(data) / self._bandwidth_bps
        self._free_at[device] = gone_at
        due_at = max(gone_at + self._delay_s, self._last_due.get(to, 0.0))
        self._last_due[to] = due_at
        heapq.heappush(self._due, (due_at, next(self._numbers), to, data))


def _deliver(to: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        if data:
            to.sendall(data)
        else:
            to.shutdown(socket.SHUT_WR)
