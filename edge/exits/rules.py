"""When an exit answers.

Every rule gives each sample a score in [0, 1] at each exit, and the exit answers where the score reaches its threshold.
One convention for all: threshold 0 always answers, threshold 1 never does, so that thresholds of 1 are the full model.

confidence  the largest probability (SPINN, MobiCom 2020; CE-CoLLM, ICWS 2025)
entropy     1 - H / ln C, where H is the entropy of the probabilities in nats (BranchyNet, ICPR 2016)
patience    1 - 1 / k, where the last k exits, this one included, name the same class (PABEE, NeurIPS 2020)

Probabilities are the softmax of logits / temperature. Owns the scores and the comparison. Must never import anything
but NumPy, or know where logits come from.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import DataError, ExperimentError

Logits = NDArray[Any]
Scores = NDArray[np.float64]

NEVER = 1.0  # the threshold at which no sample leaves


def probabilities(logits: Logits, temperature: float = 1.0) -> Scores:
    """Softmax of logits [n, C] / temperature, float64 [n, C]. Raises DataError, or ExperimentError (temperature)."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise DataError(f"Logits have the shape {logits.shape}; an exit needs [samples, classes] with two classes.")
    if not 0 < temperature < float("inf"):
        raise ExperimentError(f"The temperature is {temperature}; it must be a finite number above 0.")
    shifted = np.asarray(logits, np.float64)
    top = shifted.max(axis=1, keepdims=True, initial=-np.inf)
    if not np.isfinite(top).all():  # NaN spreads to the maximum; -inf of a class that is ruled out is fine
        raise DataError("Logits are NaN or infinite; mend the model, or the coding of what was sent.")
    raised = np.exp((shifted - top) / temperature)
    chances: Scores = raised / raised.sum(axis=1, keepdims=True)
    return chances


def naming(logits: Logits) -> NDArray[np.bool_]:
    """Which samples, [n], of logits [n, C] name a class: not where one is NaN or inf, or all are -inf."""
    names: NDArray[np.bool_] = np.isfinite(logits.max(axis=1))
    return names


def sound(values: Logits) -> bool:
    """Whether values of any shape can be an answer. -inf can: it rules out a class, but not all of a sample's."""
    if values.dtype.kind != "f" or not values.size:
        return True
    if values.ndim == 2 and values.shape[1] > 1:
        return bool(naming(values).all())
    return bool(values.max() < np.inf)  # NaN is not


def confidence(logits: Logits, temperature: float = 1.0) -> Scores:
    """The largest probability of each sample, [n] in [1 / C, 1]. Raises as `probabilities`."""
    largest: Scores = probabilities(logits, temperature).max(axis=1)
    return largest


def certainty(logits: Logits, temperature: float = 1.0) -> Scores:
    """1 - H / ln C of each sample, [n] in [0, 1]. Raises as `probabilities`."""
    chances = probabilities(logits, temperature)
    information = np.zeros_like(chances)
    np.log(chances, out=information, where=chances > 0)
    entropy = -(chances * information).sum(axis=1)
    score: Scores = np.clip(1.0 - entropy / log(chances.shape[1]), 0.0, 1.0)
    return score


def agreement(history: Sequence[Logits]) -> Scores:
    """1 - 1 / k of each sample, [n], where the last k of `history` name the same class. Raises as `probabilities`.

    An exit with another number of classes, such as a prefilter, is passed over: it names none of these. Raises
    DataError where the samples are not the same.
    """
    if any(len(logits) != len(history[-1]) for logits in history):
        raise DataError("The exits' logits differ in shape; give those of the same samples at every exit.")
    named = [probabilities(one).argmax(axis=1) for one in history if one.shape == history[-1].shape]
    run, going = np.ones(len(named[-1])), np.full(len(named[-1]), fill_value=True)
    for earlier in reversed(named[:-1]):
        going &= earlier == named[-1]
        run += going
    score: Scores = 1.0 - 1.0 / run
    return score


RULES: Mapping[str, Callable[[Sequence[Logits], float], Scores]] = {
    "confidence": lambda history, temperature: confidence(history[-1], temperature),
    "entropy": lambda history, temperature: certainty(history[-1], temperature),
    "patience": lambda history, _: agreement(history),
}


def check_rule(rule: str) -> str:
    """The rule itself. Raises ExperimentError where it is none."""
    if rule not in RULES:
        raise ExperimentError(f"There is no exit rule {rule!r}; use one of {', '.join(RULES)}.")
    return rule


def check_threshold(threshold: float) -> float:
    """The threshold itself. Raises ExperimentError outside [0, 1] or where it is NaN."""
    if not 0.0 <= threshold <= NEVER:
        raise ExperimentError(f"An exit has the threshold {threshold}; it must be from 0 (always) to 1 (never).")
    return threshold


def scores(rule: str, history: Sequence[Logits], temperature: float = 1.0) -> Scores:
    """The score, [n], at the last of the exits whose logits [n, C] are given, in the order in which they were passed.

    Raises ExperimentError for a rule that is not there, DataError for logits that are no use.
    """
    check_rule(rule)
    if not history:
        raise DataError("There are no logits of any exit; give those of one or more.")
    return RULES[rule](history, temperature)


def decide(rule: str, history: Sequence[Logits], temperature: float, threshold: float) -> NDArray[np.bool_]:
    """Which samples, [n], the last of the exits passed so far answers.

    `history` holds the logits [n, C] of the exits up to and including this one; temperature and threshold are its own.
    At threshold 1 nobody leaves, even where a probability is 1 to the last bit. Raises as `scores`.
    """
    check_threshold(threshold)
    leave: NDArray[np.bool_] = (scores(rule, history, temperature) >= threshold) & (threshold < NEVER)
    return leave
