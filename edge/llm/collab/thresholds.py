"""How sure an exit has to be: temperature, calibration error and thresholds of exits of a language model.

What is fitted and how it is bounded is `fedge.edge.exits.calibrate`'s. Owns the way there from a vocabulary of tens of
thousands: of each position only few logits matter for a temperature, and for thresholds only how sure each exit was and
whether it named the full model's token. Must never run a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import DataError, ExperimentError
from fedge.core.params import Array
from fedge.edge.exits.calibrate import loss_bound
from fedge.edge.exits.rules import NEVER
from fedge.edge.llm.collab.exits import Row

KEPT, GROUP = 512, 64  # logits of a position that count one by one, and of the others, how many count as one
CANDIDATES = 400  # thresholds tried: quantiles of confidences
_LOWEST = np.float32(-1e30)  # for no logit at all
GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What exits said on held-out positions: float64 `confidence` [exits, n], and bool `agrees` [exits, n], whether it
    was the full model's token. Raises DataError where there is no position or no exit.
    """

    confidence: NDArray[np.float64]
    agrees: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if not self.confidence.size or self.confidence.shape != self.agrees.shape or not _sane(self.confidence):
            raise DataError("The calibration set is empty, or confidences are none; give more held-out text.")


def _sane(confidence: NDArray[np.float64]) -> bool:
    return bool(((confidence >= 0) & (confidence <= 1)).all())


def compact(logits: Array, labels: Array) -> Array:
    """A new array [n, fewer] for logits [n, vocab] that has the same probabilities, with those of small ones added up.

    Column 0 is the label's [n], whatever its size; then come the KEPT largest others, and GROUP of the rest at a time.
    """
    rows = np.arange(len(logits))
    others = logits.copy()
    others[rows, labels] = -np.inf
    kept = min(KEPT, others.shape[1])
    others = np.partition(others, -kept, axis=1)
    rest = others[:, : others.shape[1] - kept]
    rest = np.pad(rest, ((0, 0), (0, -rest.shape[1] % GROUP)), constant_values=_LOWEST).reshape(len(rest), -1, GROUP)
    top = np.maximum(rest.max(axis=2), _LOWEST)
    sums = top + np.log(np.exp(rest - top[:, :, None]).sum(axis=2))
    return np.concatenate([logits[rows, labels][:, None], others[:, -kept:], sums], axis=1)


def row(seen: Seen, thresholds: Sequence[float]) -> Row:
    """What thresholds, one for each exit, lead to: the first exit that is sure enough answers, else the cloud."""
    first = _first(seen, np.asarray(thresholds, np.float64)[:, None])
    counts = first.sum(axis=1)
    right = (first & seen.agrees).sum(axis=1)
    n = seen.confidence.shape[1]
    agreements = np.where(counts, right / np.maximum(counts, 1), 1.0)
    cloud = 1.0 - counts.sum() / n
    return Row(
        tuple(map(float, thresholds)),
        tuple(map(float, counts / n)),
        tuple(map(float, agreements)),
        float(cloud),
        float(1.0 - (counts.sum() - right.sum()) / n),
    )


def table(seen: Seen, thresholds: Sequence[float] = GRID) -> tuple[Row, ...]:
    """What one threshold for all exits leads to, for each that is given."""
    return tuple(row(seen, (one,) * len(seen.confidence)) for one in thresholds)


def threshold_for(seen: Seen, agreement: float = 0.98) -> float:
    """The lowest threshold, one for all exits, at which tokens agree with the full model so often.

    It holds for the one-sided 95 % bound on these positions. Where confidences are calibrated no other thresholds,
    one for each exit, leave less to the cloud. Raises ExperimentError where `agreement` is not in [0, 1].
    """
    if not 0.0 <= agreement <= 1.0:
        raise ExperimentError(f"An agreement of {agreement} cannot be had; name one from 0 to 1.")
    levels = np.quantile(seen.confidence.max(axis=0), np.linspace(0, 1, CANDIDATES), method="lower")
    for bar in np.unique(np.minimum(levels, np.nextafter(NEVER, 0.0))):
        lost: NDArray[np.float64] = (_first(seen, bar) & ~seen.agrees).sum(axis=0, dtype=np.float64)
        if loss_bound(lost) <= 1.0 - agreement:
            return float(bar)
    return NEVER


def _first(seen: Seen, bars: NDArray[np.float64] | float) -> NDArray[np.bool_]:
    """Which exit answers, [exits, n]: the first that is sure enough."""
    sure = (seen.confidence >= bars) & (np.asarray(bars) < NEVER)
    first: NDArray[np.bool_] = sure & (np.cumsum(sure, axis=0) == 1)
    return first
