"""The client's half of SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II).

    each step  y <- y - rate (g(y) - c_i + c)
    at the end c_i+ = c_i - c + (x - y) / (steps rate);  send c_i+ - c_i

c comes as the blob "control" of the broadcast (0 where there is none yet), c_i lasts in the client's state. Exact for
plain SGD; with a local momentum or an adaptive optimizer c_i is only an estimate of the client's gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedge.core.params import Array
from fedge.strategies.contracts import Work

CONTROL = "control"
_CORRECTION = "scaffold.correction"


@dataclass(frozen=True, slots=True)
class Scaffold:
    """Needs the server optimizer `scaffold`."""

    def begin(self, work: Work, state: dict[str, Array]) -> None:
        """Work out c - c_i."""
        correction = work.start.new_zeros(work.start.shape)
        for control, sign in ((work.broadcast.blobs.get(CONTROL), 1.0), (state.get(CONTROL), -1.0)):
            if control is not None:
                correction.add_(work.start.new_tensor(control[: correction.numel()]), alpha=sign)
        work.scratch[_CORRECTION] = correction

    def penalty(self, work: Work, model: Any, batch: Any, output: Any) -> None:
        """Nothing: the correction is to the gradient."""

    def adjust(self, work: Work) -> None:
        """Add c - c_i."""
        work.grad.add_(work.scratch[_CORRECTION])

    def finish(self, work: Work, state: dict[str, Array]) -> Mapping[str, Array]:
        """Keep c_i+ [trainable]; send the change, float32 [d] with zeros for what is not trained."""
        mean_gradient = (work.start - work.params).div_(work.task.steps * work.rate)
        control = mean_gradient.sub_(work.scratch[_CORRECTION]).numpy()  # c_i+
        change = np.zeros(work.broadcast.vector.size, np.float32)
        change[: control.size] = control
        if CONTROL in state:
            change[: control.size] -= state[CONTROL]
        state[CONTROL] = control
        return {CONTROL: change}
