"""Frames between two ranks: a fixed header and a payload, counted in both directions.

A header has 16 bytes, little-endian: magic (2), kind (1), coding (1), epoch (4), sequence number on this link and in
this direction (4), payload bytes (4). Owns the check that exactly the awaited frame comes, the buffer it comes into,
and the exchange of large payloads in both directions at once. Must never sum anything, nor decode a step.
"""

import struct
from collections.abc import Sequence
from math import inf

import numpy as np

from fedge.core.errors import RankLost
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.mesh.wires import Wire, ready

HEADER = struct.Struct("<HBBIII")
MAGIC = 0xFED6
PART, STEP, END, PROBE = 1, 2, 3, 4  # kinds
FLOAT32, INT8 = 0, 1  # codings
_AT = HEADER.size
_MASK = 0xFFFFFFFF
_START_BYTES = 1 << 16
_NOTHING = memoryview(b"")


class Link:
    """This rank's end of the connection to `rank`. One thread uses it; only `close` may come from another one.

    Everything raises RankLost where the peer is gone, silent for `step_timeout_s`, or sends what is not due.
    """

    def __init__(self, rank: int, wire: Wire, epoch: int, limits: LlmLimits) -> None:
        self.rank, self.wire = rank, wire
        self.silence_s = limits.step_timeout_s
        self._epoch, self._most_bytes = epoch, limits.max_frame_bytes
        self._sent = self._received = 0
        self.sent_bytes = 0  # frames, headers included
        self._out: list[memoryview] = []  # of the frame being sent: what has found no room yet
        self._inbox = np.empty(_START_BYTES, np.uint8)
        self._view = self._inbox.data
        self._due: tuple[int, int, int] | None = None  # kind, coding and bytes of the awaited frame; None: any
        self._got = self._end = 0
        self.kind = 0  # of the frame received last

    def post(self, kind: int, coding: int, payload: memoryview = _NOTHING, prefix: bytes = b"") -> bool:
        """Begin to send a frame of `prefix` and `payload` (bytes); whether all of it has left. See `flush`."""
        size = len(payload)
        header = HEADER.pack(MAGIC, kind, coding, self._epoch, self._sent, len(prefix) + size) + prefix
        self._sent = (self._sent + 1) & _MASK
        self.sent_bytes += len(header) + size
        try:
            gone = self.wire.write(header, payload)
        except (OSError, ValueError) as error:
            raise self.lost(error) from error
        if gone == len(header) + size:
            return True
        self._out = [memoryview(header)[gone:], payload[max(0, gone - len(header)) :]]
        self.flush()
        return not self._out

    def flush(self) -> bool:
        """Send more of the frame as far as there is room; whether anything has left."""
        moved = False
        while self._out:
            try:
                gone = self.wire.write(*self._out)
            except (OSError, ValueError) as error:
                raise self.lost(error) from error
            if not gone:
                break
            moved, self._out = True, _rest(self._out, gone)
        return moved

    @property
    def pending(self) -> bool:
        """Whether a frame is still being sent."""
        return bool(self._out)

    def expect(self, due: tuple[int, int, int] | None) -> None:
        """The next frame must be of this kind, coding and payload size; None: any kind, any size within the limits."""
        self._due, self._got = due, 0
        self._end = _AT
        if due is not None:
            self._end += due[2]
            self._grow()

    @property
    def complete(self) -> bool:
        """Whether the awaited frame is here."""
        return self._got == self._end

    def pull(self, wait: bool = True) -> bool:
        """Receive more of the awaited frame; whether anything came."""
        try:
            got = self.wire.read(self._view[self._got : self._end], wait)
        except (OSError, ValueError) as error:
            raise self.lost(error) from error
        before, self._got = self._got, self._got + got
        if before < _AT <= self._got:
            self._check()
        return got > 0

    def payload(self) -> Array:
        """The received payload, bytes [n]; it lies in a buffer that the next frame overwrites."""
        return self._inbox[_AT : self._end]

    def receive(self, due: tuple[int, int, int] | None = None) -> Array:
        """Wait for a frame; see `expect` and `payload`."""
        self.expect(due)
        while self._got != self._end:
            self.pull()
        return self._inbox[_AT : self._end]

    def idle(self, timeout_s: float = inf) -> bool:
        """Wait for a frame to begin, or the end; False after `timeout_s`. Raises RankLost when this side is closed."""
        try:
            return self.wire.idle(timeout_s)
        except (OSError, ValueError) as error:
            raise self.lost(error) from error

    def broken(self, why: str) -> RankLost:
        """The error for a peer whose frame makes no sense."""
        return RankLost(f"Rank {self.rank} broke the protocol ({why}); run the same version of fedge there.", self.rank)

    def lost(self, error: Exception) -> RankLost:
        """The error for a connection that has failed."""
        silent = isinstance(error, TimeoutError)
        why = f"has been silent for {self.silence_s:g} s" if silent else f"is gone ({error})"
        return RankLost(f"Rank {self.rank} {why}; see that its device runs and can be reached.", self.rank)

    def late(self) -> RankLost:
        """The error for a rank that still waits for others."""
        return RankLost(f"Rank {self.rank} has not met all others in time; see that they can reach it.", self.rank)

    def _check(self) -> None:
        magic, kind, coding, epoch, sequence, size = HEADER.unpack_from(self._view)
        if (magic, epoch, sequence) != (MAGIC, self._epoch, self._received):
            raise self.broken(f"frame {sequence} of epoch {epoch} instead of {self._received} of {self._epoch}")
        if self._due is None:
            if size > self._most_bytes:
                raise self.broken(f"a frame of {size} bytes, more than max_frame_bytes")
            self._end = _AT + size
            self._grow()
        elif self._due != (kind, coding, size):
            raise self.broken(f"kind {kind}, coding {coding}, {size} bytes instead of {self._due}")
        self._received = (self._received + 1) & _MASK
        self.kind = kind

    def _grow(self) -> None:
        if self._end > self._inbox.nbytes:
            larger = np.empty(self._end, np.uint8)
            larger[: self._got] = self._inbox[: self._got]
            self._inbox, self._view = larger, larger.data


def swap(out: Sequence[Link], into: Sequence[Link], payload: memoryview, due: tuple[int, int, int]) -> None:
    """Send a part to all of `out` while one comes from each of `into`; it then is the link's `payload()`.

    Frames are PARTs of `due`'s coding. No size makes ranks that do this at once wait for each other. Raises RankLost.
    """
    stuck = [link for link in out if not link.post(PART, due[1], payload)]
    for link in into:
        link.expect(due)
    if stuck:
        take_turns(stuck, into)
    for link in into:
        while not link.complete:
            link.pull()


def take_turns(stuck: Sequence[Link], into: Sequence[Link] = ()) -> None:
    """Finish the sending of `stuck`, and take in what comes from `into` meanwhile. Raises RankLost."""
    while stuck:
        moved = False
        for link in stuck:
            moved |= link.flush()
        waiting = [link for link in into if not link.complete]
        for link in waiting:
            moved |= link.pull(wait=False)
        stuck = [link for link in stuck if link.pending]
        if moved or not stuck:
            continue
        try:
            if not ready([link.wire for link in waiting], [link.wire for link in stuck], stuck[0].silence_s):
                raise TimeoutError
        except (OSError, ValueError) as error:
            raise stuck[0].lost(error) from error


def _rest(buffers: Sequence[memoryview], gone: int) -> list[memoryview]:
    """What is left of the buffers after their first `gone` bytes."""
    left = []
    for buffer in buffers:
        if gone < len(buffer):
            left.append(buffer[gone:])
        gone = max(0, gone - len(buffer))
    return left
