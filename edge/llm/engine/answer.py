"""One request's answer as it grows: from the logits of its next position to the next piece of text.

Owns what sampling counts, the half characters and half stop strings that are held back, and the times of the tokens.
Must never see another request, or hold a slot.
"""

import secrets
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedge.core.params import Array
from fedge.edge.llm.engine.requests import Finish, Piece, Request, Usage
from fedge.edge.llm.engine.sampler import Sampling, logprobs, sample
from fedge.edge.llm.engine.stops import StopText


class Detokenizer(Protocol):
    """Tokens to text, one at a time; never half a character."""

    def push(self, token: int, /) -> str:
        """The characters that this token completes."""

    def flush(self) -> str:
        """What is left at the end."""


@dataclass(slots=True)
class Answer:
    """Of `new_tokens` tokens at most, to a request that came at `came_at` on the engine's clock. Without a detokenizer
    its text is empty. `losses`: how often ranks were lost since its last token.
    """

    request: Request
    new_tokens: int
    stop_tokens: tuple[int, ...]
    detokenizer: Detokenizer | None
    came_at: float
    losses: int = 0
    usage: Usage = field(init=False)
    _sampling: Sampling = field(init=False)
    _stops: StopText = field(init=False)
    _counts: Counter[int] = field(default_factory=Counter, init=False)
    _first_at: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.usage = Usage(len(self.request.tokens))
        self._stops = StopText(self.request.stop)
        asked = self.request.sampling
        self._sampling = asked if asked.seed is not None else replace(asked, seed=secrets.randbits(63))

    def next(self, logits: Array, now: float, reused: int) -> Piece:
        """Choose the next token from `logits` [vocab]. The piece has `finish` where it is the last one.

        Raises ModelError for logits that are no numbers.
        """
        done = self.usage.completion_tokens
        token = sample(logits, self._sampling, self._counts, len(self.request.tokens) + done)
        top = self.request.top_logprobs
        logprob = None if top is None else logprobs(logits, token, top)
        self._counts[token] += 1
        self._count(now, reused)
        text, finish = self._text(token, last=done + 1 >= self.new_tokens)
        return Piece(token, text, logprob, finish)

    def _count(self, now: float, reused: int) -> None:
        done = self.usage.completion_tokens
        self.losses = 0
        if not done:
            self._first_at = now
        ttft_s = self._first_at - self.came_at
        tpot_s = (now - self._first_at) / done if done else 0.0
        self.usage = Usage(len(self.request.tokens), done + 1, reused, ttft_s, tpot_s)

    def _text(self, token: int, *, last: bool) -> tuple[str, Finish | None]:
        """What may be given out after this token, and why the answer ends with it, if it does."""
        ends = token in self.stop_tokens
        fresh = self.detokenizer.push(token) if self.detokenizer and not ends else ""
        out, stopped = self._stops.push(fresh)
        if not stopped and (ends or last):
            rest, stopped = self._stops.push(self.detokenizer.flush() if self.detokenizer else "")
            out += rest + self._stops.flush()
        if stopped or ends:
            return out, "stop"
        return out, "length" if last else None
