"""What waits to be told to one device, between the threads that have something to tell and the one that sends.

Owns the bounds of it: a device that asks and does not read is cut off, and one that says nothing is let go. Must never
judge a message.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from fedge.core.limits import LlmLimits
from fedge.edge.llm.collab.wire import STATES_MISSING, Told


class Stream:
    """One device's replies. `turn` is held while a message of it is taken; `cancel` ends the call."""

    def __init__(self, client: str, cancel: Callable[[], None], limits: LlmLimits) -> None:
        self.client, self.turn, self.ended = client, threading.Lock(), False
        self._cancel, self._limits = cancel, limits
        self._replies: deque[Told] = deque()
        self._changed = threading.Condition()
        self._open = 0  # questions without an answer
        self._finished = False
        self._heard_at = time.monotonic()
        self._gaps: dict[str, int] = {}  # by session, what it was told last that is known

    def next(self) -> Told | None:
        """The next reply, once there is one; None at the end, and where nothing is said for too long."""
        with self._changed:
            while not self._changed.wait_for(
                lambda: self._replies or self.ended or (self._finished and not self._open), self._patience_s()
            ):
                if self._patience_s() <= 0:
                    return None
            self._changed.notify_all()
            return self._replies.popleft() if self._replies and not self.ended else None

    def heard(self) -> None:
        """The device has said something."""
        with self._changed:
            self._heard_at = time.monotonic()

    def tell(self, reply: Told) -> None:
        """The answer to a question. Never waits: who does not read is cut off."""
        with self._changed:
            self._open -= 1
            self._replies.append(reply)
            full = len(self._replies) > self._limits.max_untold + self._limits.max_asks
            self._changed.notify_all()
        if full:
            self.gone()
            self._cancel()

    def reply(self, reply: Told) -> None:
        """A reply to a message that was no question, or none that can be answered. Waits for room."""
        with self._changed:
            room = self._changed.wait_for(
                lambda: self.ended or len(self._replies) < self._limits.max_untold, self._limits.unread_s
            )
            self._replies.append(reply)
            self._changed.notify_all()
        if not room:
            self.cut()

    def news(self, reply: Told | None, session: str) -> Told | None:
        """A reply to states, unless it is one more about a gap that the device has been told of."""
        if reply is None or reply.reason != STATES_MISSING:
            self._gaps.pop(session, None)
            return reply
        if self._gaps.get(session) == reply.known:
            return None
        if len(self._gaps) >= self._limits.max_sessions:
            self._gaps.clear()
        self._gaps[session] = reply.known
        return reply

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """One more question will be answered, unless the block raises."""
        with self._changed:
            self._open += 1
        try:
            yield
        except BaseException:
            with self._changed:
                self._open -= 1
            raise

    def finish(self) -> None:
        """The device says nothing more, but listens."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def gone(self) -> None:
        """Nobody reads any more. Never waits."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def end(self) -> None:
        """Take nothing more, tell nothing more; the message that is being taken comes to its end first."""
        with self.turn:
            self.gone()

    def cut(self) -> None:
        """End, and the call with it, even if nobody reads."""
        self.end()
        self._cancel()

    def _patience_s(self) -> float:
        """How long the device may still say nothing; who waits for an answer may."""
        longest_s = self._limits.stream_idle_s
        return longest_s if self._open else self._heard_at + longest_s - time.monotonic()
