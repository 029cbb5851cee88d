"""Which token comes next: from the logits of one position to one id, and to log-probabilities.

Owns the order of the steps: bias and penalties, temperature, top-k, top-p (nucleus sampling, arXiv 1904.09751, section
3.1), min-p (arXiv 2407.01082), one draw. Random numbers are a function of (seed, position) alone, by a counter-based
generator (Philox; Salmon et al., SC 2011), so that a request's tokens do not depend on who shares its batch. Must
never keep state between two calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedge.core.errors import ExperimentError, ModelError
from fedge.core.params import Array

_COLD = 1e-4  # temperature; what is drawn below it is the likeliest token, and float32 cannot divide by much less


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; names and ranges are those of OpenAI's API, and `top_k`, `min_p` (0: off).

    Temperature 0, or next to it, takes the likeliest token. Penalties count generated tokens only. `seed` None: the
    engine draws one. Raises ExperimentError for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, 100.0),
            "top_p": (0.0, 1.0),
            "top_k": (0, 1 << 31),
            "min_p": (0.0, 1.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:  # NaN is refused too
                raise ExperimentError(f"{name} is {value}; name a number from {low} to {high}.")
        if not all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values()):
            raise ExperimentError("A logit_bias lies outside -100 to 100; name a number within.")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise ExperimentError(f"seed {self.seed} has more than 64 bits; name a smaller one.")

    @property
    def greedy(self) -> bool:
        """No draw is made."""
        return self.temperature < _COLD or self.top_k == 1


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithms of the model's own probabilities, before any setting: the chosen token's, and `top`, the
    likeliest tokens with theirs, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Array, sampling: Sampling, counts: Mapping[int, int], position: int) -> int:
    """The id of the next token.

    `logits` [vocab] float32 are left as they are; `counts` says how often the request has generated which token;
    `position` is the new token's in its sequence. Equal logits fall to the lowest id. Raises ModelError where the
    logits hold NaN or are infinite.
    """
    adjusted = _adjusted(logits, sampling, counts)
    likeliest = int(np.argmax(adjusted))
    if not np.isfinite(adjusted[likeliest]):
        raise ModelError("The model computed logits that are no numbers; check its weights, or use another precision.")
    if sampling.greedy:
        return likeliest
    ids, weights = _candidates(adjusted, sampling)
    cumulative = np.cumsum(weights, dtype=np.float64)
    # The largest index is a guard: u < 1, but the product may round up to the sum.
    drawn = np.searchsorted(cumulative, uniform(sampling.seed or 0, position) * cumulative[-1], side="right")
    return int(ids[min(int(drawn), len(ids) - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on both arguments and on nothing else."""
    raw = int(np.random.Philox(key=seed % (1 << 64), counter=position).random_raw())
    return (raw >> 11) / (1 << 53)


def logprobs(logits: Array, token: int, top: int) -> Logprob:
    """Log-probabilities at one position: `logits` [vocab] float32, the chosen token, how many of the likeliest."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    if not top:
        return Logprob(float(shifted[token]))
    top = min(top, len(shifted))
    ids = _largest(shifted, top)
    ids = ids[np.argsort(-shifted[ids], kind="stable")]
    return Logprob(float(shifted[token]), tuple((int(one), float(shifted[one])) for one in ids))


def _adjusted(logits: Array, sampling: Sampling, counts: Mapping[int, int]) -> Array:
    """With bias and penalties: OpenAI's formula, logit - count * frequency - (count > 0) * presence."""
    penalised = counts if sampling.presence_penalty or sampling.frequency_penalty else {}
    if not penalised and not sampling.logit_bias:
        return logits
    adjusted = logits.copy()
    for token, bias in sampling.logit_bias.items():
        if 0 <= token < len(adjusted):
            adjusted[token] += bias
    for token, count in penalised.items():
        adjusted[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    return adjusted


def _candidates(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """The ids that may be drawn, with weights in proportion to their probabilities."""
    weights = (logits - logits.max()) / np.float32(sampling.temperature)
    np.exp(weights, out=weights)
    ids = np.arange(len(weights))
    if sampling.min_p:
        ids = np.flatnonzero(weights >= sampling.min_p)  # the likeliest one's weight is 1
    if sampling.top_k and sampling.top_k < len(ids):
        ids = ids[_largest(weights[ids], sampling.top_k)]
    if sampling.top_p < 1.0:
        ids = ids[_nucleus(weights[ids], sampling.top_p)]
    return ids, weights[ids]


def _nucleus(weights: Array, top_p: float) -> Array:
    """Indices of the smallest set of largest weights that holds `top_p` of their sum, at least one."""
    falling = np.sort(weights)[::-1]  # values alone: sorting indices by them takes ten times as long
    cumulative = np.cumsum(falling, dtype=np.float64)
    return _largest(weights, min(int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1, len(weights)))


def _largest(values: Array, count: int) -> Array:
    """Indices of the `count` largest values, rising; of equal values the first ones."""
    least = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > least)
    return np.sort(np.concatenate([above, np.flatnonzero(values == least)[: count - len(above)]]))
