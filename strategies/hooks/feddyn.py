"""The client's half of FedDyn (Acar et al. 2021, arXiv 2111.04263, algorithm 1): a regulariser that learns.

    loss - <h_i, w> + alpha / 2 ||w - w_received||^2;    at the end h_i <- h_i - alpha (w - w_received)

h_i, the client's gradient at its last local model, begins at 0 and lasts in the client's state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedge.core.errors import ExperimentError
from fedge.core.params import Array
from fedge.strategies.contracts import Work

_GRADIENT = "gradient"
_SCRATCH = "feddyn.gradient"


@dataclass(frozen=True, slots=True)
class FedDyn:
    """Needs the server optimizer `feddyn`. `alpha` above 0."""

    alpha: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ExperimentError(f"client.hooks.alpha: must be a number above 0, not {self.alpha}.")

    def begin(self, work: Work, state: dict[str, Array]) -> None:
        """Fetch h_i."""
        kept = state.get(_GRADIENT)
        work.scratch[_SCRATCH] = work.start.new_zeros(work.start.shape) if kept is None else work.start.new_tensor(kept)

    def penalty(self, work: Work, model: Any, batch: Any, output: Any) -> None:
        """Nothing: the terms' gradient is added instead."""

    def adjust(self, work: Work) -> None:
        """Add alpha (w - w_received) - h_i."""
        work.grad.add_(work.params - work.start, alpha=self.alpha).sub_(work.scratch[_SCRATCH])

    def finish(self, work: Work, state: dict[str, Array]) -> Mapping[str, Array]:
        """Keep the new h_i [trainable]; nothing to send."""
        state[_GRADIENT] = work.scratch[_SCRATCH].sub_(work.params - work.start, alpha=self.alpha).numpy()
        return {}
