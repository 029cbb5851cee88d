"""What a cloud holds of its devices' sequences: states that have come, and which slot has their keys and values.

The context store of CE-CoLLM (arXiv 2411.02829): a **session** is one sequence of one device. Its states at the first
layer of the cloud come in the order of positions; a position that is known already is ignored, so that a device may
send again what it is not sure has arrived. Some of the known positions are **computed**: their keys and values are in
a slot. States are held from the last answered position on, so that the same question can be asked again. What takes
its slot from a session takes the session: the device begins anew, from position 0. A device has a share of what there
is: beyond it, its own sessions have to go. State is explicit and time an argument. Must never compute, wait, or look at
a clock.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedge.core.errors import DataError, Overloaded
from fedge.core.limits import LlmLimits
from fedge.core.params import Array

Key = tuple[str, str]  # device, session


@dataclass(slots=True, eq=False)
class Session:
    """One sequence. Positions 0 to `known` have come, 0 to `computed` are in `slot`, and the states of `base` to
    `known` are held. While requests of it are `wanted`, nobody takes it away.
    """

    key: Key
    used_at: float
    base: int = 0
    known: int = 0
    computed: int = 0
    slot: int | None = None
    wanted: int = 0
    size_bytes: int = 0
    blocks: list[Array] = field(default_factory=list, repr=False)


class Contexts:
    """The sessions of all devices, the longest unused first. `size_bytes` is what they hold, and what keys and values
    of all their positions take or will take (`position_bytes` each). `vacated` slots are to be given back.
    """

    def __init__(self, *, slots: int, context: int, position_bytes: int, limits: LlmLimits = LlmLimits()) -> None:
        self.sessions: dict[Key, Session] = {}
        self.size_bytes = 0
        self._sizes: Counter[str] = Counter()  # bytes by device
        self._numbers: Counter[str] = Counter()  # sessions by device
        self.vacated: set[int] = set()
        self._free = list(range(slots))
        self._context, self._position_bytes, self._limits = context, position_bytes, limits

    def known(self, key: Key) -> int:
        """How many positions of a session have come; 0 where there is none."""
        session = self.sessions.get(key)
        return session.known if session else 0

    def append(self, key: Key, start: int, rows: Array, now: float) -> bool:
        """States [n, hidden], of float16 or float32, for positions from `start` on; what is new is kept as it is.

        False, and nothing is kept, where positions before `start` are missing. Raises DataError beyond the context or
        the bytes of one session, and Overloaded where those that are in use leave no room, to this device or at all.
        """
        session = self.sessions.get(key)
        known = session.known if session else 0
        if start > known:
            return False
        if start + len(rows) > self._context:
            raise DataError(f"A sequence has at most {self._context} positions here; end it, or begin another.")
        fresh = rows[known - start :] if known > start else rows
        if len(fresh):
            session = self._room(key, fresh, now)
            session.blocks.append(fresh if fresh is rows else fresh.copy())
            session.known += len(fresh)
            self._count(session, fresh.nbytes + len(fresh) * self._position_bytes)
        if session:
            self._touch(session, now)
        return True

    def window(self, session: Session, start: int, stop: int) -> Array:
        """States of positions from `start` (not below `base`) to `stop`: float32 [stop - start, hidden]."""
        held, at = [], session.base
        for block in session.blocks:
            first, last = max(start - at, 0), min(stop - at, len(block))
            if first < last:
                held.append(block[first:last])
            at += len(block)
        return np.concatenate(held, dtype=np.float32)

    def answered(self, session: Session, position: int, now: float) -> None:
        """A question about `position` has its answer: states before it are let go."""
        while session.blocks and session.base + len(session.blocks[0]) <= position:
            session.base += len(session.blocks.pop(0))
        if session.base < position:
            session.blocks[0] = session.blocks[0][position - session.base :].copy()
            session.base = position
        self._settle(session)
        self._touch(session, now)

    def truncate(self, session: Session, known: int) -> None:
        """Forget positions from `known` (above `base`) on."""
        while session.blocks and session.known - len(session.blocks[-1]) >= known:
            session.known -= len(session.blocks.pop())
        if session.known > known:
            session.blocks[-1] = session.blocks[-1][: known - session.known].copy()
            session.known = known
        session.computed = min(session.computed, session.known)
        self._settle(session)

    def seat(self, session: Session) -> int | None:
        """The session's slot. Where all are taken, the longest unused session that nobody waits for has to go for it;
        None where there is none.
        """
        if session.slot is None and (self._free or self._evict(lambda one: one.slot is not None)):
            session.slot, session.computed = self._free.pop(), 0
        return session.slot

    def forget(self, key: Key) -> None:
        """The session is over, if there is one."""
        session = self.sessions.pop(key, None)
        if session is None:
            return
        self._count(session, -session.size_bytes)
        self._numbers[key[0]] -= 1
        if not self._numbers[key[0]]:
            del self._numbers[key[0]], self._sizes[key[0]]
        if session.slot is not None:
            self.vacated.add(session.slot)
            self._free.append(session.slot)
            session.slot = None

    def expire(self, now: float) -> None:
        """Forget what has not been used for too long."""
        longest_s = self._limits.session_idle_s
        for session in [one for one in self.sessions.values() if now - one.used_at >= longest_s and not one.wanted]:
            self.forget(session.key)

    def _room(self, key: Key, fresh: Array, now: float) -> Session:
        """The session of this key, once there is room for more states of it."""
        session = self.sessions.get(key) or Session(key, now)
        more = fresh.nbytes + len(fresh) * self._position_bytes
        if session.size_bytes + more > self._limits.max_session_bytes:
            raise DataError(f"A session holds at most {self._limits.max_session_bytes} bytes here; begin another.")
        while self._device_full(key, more):
            if not self._evict(lambda one: one is not session and one.key[0] == key[0]):
                raise Overloaded(f"{self._numbers[key[0]]} sessions of this device wait already; try again later.")
        while self._full(key, more):
            if not self._evict(lambda one: one is not session):
                raise Overloaded(f"{len(self.sessions)} sessions leave no room for more states; try again later.")
        self._numbers[key[0]] += key not in self.sessions
        return self.sessions.setdefault(key, session)

    def _device_full(self, key: Key, more: int) -> bool:
        crowded = key not in self.sessions and self._numbers[key[0]] >= self._limits.max_device_sessions
        return crowded or self._sizes[key[0]] + more > self._limits.max_device_bytes

    def _full(self, key: Key, more: int) -> bool:
        crowded = key not in self.sessions and len(self.sessions) >= self._limits.max_sessions
        return crowded or self.size_bytes + more > self._limits.max_context_bytes

    def _evict(self, may_go: Callable[[Session], bool]) -> bool:
        """Forget the longest unused session that may go and that nobody waits for; False where there is none."""
        found = next((one for one in self.sessions.values() if not one.wanted and may_go(one)), None)
        if found:
            self.forget(found.key)
        return found is not None

    def _touch(self, session: Session, now: float) -> None:
        session.used_at = now
        if session.key in self.sessions:
            self.sessions[session.key] = self.sessions.pop(session.key)

    def _settle(self, session: Session) -> None:
        """Count anew what the session takes."""
        size = sum(block.nbytes for block in session.blocks) + session.known * self._position_bytes
        self._count(session, size - session.size_bytes)

    def _count(self, session: Session, more: int) -> None:
        session.size_bytes += more
        self.size_bytes += more
        self._sizes[session.key[0]] += more
