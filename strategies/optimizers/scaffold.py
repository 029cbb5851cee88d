"""The server's half of SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1).

    w <- w - rate mean(delta),    c <- c + |S| / N mean(c_i+ - c_i)

c goes out as the blob "control" and each client's change c_i+ - c_i comes in under the same name; c begins at 0 and is
not broadcast before the first step. The paper's means are plain: use the weigher `equal`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import StrategyError
from fedge.core.params import Array, Vector
from fedge.core.task import DELTA
from fedge.strategies.contracts import Group
from fedge.strategies.optimizers.sgd import descend, positive_rate

CONTROL = "control"


@dataclass(slots=True)
class Control:
    """The server's control variate c, float32 [d]; replaced at each step, as broadcasts still hold the last one."""

    control: Vector


@dataclass(frozen=True, slots=True)
class Scaffold:
    """Needs the client hook `scaffold`."""

    blobs: ClassVar[frozenset[str]] = frozenset({CONTROL})  # what updates carry beside the delta

    rate: float = 1.0

    def __post_init__(self) -> None:
        positive_rate(self.rate)

    def init(self, vector: Vector) -> Control:
        """Begin with c = 0."""
        return Control(np.zeros_like(vector))

    def step(
        self, state: Control, vector: Vector, aggregate: Mapping[str, Vector], group: Group
    ) -> tuple[Control, Vector, Mapping[str, Array]]:
        """One step, and the new c to broadcast. Raises StrategyError where no client sent a change of control."""
        if CONTROL not in aggregate:
            raise StrategyError("The optimizer 'scaffold' needs the client hook 'scaffold'; add it to client.hooks.")
        part = min(1.0, len(group.members) / group.expected)
        control = descend(state.control, aggregate[CONTROL], -part)
        return Control(control), descend(vector, aggregate[DELTA], self.rate), {CONTROL: control}
