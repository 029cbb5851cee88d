"""One sequence's side of the talk with the cloud: which message comes next, and what a reply means.

States go up in order, each position once, several in one message where they have come together, and a question behind
all of them. After a bounded number of bytes the cloud is asked what it knows, and nothing follows until it has said so:
a slow link must not be full of states when a token is wanted. What the cloud does not know is sent again. State is
explicit and time an argument. Must never wait or send.
"""

from dataclasses import dataclass

from fedge.core.params import Array
from fedge.edge.llm.collab import wire
from fedge.edge.llm.collab.states import States
from fedge.edge.llm.engine.sampler import Sampling

FLIGHT_BYTES = 1 << 19  # of states that the cloud has not said it knows
_TOLD_AGAIN = 2  # times that a cloud may say of one question that it lacks states


@dataclass(slots=True)
class Question:
    """What is asked. `guesses` None asks for a token. Once there is an outcome, `told` or `refused` is set."""

    id: int
    position: int
    guesses: tuple[int, ...] | None
    due_at: float
    sent: bool = False
    missing: int = 0
    told: wire.Told | None = None
    refused: str = ""


class Exchange:
    """The sequence that the cloud knows as `session`. `question` is the one that waits, if any. `refused` says why the
    cloud takes no more states: then nothing more is sent on this stream.
    """

    def __init__(self, session: str, sampling: Sampling, hidden: int, coding: wire.Coding) -> None:
        plain = sampling.greedy and not sampling.logit_bias
        self.session, self._sampling = session, wire.GREEDY if plain else sampling
        self._hidden, self._coding = hidden, coding
        self._states = States(hidden, exact=coding == "f32")
        self._sent = 0  # positions
        self._flight_bytes = 0  # since the cloud has said what it knows
        self._unsure = self._probed = False  # the cloud must say what it knows; it has been asked
        self.refused = ""
        self.question: Question | None = None

    @property
    def begun(self) -> bool:
        """Whether the cloud may know of it."""
        return self._sent > 0

    def put(self, start: int, rows: Array) -> None:
        """States [n, hidden] float32 from position `start` on, to be sent and kept. Raises ModelError."""
        self._states.put(start, rows)

    def back(self, length: int) -> None:
        """Positions from `length` on are forgotten, here and by the cloud."""
        self._states.cut(length)
        self._sent = min(self._sent, length)

    def doubt(self) -> None:
        """It is another stream, or another cloud: what was sent may have been lost."""
        self._unsure, self._probed = self.begun, False
        self._flight_bytes, self.refused = 0, ""

    def next(self, now: float, message_bytes: int) -> bytes | None:
        """The next message, of about `message_bytes` at most; None where there is nothing to say now."""
        if self.refused:
            return None
        if self._sent < self._states.length:
            return self._next_states(message_bytes)
        asked = self.question
        if asked is None or asked.sent or now >= asked.due_at:
            return None
        asked.sent = True
        common = self.session, asked.id, asked.position
        if asked.guesses is None:
            return wire.asked_bytes(wire.Want(*common, asked.due_at - now, self._sampling))
        return wire.asked_bytes(wire.Verify(*common, asked.guesses, asked.due_at - now, self._sampling))

    def take(self, told: wire.Told) -> None:
        """A reply of this session. One to a question that nobody waits for any more has no token for us."""
        if self._unsure and not told.id:
            self._unsure, self._flight_bytes = False, 0
            self._sent = min(told.known, self._states.length)
        missing = told.reason == wire.STATES_MISSING
        if missing:
            self._sent = min(self._sent, told.known)
        elif told.reason and not told.id:
            self.refused = f"{told.reason}: {told.detail}"
        asked = self.question
        if asked and self.refused:
            asked.refused = self.refused
        if asked is None or told.id != asked.id:
            return
        asked.missing += missing
        if missing and asked.missing < _TOLD_AGAIN:
            asked.sent = False
        elif told.reason:
            asked.refused = f"{told.reason}: {told.detail}"
        else:
            asked.told, self._flight_bytes = told, 0

    def _next_states(self, message_bytes: int) -> bytes | None:
        if not self._unsure and self._flight_bytes >= FLIGHT_BYTES:
            self._unsure, self._probed = True, False
        if self._unsure and self._probed:
            return None
        if self._unsure:
            self._probed = True
            return wire.states(self.session, 0, self._states.rows(0, 0), self._coding)[0]
        count = max(1, message_bytes // wire.row_bytes("f32", self._hidden))  # what float16 cannot hold goes as float32
        rows = self._states.rows(self._sent, self._sent + count)
        (data,) = wire.states(self.session, self._sent, rows, self._coding)
        self._sent += len(rows)
        self._flight_bytes += len(data)
        return data
