"""The context store against an obvious one: whole arrays by name, and rules in words."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedge.core.errors import DataError, Overloaded
from fedge.core.limits import LlmLimits
from fedge.edge.llm.collab.contexts import Contexts, Key, Session

WIDTH, CONTEXT, SLOTS, POSITION_BYTES = 3, 24, 2, 10
LIMITS = LlmLimits(
    max_sessions=4,
    max_device_sessions=2,
    session_idle_s=10.0,
    max_session_bytes=21 * 22,
    max_device_bytes=32 * 22,
    max_context_bytes=50 * 22,
)
KEYS = [(device, session) for device in "xyz" for session in "abc"]


def row(key: Key, position: int) -> list[float]:
    return [KEYS.index(key), position, 0.5]


def rows(key: Key, start: int, count: int) -> np.ndarray:
    made = [row(key, position) for position in range(start, start + count)]
    return np.array(made, np.float16 if start % 2 else np.float32).reshape(count, WIDTH)


class Obvious:
    """One sequence: every row it has, with its size in bytes, and what was let go."""

    def __init__(self) -> None:
        self.rows: list[tuple[list[float], int]] = []
        self.base = 0
        self.used_at = 0.0
        self.slot = False
        self.wanted = False

    @property
    def size(self) -> int:
        return sum(size for _, size in self.rows[self.base :]) + len(self.rows) * POSITION_BYTES


class Against(RuleBasedStateMachine):
    """All rules of the store, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.store = Contexts(slots=SLOTS, context=CONTEXT, position_bytes=POSITION_BYTES, limits=LIMITS)
        self.obvious: dict[Key, Obvious] = {}

    def idle(self) -> list[Key]:
        """Longest unused first."""
        return sorted(
            (key for key, one in self.obvious.items() if not one.wanted), key=lambda k: self.obvious[k].used_at
        )

    def tick(self) -> float:
        self.now += 1 / 128
        return self.now

    @rule(key=st.sampled_from(KEYS), back=st.integers(-2, 6), count=st.integers(0, 12))
    def append(self, key: Key, back: int, count: int) -> None:
        one = self.obvious.get(key) or Obvious()
        start = max(0, len(one.rows) - back)
        sent, now = rows(key, start, count), self.tick()
        if start > len(one.rows):
            assert not self.store.append(key, start, sent, now)
            return
        if start + count > CONTEXT:
            with pytest.raises(DataError, match="positions"):
                self.store.append(key, start, sent, now)
            return
        fresh = [(row(key, at), sent.itemsize * WIDTH) for at in range(len(one.rows), start + count)]
        more = sum(size + POSITION_BYTES for _, size in fresh)
        if fresh and one.size + more > LIMITS.max_session_bytes:
            with pytest.raises(DataError, match="bytes"):
                self.store.append(key, start, sent, now)
            return
        if fresh and not self.make_room(key, more):
            with pytest.raises(Overloaded):
                self.store.append(key, start, sent, now)
            return
        assert self.store.append(key, start, sent, now)
        one.rows += fresh
        if fresh or key in self.obvious:
            self.obvious[key] = one
            one.used_at = now

    def make_room(self, key: Key, more: int) -> bool:
        """Others leave, first of the same device, then of all, the longest unused first, until there is room."""
        for whose, most, most_bytes in (
            (key[0], LIMITS.max_device_sessions, LIMITS.max_device_bytes),
            ("xyz", LIMITS.max_sessions, LIMITS.max_context_bytes),
        ):
            while True:
                there = {other: one.size for other, one in self.obvious.items() if other[0] in whose}
                crowded = key not in there and len(there) >= most
                if not crowded and sum(there.values()) + more <= most_bytes:
                    break
                victims = [other for other in self.idle() if other != key and other in there]
                if not victims:
                    return False
                del self.obvious[victims[0]]
        return True

    @rule(key=st.sampled_from(KEYS))
    def seat(self, key: Key) -> None:
        if key not in self.obvious:
            return
        one = self.obvious[key]
        if not one.slot and sum(other.slot for other in self.obvious.values()) == SLOTS:
            victims = [other for other in self.idle() if self.obvious[other].slot]
            if victims:
                del self.obvious[victims[0]]
            one.slot = bool(victims)
        else:
            one.slot = True
        session = self.store.sessions[key]
        assert (self.store.seat(session) is not None) == one.slot

    @rule(key=st.sampled_from(KEYS), wanted=st.booleans())
    def want(self, key: Key, wanted: bool) -> None:
        if key in self.obvious:
            self.obvious[key].wanted = wanted
            self.store.sessions[key].wanted = int(wanted)

    @rule(key=st.sampled_from(KEYS), data=st.data())
    def answered(self, key: Key, data: st.DataObject) -> None:
        one = self.obvious.get(key)
        if one is None:
            return
        one.base = data.draw(st.integers(one.base, len(one.rows) - 1))
        one.used_at = self.tick()
        self.store.answered(self.store.sessions[key], one.base, self.now)

    @rule(key=st.sampled_from(KEYS), data=st.data())
    def truncate(self, key: Key, data: st.DataObject) -> None:
        one = self.obvious.get(key)
        if one is None:
            return
        known = data.draw(st.integers(one.base + 1, len(one.rows)))
        del one.rows[known:]
        session = self.store.sessions[key]
        session.computed = session.known
        self.store.truncate(session, known)
        assert session.computed == known

    @rule(key=st.sampled_from(KEYS))
    def forget(self, key: Key) -> None:
        self.obvious.pop(key, None)
        self.store.forget(key)

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.store.expire(self.now)
        for key in self.idle():
            if self.now - self.obvious[key].used_at >= LIMITS.session_idle_s:
                del self.obvious[key]

    @invariant()
    def same(self) -> None:
        assert set(self.store.sessions) == set(self.obvious)
        assert self.store.size_bytes == sum(one.size for one in self.obvious.values()) <= LIMITS.max_context_bytes
        for key, one in self.obvious.items():
            session = self.store.sessions[key]
            assert (session.base, session.known, self.store.known(key)) == (one.base, len(one.rows), len(one.rows))
            assert (session.slot is not None) == one.slot
            assert session.size_bytes == one.size
            middle = (one.base + len(one.rows)) // 2
            for start, stop in ((one.base, len(one.rows)), (middle, middle + 1)):
                found = self.store.window(session, start, stop)
                assert found.dtype == np.float32
                assert found.tolist() == [numbers for numbers, _ in one.rows[start:stop]]

    @invariant()
    def slots_are_held_once(self) -> None:
        held = [one.slot for one in self.store.sessions.values() if one.slot is not None]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(SLOTS))


Against.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstTheObvious = Against.TestCase


def test_a_slot_that_was_taken_is_given_back_once() -> None:
    store = Contexts(slots=1, context=CONTEXT, position_bytes=POSITION_BYTES)
    first, second = KEYS[:2]
    for key in (first, second):
        store.append(key, 0, rows(key, 0, 2), 0.0)
    assert store.seat(store.sessions[first]) == 0
    store.sessions[first].computed = 2
    assert store.vacated == set()
    session: Session = store.sessions[second]
    assert store.seat(session) == 0
    assert (store.vacated, store.known(first), session.computed) == ({0}, 0, 0)
    session.wanted = 1
    store.append(first, 0, rows(first, 0, 2), 1.0)
    assert store.seat(store.sessions[first]) is None


def test_what_is_kept_does_not_hold_what_was_let_go() -> None:
    """A view would keep all of a message in memory for one row of it."""
    store = Contexts(slots=1, context=CONTEXT, position_bytes=POSITION_BYTES)
    key = KEYS[0]
    store.append(key, 0, rows(key, 0, 20), 0.0)
    session = store.sessions[key]
    store.answered(session, 15, 0.0)
    store.truncate(session, 17)
    store.append(key, 16, rows(key, 16, 4), 0.0)
    assert all(block.base is None or block.base.nbytes == block.nbytes for block in session.blocks)
    assert store.window(session, 15, 20).tolist() == [row(key, at) for at in range(15, 20)]
