"""The weighted mean, folded on arrival: O(d) memory however many rows (FedAvg, McMahan et al. 2017, arXiv 1602.05629).

Laws: the order of rows does not matter, merging two states equals folding all rows into one, and scaling every weight
changes nothing (each up to rounding). Must never be used against hostile clients: one row moves it at will.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.params import Array, Vector
from fedge.strategies.blocks import accumulate
from fedge.strategies.contracts import Outcome


@dataclass(slots=True)
class MeanState:
    """sum(weight * row) as float32 [size], and the sum of weights."""

    total: Vector
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Mean:
    """sum(weight * row) / sum(weight); zeros where the weights sum to zero."""

    associative: ClassVar[bool] = True
    honours_weights: ClassVar[bool] = True

    def min_rows(self) -> int:
        """One row is its own mean."""
        return 1

    def lacks(self, clients: Collection[str], memory: None) -> str:
        """Nothing."""
        return ""

    def memory(self) -> None:
        """Nothing outlives a group."""

    def init(self, size: int) -> MeanState:
        """Nothing folded yet."""
        return MeanState(np.zeros(size, np.float32))

    def fold(self, state: MeanState, row: Array, weight: float) -> MeanState:
        """Add one row [size] in place; a row of weight 0 leaves no trace. The row is not kept."""
        if weight:
            accumulate(state.total, row, weight)
            state.weight += weight
        return state

    def merge(self, state: MeanState, other: MeanState) -> MeanState:
        """`state` with all of `other` added in place."""
        np.add(state.total, other.total, out=state.total)
        state.weight += other.weight
        return state

    def finish(self, state: MeanState, clients: Sequence[str], memory: None, seed: int) -> Outcome:
        """The mean, in the memory of the total."""
        if state.weight not in (0.0, 1.0):
            np.divide(state.total, state.weight, out=state.total)
        return Outcome(state.total)
