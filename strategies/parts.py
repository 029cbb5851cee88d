"""Rows by random parts of their coordinates, a few parts at a time.

Coordinates are assigned in runs of 16, one line of a cache, where every part still gets many of them, else one by one:
the rows, which may be mapped from files, are read in random order, and a line costs what one value of it does. What is
left behind the last whole run goes with the last part, which is as random as any. Must never know a rule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedge.core.lanes import halves
from fedge.core.params import Vector
from fedge.core.random import generator

RUN = 16  # coordinates
MANY = 16  # runs in a part; with fewer, coordinates move one by one
PANEL = 1 << 13  # coordinates copied at a time


@dataclass(frozen=True, slots=True)
class Parts:
    """Part q holds the runs `order[bounds[q] : bounds[q + 1]]` of `unit` coordinates each; sizes differ by one unit."""

    size: int
    unit: int
    order: NDArray[np.intp]
    bounds: NDArray[np.intp]

    @staticmethod
    def random(size: int, count: int, seed: int) -> "Parts":
        """A partition of `size` coordinates into `count` parts, or into as many as there are coordinates."""
        unit, count = (RUN if size >= count * MANY * RUN else 1), min(count, size)
        order = generator(seed, "parts").permutation(size // unit)
        each, more = divmod(len(order), count)
        steps = np.arange(count + 1)
        return Parts(size, unit, order, steps * each + np.minimum(steps, more))

    @property
    def count(self) -> int:
        """How many."""
        return len(self.bounds) - 1

    def batches(self) -> Iterator[tuple[int, int]]:
        """All parts, a few at a time: those in low..high are of one size and fit into a panel, or are one."""
        sizes = np.diff(self.bounds) * self.unit
        low = 0
        while low < self.count:
            high = min(low + max(1, PANEL // int(sizes[low])), self.count)
            if self.size % self.unit and low < self.count - 1:
                high = min(high, self.count - 1)
            if sizes[high - 1] != sizes[low]:
                high = low + int(np.count_nonzero(sizes[low:high] == sizes[low]))
            yield low, high
            low = high

    def panels(self, rows: Sequence[Vector], low: int, high: int) -> Iterator[NDArray[np.float32]]:
        """The coordinates of the parts low..high of a batch, [n, high - low, c] at a time."""
        whole = self.size // self.unit * self.unit
        lines = [row[:whole].reshape(-1, self.unit) for row in rows]
        first, last = int(self.bounds[low]), int(self.bounds[high])
        step = last - first if high - low > 1 else PANEL // self.unit
        for start in range(first, last, step):
            runs = self.order[start : min(start + step, last)]
            yield _taken(lines, runs).reshape(len(rows), high - low, -1)
        if whole < self.size and high == self.count:
            yield np.stack([row[whole:] for row in rows])[:, None, :]


def _taken(lines: Sequence[NDArray[np.float32]], runs: NDArray[np.intp]) -> NDArray[np.float32]:
    """These runs of every row, [n, runs, unit]."""
    panel = np.empty((len(lines), len(runs), lines[0].shape[1]), np.float32)

    def some(start: int, stop: int) -> None:
        for index in range(start, stop):
            np.take(lines[index], runs, axis=0, out=panel[index], mode="clip")  # the mode in which no copy is made

    halves(some, len(lines), 1)
    return panel
