"""FedProx (Li et al. 2020, arXiv 1812.06127): a pull towards the model received, mu / 2 ||w - w_received||^2.

Works on the gradient, as one operation on the flat vectors. Must never keep anything between tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedge.core.errors import ExperimentError
from fedge.core.params import Array
from fedge.strategies.contracts import Work


@dataclass(frozen=True, slots=True)
class FedProx:
    """`mu` at least 0; the paper tries 0.001 to 1."""

    mu: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf"):
            raise ExperimentError(f"client.hooks.mu: must be a number of at least 0, not {self.mu}.")

    def begin(self, work: Work, state: dict[str, Array]) -> None:
        """Nothing to prepare."""

    def penalty(self, work: Work, model: Any, batch: Any, output: Any) -> None:
        """Nothing: the term's gradient is added instead."""

    def adjust(self, work: Work) -> None:
        """Add mu (w - w_received)."""
        work.grad.add_(work.params - work.start, alpha=self.mu)

    def finish(self, work: Work, state: dict[str, Array]) -> Mapping[str, Array]:
        """Nothing to keep or send."""
        return {}
