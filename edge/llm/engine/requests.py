"""What a user asks of a language model, and what comes back, piece by piece.

Owns the types between the engine and whoever serves it. Must never hold a slot, a lock or a model.
"""

from dataclasses import dataclass, field
from typing import Literal

from fedge.core.errors import DataError, TooLong
from fedge.edge.llm.engine.sampler import Logprob, Sampling

Finish = Literal["stop", "length", "cancelled", "error"]

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to be continued.

    `tokens` is the prompt. `max_tokens` None: as far as context and limits go. `stop`: strings that end the text and
    are not part of it. `stop_tokens` None: the tokenizer's own end tokens. `top_logprobs` None: no log-probabilities;
    0: those of the chosen tokens; n: also those of the n likeliest. Raises DataError for what cannot be asked.
    """

    tokens: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise DataError(f"max_tokens is {self.max_tokens}; ask for at least 1 token.")
        if len(self.stop) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stop):
            raise DataError(f"Send at most {MAX_STOPS} stop strings, of 1 to {MAX_STOP_CHARACTERS} characters each.")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise DataError(f"top_logprobs is {self.top_logprobs}; name a number from 0 to 20.")


def new_tokens(prompt: int, wanted: int, most: int) -> int:
    """How many tokens may follow a prompt of so many: `wanted`, or what is left of `most` for both.

    Raises DataError where there is no prompt, TooLong where there is no room behind it.
    """
    if prompt < 1:
        raise DataError("The prompt has no token; send at least one.")
    if prompt >= most:
        raise TooLong(f"The prompt has {prompt} tokens, and {most} with the answer fit; shorten it.")
    return min(wanted, most - prompt)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added. The last piece of a request has `finish`; where that is "error", also `error` (one sentence
    for this machine's user, which may name files) and perhaps the error's class, `cause`: RankLost also where ranks
    that were lost could not be replaced, whatever hindered it.

    `token` is None where a piece only ends the request. `text` may be empty: the token is half a character, or may be
    the beginning of a stop string, and comes with a later piece.
    """

    token: int | None
    text: str = ""
    logprob: Logprob | None = None
    finish: Finish | None = None
    error: str = ""
    cause: type[Exception] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request has cost so far. `reused_tokens` of the prompt were in a slot already. Times in seconds; 0 where
    there is nothing to tell yet: `ttft_s` to the first token, `tpot_s` per token after it.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    reused_tokens: int = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
