"""Ditto (Li et al. 2021, arXiv 2012.04221): a personal model beside the global one, held near it.

    v <- v - rate (gradient(v) + lam (v - w_received)),    as many steps as the task has

The task itself runs as if the hook were not there. The personal model begins as the first model received and lasts in
the client's state as "personal", float32 [trainable].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedge.core.errors import ExperimentError
from fedge.core.params import Array
from fedge.strategies.contracts import Work

PERSONAL = "personal"


@dataclass(frozen=True, slots=True)
class Ditto:
    """`lam` at least 0: 0 trains alone, large values follow the global model; the paper tries 0.05 to 2."""

    lam: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.lam < float("inf"):
            raise ExperimentError(f"client.hooks.lam: must be a number of at least 0, not {self.lam}.")

    def begin(self, work: Work, state: dict[str, Array]) -> None:
        """Nothing to prepare."""

    def penalty(self, work: Work, model: Any, batch: Any, output: Any) -> None:
        """Nothing: the global model is trained as it is."""

    def adjust(self, work: Work) -> None:
        """Nothing: the global model is trained as it is."""

    def finish(self, work: Work, state: dict[str, Array]) -> Mapping[str, Array]:
        """Train the personal model and keep it; nothing to send."""
        personal = work.start.new_tensor(state[PERSONAL]) if PERSONAL in state else work.start
        state[PERSONAL] = work.descend(personal, work.task.steps, self._pull).numpy()
        return {}

    def _pull(self, work: Work) -> None:
        work.grad.add_(work.params - work.start, alpha=self.lam)
