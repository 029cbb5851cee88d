"""The cloud's half of a model at work: one thread that computes the upper layers for all devices' sequences at once.

Nothing is computed before a token is wanted; then all states of the sequence that wait are, in one pass with those of
other sequences (CE-CoLLM, arXiv 2411.02829). Several guesses at a time are verified in the same way (speculative
decoding, arXiv 2211.17192, with one draw per position that both ends can make). What cannot be ready in time is not
computed. Owns the order of passes and who gets a slot. Must never see a message of the network.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np

from fedge.core.errors import FedgeError, OurFault, Overloaded, TooLate
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.collab.contexts import Contexts, Key, Session
from fedge.edge.llm.collab.wire import STATES_MISSING, Hidden, Told, Verify, Want
from fedge.edge.llm.engine.sampler import sample
from fedge.edge.llm.ranks.head import Head
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Part, Step

Tell = Callable[[Told], None]
_log = logging.getLogger("fedge")
_PASSES = 16  # whose times are kept
_TICK_S = 1.0  # how often idle sessions are looked for
_MISSING = "States before the position that is asked for are missing; send those from the known positions on."


@dataclass(slots=True, eq=False)
class _Waiting:
    """A question, who asks, and the tokens that follow its position and its guesses as far as they are computed."""

    question: Want | Verify
    key: Key
    owner: Hashable
    tell: Tell
    due_at: float
    compute_s: float = 0.0
    choices: list[int] = field(default_factory=list)

    @property
    def guesses(self) -> tuple[int, ...]:
        return self.question.guesses if isinstance(self.question, Verify) else ()

    @property
    def stop(self) -> int:
        """The position after the last whose state is needed."""
        return self.question.position + len(self.guesses) + 1


@dataclass(frozen=True, slots=True)
class _Share:
    """What of a question is in a pass."""

    waiting: _Waiting
    session: Session
    part: Part

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.part.start + self.part.count

    @property
    def rows(self) -> int:
        """How many of the last positions get a token."""
        return max(0, self.stop - max(self.part.start, self.waiting.question.position))


class Continuer:
    """Sequences of many devices over the layers of `rank` and the `head` behind them.

    `context` is how many positions a sequence may have whose states are float32. `tell` is called from the thread of
    the passes, and must neither wait nor raise.
    """

    def __init__(self, rank: Rank, head: Head, limits: LlmLimits = LlmLimits()) -> None:
        cache = rank.cache
        self.hidden = rank.config.hidden
        position_bytes = sum(layer.nbytes for layer in cache.entries[0]) // cache.context
        self.context = min(cache.context, limits.max_session_bytes // (position_bytes + 4 * self.hidden))
        self._rank, self._head, self._limits = rank, head, limits
        slots = len(cache.lengths)
        self._contexts = Contexts(slots=slots, context=cache.context, position_bytes=position_bytes, limits=limits)
        self._queue: list[_Waiting] = []
        self._took: deque[float] = deque(maxlen=_PASSES)  # seconds of the last passes
        self._changed = threading.Condition()  # reentrant
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="fedge-continuer", daemon=True)
        self._thread.start()

    def take(self, key: Key, states: Hidden) -> Told | None:
        """Keep states. A reply, under id 0, where positions before them are missing or there are none of them.

        Raises DataError and Overloaded as `Contexts.append` does.
        """
        with self._changed:
            fits = self._contexts.append(key, states.start, states.rows, time.monotonic())
            known = self._contexts.known(key)
        if not fits:
            return Told(0, key[1], known, reason=STATES_MISSING, detail=_MISSING)
        return None if len(states.rows) else Told(0, key[1], known)

    def ask(self, key: Key, question: Want | Verify, owner: Hashable, tell: Tell) -> None:
        """Have a question answered, later or at once. `owner` is who may `leave`. Raises Overloaded."""
        waiting = _Waiting(question, key, owner, tell, time.monotonic() + question.deadline_s)
        with self._changed:
            own = sum(one.owner == owner for one in self._queue)
            if len(self._queue) >= self._limits.max_requests or own >= self._limits.max_asks:
                raise Overloaded(f"{len(self._queue)} questions wait already; ask again later.")
            session = self._contexts.sessions.get(key)
            if session is None or self._lost(waiting, session):
                self._miss(waiting)
                return
            session.wanted += 1
            self._queue.append(waiting)
            self._changed.notify()

    def known(self, key: Key) -> int:
        """How many positions of a session have come."""
        with self._changed:
            return self._contexts.known(key)

    def forget(self, key: Key) -> None:
        """The session is over; its questions are told that it has no states."""
        with self._changed:
            for one in [one for one in self._queue if one.key == key]:
                self._remove(one)
                one.tell(_missing(one, 0))
            self._contexts.forget(key)
            self._changed.notify()  # its memory can go

    def leave(self, owner: Hashable) -> None:
        """Nobody listens to the answers of this owner's questions; sessions stay."""
        with self._changed:
            for one in [one for one in self._queue if one.owner == owner]:
                self._remove(one)

    def close(self) -> None:
        """End the thread, after the pass that runs, and give all memory back. Questions are not answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._rank.close()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._queue or self._contexts.vacated):
                    self._changed.wait(_TICK_S)
                    self._contexts.expire(time.monotonic())
                if self._closed:
                    return
                try:
                    shares, step, x = self._plan(time.monotonic())
                except Exception as error:  # no memory, say: who waits must not wait for ever
                    self._give_up(_fault(error))
                    continue
            if shares or step.free:
                self._pass(shares, step, x)

    def _plan(self, now: float) -> tuple[list[_Share], Step, Array]:
        """The next pass, under the lock: one question of each session at a time, the fewest rows first."""
        self._contexts.expire(now)
        self._refuse(now)
        first: dict[Key, _Waiting] = {}
        for one in self._queue:
            first.setdefault(one.key, one)
        seated = [found for one in first.values() if (found := self._seated(one))]
        seated.sort(key=lambda found: found[0].stop - found[1].computed)
        room = self._limits.max_step_tokens
        if len(seated) > 1:
            room = min(room, self._limits.chunk_tokens)
        shares = []
        for one, session, slot in seated:
            if count := min(one.stop - session.computed, room):
                shares.append(_Share(one, session, Part(slot, session.computed, count)))
                room -= count
        windows = [self._contexts.window(one.session, one.part.start, one.stop) for one in shares]
        x = np.concatenate(windows) if windows else np.empty((0, self.hidden), np.float32)
        freed, self._contexts.vacated = tuple(sorted(self._contexts.vacated)), set()  # last: the above may find no room
        return shares, Step(tuple(one.part for one in shares), free=freed), x

    def _seated(self, one: _Waiting) -> tuple[_Waiting, Session, int] | None:
        """A question with its session and slot, if it can have one, set back to where the question begins."""
        session = self._contexts.sessions[one.key]
        slot = self._contexts.seat(session)
        if slot is None:
            return None
        session.computed = min(session.computed, one.question.position + len(one.choices))
        return one, session, slot

    def _refuse(self, now: float) -> None:
        """Take out of the queue what is late or would be, and what has lost the states that it needs."""
        for one in [*self._queue]:
            if one not in self._queue:  # gone with another one
                continue
            session = self._contexts.sessions[one.key]
            if self._lost(one, session):
                self._remove(one)
                self._miss(one)
                continue
            if now + self._least_s(one, session) >= one.due_at:
                if now < one.due_at:
                    self._took.popleft()  # the next one may be tried, lest one slow pass decides for ever
                self._remove(one)
                self._fail(one, TooLate("No answer can be ready in time; give more of it, or go on alone."))

    def _least_s(self, one: _Waiting, session: Session) -> float:
        """Seconds that the passes for a question take, if each is as fast as the fastest of the last ones."""
        rows = one.stop - min(session.computed, one.question.position + len(one.choices))
        return min(self._took, default=0.0) * -(-rows // self._limits.max_step_tokens)

    def _pass(self, shares: list[_Share], step: Step, x: Array) -> None:
        """Compute, outside of the lock, and tell what is finished."""
        began_at = time.monotonic()
        picks: list[list[int] | FedgeError]
        try:
            picks = self._compute(shares, step, x)
        except Exception as error:
            picks = [_fault(error)] * len(shares)
        now = time.monotonic()
        with self._changed:
            if shares:
                self._took.append(now - began_at)
            for share, found in zip(shares, picks):
                share.waiting.compute_s += now - began_at
                self._advance(share, found, now)

    def _compute(self, shares: list[_Share], step: Step, x: Array) -> list[list[int] | FedgeError]:
        """The tokens that each share's last rows give, or why there are none."""
        with np.errstate(all="ignore"):  # a sequence that overflows is refused by its logits
            after = self._rank.forward(step, x)
            ends = np.cumsum([share.part.count for share in shares], dtype=np.int64)
            rows = [np.arange(end - share.rows, end) for share, end in zip(shares, ends)]
            logits = self._head.logits(after[np.concatenate(rows)]) if rows else np.empty((0, 0), np.float32)
            splits = np.split(logits, np.cumsum([len(one) for one in rows])[:-1]) if rows else []
            return [_picks(share, found) for share, found in zip(shares, splits)]

    def _advance(self, share: _Share, found: list[int] | FedgeError, now: float) -> None:
        """Under the lock: note what a pass has given to a question that may have gone meanwhile."""
        one, session = share.waiting, share.session
        if isinstance(found, FedgeError):
            if one in self._queue:
                self._remove(one)
                self._fail(one, found)
            return
        session.computed = share.stop
        one.choices += found
        if one in self._queue and share.stop == one.stop:
            self._remove(one)
            self._answer(one, session, now)

    def _answer(self, one: _Waiting, session: Session, now: float) -> None:
        right = [guess == choice for guess, choice in zip(one.guesses, one.choices)]
        accepted = right.index(False) if False in right else len(right)
        position = one.question.position
        if isinstance(one.question, Verify):
            self._contexts.truncate(session, position + accepted + 1)
        self._contexts.answered(session, position, now)
        reply = Told(one.question.id, one.key[1], session.known, one.choices[accepted], accepted, one.compute_s)
        one.tell(reply)

    def _lost(self, one: _Waiting, session: Session) -> bool:
        """Whether the session does not hold the states for a question."""
        return not session.base <= one.question.position < one.stop <= session.known

    def _miss(self, one: _Waiting) -> None:
        """Say that states are missing. A session that is past the position can only begin anew."""
        session = self._contexts.sessions.get(one.key)
        if session and session.base > one.question.position:
            self.forget(one.key)
        one.tell(_missing(one, self._contexts.known(one.key)))

    def _fail(self, one: _Waiting, error: FedgeError) -> None:
        known = self._contexts.known(one.key)
        one.tell(Told(one.question.id, one.key[1], known, reason=error.reason, detail=str(error)))

    def _give_up(self, error: FedgeError) -> None:
        for one in [*self._queue]:
            self._remove(one)
            self._fail(one, error)

    def _remove(self, one: _Waiting) -> None:
        self._queue.remove(one)
        self._contexts.sessions[one.key].wanted -= 1


def _missing(one: _Waiting, known: int) -> Told:
    return Told(one.question.id, one.key[1], known, reason=STATES_MISSING, detail=_MISSING)


def _picks(share: _Share, logits: Array) -> list[int] | FedgeError:
    """The tokens after the last `rows` positions of a share."""
    first, sampling = share.stop - share.rows + 1, share.waiting.question.sampling
    try:
        return [sample(row, sampling, {}, first + at) for at, row in enumerate(logits)]
    except FedgeError as error:
        return error


def _fault(error: Exception) -> FedgeError:
    """What the device is told; a fault of ours is written down here, and it learns no more than that."""
    if isinstance(error, FedgeError):
        return error
    _log.error("a pass failed", exc_info=error)
    return OurFault("The cloud failed on this question; its log says why.")
