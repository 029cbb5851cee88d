"""Centered clipping of single arrivals, throttled by client: robustness where every update is a new version.

    m = the average of past aggregates, r = `radius` times the median over clients of their last |x - m|
    a client's c-th update of a cycle:  p = 1, 1 / q, 1 / q^2, ...       out = p (m + clip(x - m, r))
    m <- m + (1 - beta) p clip(x - m, r)

Clipping around the server's momentum is from Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust
Optimization", ICML 2021, with a fixed radius; the throttle 1 / q^c after THROTTLE (preprint, 2026), whose cycle ends
when every client has sent. Here it does not wait for f of them; nor for anyone once most have sent PATIENCE times, and
who sent nothing by then is forgotten. So neither silent nor vanished clients stop the training.

Whatever it sends and however often, a client adds to the aggregates of a cycle at most q / (q - 1) times r beside m. It
cannot widen r while it is one of at most f clients and more than 2 f are known: earlier groups are held. Without
hostile clients the result is the row itself or, for the further half of the rows, points to it from m.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Vector
from fedge.strategies import gram
from fedge.strategies.contracts import Outcome, Verdict

PATIENCE = 4  # updates of most clients


@dataclass(slots=True)
class Known:
    """m [d] (empty before the first group), each known client's last |x - m|, and how often it sent in this cycle."""

    centre: Vector = field(default_factory=lambda: np.zeros(0, np.float32))
    distances: dict[str, float] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LocalClipping:
    """`byzantine` is f of all clients, `repeat` q; weights change nothing."""

    byzantine: int = 0
    radius: float = 1.0
    repeat: float = 2.0
    beta: float = 0.9

    associative: ClassVar[bool] = False
    honours_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.byzantine < 0:
            raise ExperimentError(f"server.aggregator.byzantine: must be at least 0, not {self.byzantine}.")
        if not 0 < self.radius < math.inf:
            raise ExperimentError(f"server.aggregator.radius: must be above 0, not {self.radius}.")
        if not 1 < self.repeat < math.inf:
            raise ExperimentError(f"server.aggregator.repeat: must be above 1, not {self.repeat}.")
        if not 0 <= self.beta < 1:
            raise ExperimentError(f"server.aggregator.beta: must be at least 0 and below 1, not {self.beta}.")

    def min_rows(self) -> int:
        """One, once enough clients are known."""
        return 1

    def lacks(self, clients: Collection[str], memory: Known) -> str:
        """More clients, until 2 f + 1 are known."""
        missing = 2 * self.byzantine + 1 - len({*clients, *memory.distances})
        return f"{missing} more clients" if missing > 0 else ""

    def memory(self) -> Known:
        """Nobody known."""
        return Known()

    def init(self, size: int) -> list[Vector]:
        """No rows."""
        return []

    def fold(self, state: list[Vector], row: Vector, weight: float) -> list[Vector]:
        """Keep the row [size]."""
        state.append(row)
        return state

    def merge(self, state: list[Vector], other: list[Vector]) -> list[Vector]:
        """The rows of `other` behind those of `state`."""
        state += other
        return state

    def drop(self, state: list[Vector], index: int) -> list[Vector]:
        """Without the row at `index`."""
        del state[index]
        return state

    def finish(self, state: list[Vector], clients: Sequence[str], memory: Known, seed: int) -> Outcome:
        """The mean of what the rows of these (distinct) clients come to, and what became of each."""
        order = sorted(range(len(clients)), key=clients.__getitem__)
        names, rows = [clients[index] for index in order], [state[index] for index in order]
        centre = memory.centre if memory.centre.size else np.zeros(rows[0].size, np.float32)
        away = np.array([_norm(row - centre) for row in rows])
        memory.distances.update(zip(names, away.tolist()))
        radius = self.radius * float(np.median(list(memory.distances.values())))
        parts = np.array([self._throttled(name, memory) for name in names]) / len(rows)
        kept = parts * np.divide(radius, away, out=np.ones(len(rows)), where=away > radius)

        vector = gram.weighted_sum([centre, *rows], np.array([parts.sum() - kept.sum(), *kept]))
        moved = (1.0 - self.beta ** len(rows)) * kept  # as far as by one row after the other
        memory.centre = gram.weighted_sum([centre, *rows], np.array([1.0 - moved.sum(), *moved]))
        self._end_cycle(memory)
        verdicts = {
            name: Verdict(far / radius if radius else 1.0, part < 0.5 / len(rows), part)
            for name, far, part in zip(names, away.tolist(), kept.tolist())
        }
        return Outcome(vector, verdicts, memory)

    def _throttled(self, client: str, memory: Known) -> float:
        """What this update counts, and that it was sent."""
        before = memory.sent.get(client, 0)
        memory.sent[client] = before + 1
        return float(self.repeat**-before)

    def _end_cycle(self, memory: Known) -> None:
        """All counts back to 0, if it is time."""
        counts = sorted(memory.sent.get(client, 0) for client in memory.distances)
        if counts[(len(counts) - 1) // 2] >= PATIENCE:
            memory.distances = {client: memory.distances[client] for client in memory.sent}
        elif not counts[min(self.byzantine, len(counts) - 1)]:
            return
        memory.sent = {}


def _norm(row: Vector) -> float:
    return math.sqrt(max(0.0, float(gram.products([row], row)[0])))
