"""Whether an exit's answer is good enough, and how far it pays to guess ahead. Pure.

The rule is CE-CoLLM's (arXiv 2411.02829, section IV): the largest probability, against a threshold. Must never see a
state, a cloud or a clock.
"""

from collections.abc import Sequence

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Array

MOST_GUESSES = 8  # of one draft: what the cloud refuses has been computed in vain here


def confidence(logits: Array) -> float:
    """The largest probability of softmax(logits [vocab]); NaN where one of them is none."""
    with np.errstate(invalid="ignore"):  # infinite ones
        shifted = logits.astype(np.float64)
        shifted -= shifted.max()
        return float(1.0 / np.exp(shifted).sum())


def answers(confident: float, threshold: float) -> bool:
    """Whether an exit answers. With a threshold of 1 it never does, however sure it is; nor where it is NaN."""
    return threshold < 1.0 and confident >= threshold


def thresholds(defaults: Sequence[float], asked: float | Sequence[float] | None) -> tuple[float, ...]:
    """One per exit: `asked`, one for all or one each, or the exits' own. Raises ExperimentError."""
    if asked is None:
        found = tuple(defaults)
    elif isinstance(asked, (int, float)):
        found = (float(asked),) * len(defaults)
    else:
        found = tuple(map(float, asked))
    if len(found) != len(defaults) or not all(0.0 <= one <= 1.0 for one in found):
        raise ExperimentError(f"Name one threshold from 0 to 1, or one for each of the {len(defaults)} exits.")
    return found


def next_guesses(guesses: int, offered: int, accepted: int) -> int:
    """How many tokens to guess next: one more where all were right, half as many after a wrong one.

    `offered` may be less than `guesses`, where the answer was to end before.
    """
    if accepted < offered:
        return max(1, guesses // 2)
    return min(MOST_GUESSES, guesses + 1) if offered == guesses else guesses
