"""Temperatures and thresholds of exits, from logits on samples that neither training nor the final test has seen.

    heats = [temperature(logits, labels) for logits in exits]
    chosen = choose_thresholds(exits, final, labels, wanted=0.9, temperatures=heats, work=[0.2, 0.5, 1.0])

Owns the fit of the temperature, the calibration error, and the choice of thresholds with what it leads to. Must never
import anything but NumPy and the bundle, or touch a model.

A threshold chosen on few samples flatters itself. So the goal must hold for the upper confidence bound (one-sided 95 %)
of the loss against the full model, not for the loss that was seen: on n samples even a choice without a single loss
counts as one of 2.7 / n. Nobody leaves early on the word of too few samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import DataError, ExperimentError
from fedge.edge.bundle import Exit
from fedge.edge.exits.rules import NEVER, Logits, Scores, check_threshold, probabilities, scores

Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0
SURE = 1.645  # standard normal quantile of 95 %
CANDIDATES = 40  # thresholds tried for each exit: quantiles of its scores


@dataclass(frozen=True, slots=True)
class Leaving:
    """What became of the samples that one exit answered; `share` is of all samples, None stands for no such sample."""

    share: float
    accuracy: float | None  # None without labels, too
    final_accuracy: float | None  # the full model's on the same samples
    agreement: float | None  # with the full model


@dataclass(frozen=True, slots=True)
class Outcome:
    """What thresholds lead to on a set of samples: `leaving` of each exit, and last of the output."""

    leaving: tuple[Leaving, ...]
    accuracy: float | None
    agreement: float
    work: float  # spent per sample, in the unit it was given in


@dataclass(frozen=True, slots=True)
class Calibration:
    """Settings of all exits in order, and their outcome: on the samples that chose them, where nothing else is said."""

    rule: str
    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...]
    outcome: Outcome

    def put(self, exits: Sequence[Exit]) -> tuple[Exit, ...]:
        """The exits of a bundle with these settings; without labels the full model counts as right.

        Raises DataError where their number differs.
        """
        if len(exits) != len(self.thresholds):
            raise DataError(f"{len(self.thresholds)} exits were calibrated, the bundle has {len(exits)}.")
        settings = zip(exits, self.temperatures, self.thresholds, self.outcome.leaving)
        return tuple(
            msgspec.structs.replace(one, temperature=heat, threshold=bar, share=left.share, **_right(left))
            for one, heat, bar, left in settings
        )


def _right(left: Leaving) -> dict[str, float]:
    if left.accuracy is None or left.final_accuracy is None:
        return {"accuracy": left.agreement or 0.0, "final_accuracy": 0.0 if left.agreement is None else 1.0}
    return {"accuracy": left.accuracy, "final_accuracy": left.final_accuracy}


def temperature(logits: Logits, labels: Labels) -> float:
    """The T in [COLDEST, HOTTEST] that minimises the mean of -ln softmax(logits / T)[label] (Guo et al., ICML 2017).

    `logits` [n, C], `labels` [n]; where there are none, the full model's classes serve. The likelihood is convex in
    1 / T, so it has one valley in ln T, which golden-section search finds. Raises DataError.
    """
    _check(logits, labels)
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    right = np.maximum(shifted[np.arange(len(labels)), labels], -1e9)  # a class ruled out by -inf costs much, not NaN

    def cost(heat: float) -> float:
        at = exp(heat)
        return float(np.mean(np.log(np.exp(shifted / at).sum(axis=1)) - right / at))

    low, high, golden = log(COLDEST), log(HOTTEST), (sqrt(5) - 1) / 2
    for _ in range(40):  # to 3e-8 of the range
        left, other = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, other) if cost(left) < cost(other) else (left, high)
    return exp((low + high) / 2)


def calibration_error(logits: Logits, labels: Labels, temperature: float = 1.0) -> float:
    """ECE: the mean gap between confidence and accuracy over BINS bins of equal width (Guo et al., ICML 2017).

    `logits` [n, C], `labels` [n]. Raises DataError.
    """
    _check(logits, labels)
    chances = probabilities(logits, temperature)
    sure, right = chances.max(axis=1), chances.argmax(axis=1) == labels
    bins = np.clip(np.ceil(sure * BINS).astype(np.int64) - 1, 0, BINS - 1)  # each bin includes its upper end
    gaps = np.abs(np.bincount(bins, sure - right, BINS))
    return float(gaps.sum() / len(labels))


def evaluate(
    exits: Sequence[Logits],
    final: Logits,
    labels: Labels | None,
    *,
    rule: str,
    temperatures: Sequence[float],
    thresholds: Sequence[float],
    work: Sequence[float],
) -> Outcome:
    """What these settings lead to on samples with the logits [n, C] of each exit and of the output.

    `work` is what a sample costs up to each exit and, last, up to the output. Raises DataError, ExperimentError.
    """
    ranks = _scores(exits, final, labels, rule, temperatures, work)
    _count(len(exits), thresholds, "thresholds")
    for threshold in thresholds:
        check_threshold(threshold)
    return _outcome(exits, final, labels, _places(ranks, np.asarray(thresholds, np.float64)), work)


def choose_thresholds(
    exits: Sequence[Logits],
    final: Logits,
    labels: Labels | None,
    *,
    wanted: float,
    temperatures: Sequence[float],
    work: Sequence[float],
    rule: str = "confidence",
) -> Calibration:
    """The thresholds that save most work while the goal holds on held-out samples.

    `wanted` is an accuracy where there are `labels` [n], else an agreement with the full model. It must hold for the
    upper bound of what is lost (see the module). From thresholds of 1 on, the exit is lowered to its next candidate
    whose step saves most work per loss, as long as there is one that keeps the goal. Arguments are as in `evaluate`.

    The outcome is that of these samples, and flatters; that of others is what `evaluate` says.

    Raises ExperimentError where the full model itself misses the goal, or `wanted` is outside [0, 1]; DataError.
    """
    ranks = _scores(exits, final, labels, rule, temperatures, work)
    wrong = [_wrong(one, final, labels) for one in (*exits, final)]
    budget = 1.0 - wanted - float(wrong[-1].mean())
    if not 0.0 <= wanted <= 1.0 or budget < 0:
        raise ExperimentError(
            f"The goal {wanted} cannot be had: the full model reaches {1 - wrong[-1].mean():.4f} here; ask for less."
        )
    ladder = [_candidates(rank) for rank in ranks]
    table, costs = np.stack(wrong), np.asarray(work, np.float64)
    steps = _descend(ranks, ladder, table, costs, budget)
    thresholds = tuple(float(rungs[step]) for rungs, step in zip(ladder, steps))
    places = _places(ranks, np.asarray(thresholds))
    return Calibration(rule, tuple(temperatures), thresholds, _outcome(exits, final, labels, places, work))


def loss_bound(lost: NDArray[np.float64]) -> float:
    """The upper 95 % bound of the mean of `lost` [n] in {-1, 0, 1}: Wilson's, their mean square for the variance."""
    n, square = len(lost), SURE**2
    return float(lost.mean() + square / (2 * n) + SURE * sqrt((np.square(lost).mean() + square / (4 * n)) / n))


def _descend(
    ranks: Sequence[Scores], ladder: Sequence[Scores], wrong: Flags, work: NDArray[np.float64], budget: float
) -> list[int]:
    """How many rungs each exit goes down its ladder. Rungs at which nobody more would leave are skipped."""
    steps, full = [0] * len(ranks), wrong[-1].astype(np.float64)

    def fate(at: Sequence[int]) -> tuple[float, float, bool]:
        bars = np.array([rungs[step] for rungs, step in zip(ladder, at)])
        places = _places(ranks, bars)
        lost = wrong[places, np.arange(len(full))] - full
        kept = bool((places == len(ranks)).all()) or loss_bound(lost) <= budget
        return float(work[places].mean()), float(lost.mean()), kept

    spent, lost, _ = fate(steps)
    while True:
        found = []
        for index, rungs in enumerate(ladder):
            for reach in range(steps[index] + 1, len(rungs)):
                at = [*steps[:index], reach, *steps[index + 1 :]]
                now, then, kept = fate(at)
                if kept and now < spent:
                    found.append(((spent - now) / max(then - lost, 1.0 / len(full)), at, now, then))
                if now < spent:
                    break
        if not found:
            return steps
        _, steps, spent, lost = max(found)


def _candidates(rank: Scores) -> Scores:
    """1, then thresholds downwards that let ever more samples leave: quantiles of their scores, all below 1."""
    below = np.nextafter(NEVER, 0.0)
    levels = np.quantile(rank, np.linspace(0, 1, CANDIDATES + 1), method="lower")
    return np.concatenate([[NEVER], np.unique(np.minimum(levels, below))[::-1]])


def _places(ranks: Sequence[Scores], thresholds: Scores) -> NDArray[np.int64]:
    """Where each sample leaves, [n]: the first exit whose score reaches a threshold below 1, else len(ranks)."""
    passed = np.stack([(rank >= bar) & (bar < NEVER) for rank, bar in zip(ranks, thresholds)])
    places: NDArray[np.int64] = np.where(passed.any(axis=0), passed.argmax(axis=0), len(ranks))
    return places


def _outcome(
    exits: Sequence[Logits], final: Logits, labels: Labels | None, places: NDArray[np.int64], work: Sequence[float]
) -> Outcome:
    outputs = [*exits, final]
    named = np.stack([logits.argmax(axis=1) for logits in outputs])
    answer = named[places, np.arange(len(places))]
    agrees = answer == named[-1]
    right = None if labels is None else answer == labels
    full = None if labels is None else named[-1] == labels
    leaving = []
    for index in range(len(outputs)):
        here = places == index
        some = bool(here.any())
        shares = [float(one[here].mean()) if some and one is not None else None for one in (right, full, agrees)]
        leaving.append(Leaving(float(here.mean()), *shares))
    whole = None if right is None else float(right.mean())
    return Outcome(tuple(leaving), whole, float(agrees.mean()), float(np.asarray(work)[places].mean()))


def _wrong(logits: Logits, final: Logits, labels: Labels | None) -> Flags:
    """Which answers are not the label or, without labels, not the full model's."""
    flags: Flags = logits.argmax(axis=1) != (final.argmax(axis=1) if labels is None else labels)
    return flags


def _scores(
    exits: Sequence[Logits],
    final: Logits,
    labels: Labels | None,
    rule: str,
    temperatures: Sequence[float],
    work: Sequence[float],
) -> list[Scores]:
    """The scores [n] at each exit, all arguments checked."""
    _check(final, labels)
    if not exits or any(logits.shape != final.shape for logits in exits):
        raise DataError(
            "The exits' logits and the final ones must be of the same samples and classes, one exit or more."
        )
    _count(len(exits), temperatures, "temperatures")
    _count(len(exits) + 1, work, "figures of work")
    return [scores(rule, exits[: index + 1], temperatures[index]) for index in range(len(exits))]


def _count(wanted: int, given: Sequence[float], what: str) -> None:
    if len(given) != wanted:
        raise DataError(f"There are {len(given)} {what}, {wanted} are needed; give one for each.")


def _check(logits: Logits, labels: Labels | None) -> None:
    """Raises DataError where there is no sample, or labels do not fit the logits."""
    probabilities(logits)
    if not len(logits):
        raise DataError("The calibration set is empty; give held-out samples.")
    if labels is None:
        return
    if labels.shape != (len(logits),) or labels.dtype.kind not in "iu":
        raise DataError(f"Labels are {labels.dtype} {labels.shape}; whole numbers [{len(logits)}] are needed.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(f"Labels go from {labels.min()} to {labels.max()}, the logits have {logits.shape[1]} classes.")
