"""One answer after the other, token by token: by an exit of the device, or by the cloud.

Owns the loop of CE-CoLLM (arXiv 2411.02829, section IV), its other way with guesses (speculative decoding, arXiv
2211.17192), and what is noted of every token. An answer never waits for a cloud longer than the deadline of one token:
then the last exit's own token is taken, and says so. Must never open a connection or turn a token into text.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from fedge.core.errors import AddressError, DataError, ExperimentError, TooLate
from fedge.core.params import Array
from fedge.edge.llm.collab import decider, exits
from fedge.edge.llm.collab.exits import Exit
from fedge.edge.llm.collab.segments import Segments
from fedge.edge.llm.collab.wire import Told
from fedge.edge.llm.engine.sampler import Sampling, sample

log = logging.getLogger("fedge")

Mode = Literal["exits", "speculative", "standalone"]
MOST_DEFERRED = 16  # rows that wait for their upper layers
_PROMPT_ROWS = 128  # of a prompt between two uploads
_FIRST_GUESSES = 4


class Cloud(Protocol):
    """The line to the cloud, for one sequence at a time."""

    @property
    def usable(self) -> bool:
        """Whether it pays to ask."""

    @property
    def context(self) -> int:
        """How many positions of a sequence it takes."""

    @property
    def guesses(self) -> int:
        """How many guesses it verifies at a time."""

    @property
    def sent_bytes(self) -> int:
        """Of this sequence's messages up."""

    @property
    def received_bytes(self) -> int:
        """Of this sequence's messages down."""

    def begin(self, sampling: Sampling, /) -> None:
        """A new sequence."""

    def push(self, start: int, rows: Array, /) -> None:
        """States are there."""

    def back(self, length: int, /) -> None:
        """States from there on are wrong."""

    def ask(self, position: int, guesses: Sequence[int] | None, deadline_s: float, /) -> Told:
        """Raises TooLate or AddressError."""

    def end(self) -> None:
        """The sequence is over."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to answer. `threshold`: None takes the exits' own, a number holds for all of them, or one for each.

    Raises ExperimentError for a mode that there is not, or a deadline that is none.
    """

    mode: Mode = "exits"
    threshold: float | tuple[float, ...] | None = None
    deadline_s: float = 2.0  # for one question to the cloud

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ExperimentError(f"There is no mode {self.mode!r}; name one of {', '.join(get_args(Mode))}.")
        if not 0 < self.deadline_s < float("inf"):
            raise ExperimentError(f"A deadline of {self.deadline_s} s is none; name a positive number of seconds.")


@dataclass(frozen=True, slots=True)
class Token:
    """One token. `label`: "exit:LAYER", "cloud", "draft" (guessed here, confirmed there) or "fallback" (the cloud was
    wanted). `confidence` and `layer` are those of the exit that was asked last, 0 where none was; `ms` since the last
    token, or since the start.
    """

    id: int
    label: str
    confidence: float
    layer: int
    ms: float


@dataclass(slots=True)
class Summary:
    """What one answer has cost. Bytes are those of messages, without what gRPC adds."""

    tokens: Counter[str] = field(default_factory=Counter)  # by label
    cloud_requests: int = 0
    cloud_failures: int = 0
    cloud_wait_s: float = 0.0
    guesses: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Said:
    """What an exit says, or the cloud."""

    token: int
    confidence: float
    layer: int


@dataclass(slots=True)
class _Answer:
    """One answer as it grows. `left`: tokens that may still come; `last`: the newest one; `guesses`: how many to
    make at a time.
    """

    sampling: Sampling
    stops: frozenset[int]
    left: int
    cloud: Cloud | None
    counts: Counter[int] = field(default_factory=Counter)
    summary: Summary = field(default_factory=Summary)
    guesses: int = _FIRST_GUESSES
    last: int = 0


class Decoder:
    """The device's half, its exits (one behind each segment), and the line to the cloud, if there is one.

    Raises ExperimentError for exits or thresholds that do not fit the segments, or a mode that needs a cloud.
    """

    def __init__(
        self,
        segments: Segments,
        leaves: Sequence[Exit],
        cloud: Cloud | None,
        settings: Settings = Settings(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if tuple(leave.layer for leave in leaves) != segments.ends:
            raise ExperimentError("The exits do not stand behind the segments; cut the model again.")
        if cloud is None and settings.mode != "standalone":
            raise ExperimentError(f"The mode {settings.mode!r} needs a cloud; name one, or choose standalone.")
        self._segments, self._leaves, self._settings, self._clock = segments, tuple(leaves), settings, clock
        self._cloud = None if settings.mode == "standalone" else cloud
        self._thresholds = decider.thresholds([leave.threshold for leave in leaves], settings.threshold)
        self._last = len(leaves) - 1
        self.summary = Summary()

    @property
    def vocab(self) -> int:
        """How many tokens there are."""
        return self._segments.config.vocab

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have, so that the cloud can be asked for each."""
        return min(self._segments.context, self._cloud.context) if self._cloud else self._segments.context

    @property
    def cloud_usable(self) -> bool:
        """Whether the cloud would be asked now."""
        return self._cloud is not None and self._cloud.usable

    def check(self, sampling: Sampling) -> None:
        """Raises DataError for settings that the cloud, which does not know the tokens, cannot follow."""
        if self._cloud and (sampling.presence_penalty or sampling.frequency_penalty):
            raise DataError("A cloud that never sees the tokens knows no penalties; ask without, or standalone.")

    def run(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        most: int,
        stops: Sequence[int] = (),
        wanted: Callable[[], bool] = lambda: True,
    ) -> Generator[Token]:
        """Up to `most` tokens after the prompt, the last of them maybe one of `stops`. `summary` tells what they cost.
        `wanted` is asked while the prompt is read, which may take long; once it is false, there is no token.

        Random numbers are those of (seed, position), wherever a token is drawn. Raises DataError for a prompt that is
        empty or does not fit, ModelError for states or logits that are no numbers.
        """
        answer = _Answer(sampling, frozenset(stops), most, self._cloud)
        self.summary = answer.summary
        if not prompt or len(prompt) + most > self._segments.context:
            raise DataError(f"A prompt and its answer have 2 to {self._segments.context} tokens; ask for fewer.")
        self.check(sampling)
        since = self._clock()
        self._segments.clear()
        if answer.cloud:
            answer.cloud.begin(sampling)
        try:
            if self._read(answer, prompt, wanted):
                yield from self._tokens(answer, since)
        finally:
            self._count(answer)
            if answer.cloud:
                answer.cloud.end()

    def _read(self, answer: _Answer, prompt: Sequence[int], wanted: Callable[[], bool]) -> bool:
        """All of the prompt but its end, which waits; False where nobody wants the answer any more."""
        rest = (len(prompt) - 1) % _PROMPT_ROWS + 1
        for first in range(0, len(prompt) - rest, _PROMPT_ROWS):
            if not wanted():
                return False
            self._segments.feed(prompt[first : first + _PROMPT_ROWS])
            self._up(answer)
        self._segments.feed(prompt[len(prompt) - rest :])
        return wanted()

    def _tokens(self, answer: _Answer, since: float) -> Iterator[Token]:
        turn = self._guessing if self._settings.mode == "speculative" else self._asking
        while answer.left:
            for label, said in turn(answer):
                now = self._clock()
                answer.summary.tokens[label] += 1
                answer.counts[said.token] += 1
                answer.left, answer.last = answer.left - 1, said.token
                self._count(answer)
                yield Token(said.token, label, said.confidence, said.layer, 1000 * (now - since))
                since = self._clock()
                if said.token in answer.stops or not answer.left:
                    return

    def _asking(self, answer: _Answer) -> Iterator[tuple[str, _Said]]:
        """The next token: of the first exit that is sure enough, or of the cloud."""
        yield self._decide(answer)
        if self._segments.deferred >= MOST_DEFERRED:
            self._up(answer)
        self._segments.feed([answer.last])

    def _decide(self, answer: _Answer) -> tuple[str, _Said]:
        said = None
        for number, leave in enumerate(self._leaves):
            row = self._up(answer)[-1:] if number == self._last else self._segments.reach(number)[-1:]
            if self._thresholds[number] < 1.0:
                said = self._say(answer, number, row)
                if decider.answers(said.confidence, self._thresholds[number]):
                    return f"exit:{leave.layer}", said
        told = self._ask(answer, self._segments.length - 1, None)
        if told:
            return "cloud", _Said(told.token, *((said.confidence, said.layer) if said else (0.0, 0)))
        if said is None or said.layer != self._leaves[-1].layer:
            said = self._say(answer, self._last, row)
        return self._alone(answer), said

    def _guessing(self, answer: _Answer) -> Iterator[tuple[str, _Said]]:
        """The next tokens: guesses of the last exit as far as the cloud says the same, and one of its own."""
        row = self._up(answer)[-1:]
        start = self._segments.length
        guesses = self._guess(answer, row)
        told = self._ask(answer, start - 1, [said.token for said in guesses])
        if told is None:
            guesses = guesses or [self._say(answer, self._last, row)]
            yield from ((self._alone(answer), said) for said in guesses)
            self._back(answer, start + len(guesses) - 1)  # the row of the last one comes again
        else:
            answer.guesses = decider.next_guesses(answer.guesses, len(guesses), told.accepted)
            yield from (("draft", said) for said in guesses[: told.accepted])
            yield "cloud", _Said(told.token, 0.0, 0)
            self._back(answer, start + told.accepted)
        self._segments.feed([answer.last])

    def _guess(self, answer: _Answer, row: Array) -> list[_Said]:
        """As many guesses as pay, their states on the way up; none where nobody would verify them."""
        guesses: list[_Said] = []
        most = 0
        if answer.cloud and answer.cloud.usable:
            most = min(answer.guesses, answer.left - 1, answer.cloud.guesses)
        while len(guesses) < most and not (guesses and guesses[-1].token in answer.stops):
            guesses.append(self._say(answer, self._last, row))
            self._segments.feed([guesses[-1].token])
            row = self._up(answer)[-1:]
        return guesses

    def _say(self, answer: _Answer, number: int, row: Array) -> _Said:
        """What an exit says of the token after the position of `row` [1, hidden], the last one that was fed."""
        leave = self._leaves[number]
        logits = exits.logits(leave, row, self._segments.head, self._segments.config.eps)[0]
        # The temperature makes the likeliest token's probability honest; draws are from the exit's own distribution.
        token = sample(logits * leave.temperature, answer.sampling, answer.counts, self._segments.length)
        return _Said(token, decider.confidence(logits), leave.layer)

    def _ask(self, answer: _Answer, position: int, guesses: list[int] | None) -> Told | None:
        """The cloud's answer; None where there is none in time."""
        if answer.cloud is None or not answer.cloud.usable:
            return None
        answer.summary.cloud_requests += 1
        answer.summary.guesses += len(guesses or ())
        began_at = self._clock()
        try:
            told = answer.cloud.ask(position, guesses or None, self._settings.deadline_s)
        except (AddressError, TooLate) as error:
            log.debug("The last exit answers: %s", error)
            told = None
        answer.summary.cloud_wait_s += self._clock() - began_at
        if told is None or told.accepted > len(guesses or ()) or told.token >= self._segments.config.vocab:
            answer.summary.cloud_failures += 1
            return None
        return told

    def _up(self, answer: _Answer) -> Array:
        """All rows that wait pass all segments, and their states are on the way; the rows that came through."""
        rows = self._segments.reach(self._last)
        start, states = self._segments.take_states()
        if answer.cloud:
            answer.cloud.push(start, states)
        return rows

    def _back(self, answer: _Answer, length: int) -> None:
        self._segments.back(length)
        if answer.cloud:
            answer.cloud.back(length)

    def _alone(self, answer: _Answer) -> str:
        return "fallback" if answer.cloud else f"exit:{self._leaves[-1].layer}"

    def _count(self, answer: _Answer) -> None:
        if answer.cloud:
            answer.summary.sent_bytes = answer.cloud.sent_bytes
            answer.summary.received_bytes = answer.cloud.received_bytes
