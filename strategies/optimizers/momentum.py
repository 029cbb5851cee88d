"""Server momentum: heavy ball, FedAvgM (Hsu et al. 2019, arXiv 1909.06335), and Nesterov's, the outer optimizer of
DiLoCo (Douillard et al. 2023, arXiv 2311.08105), in the form of torch's SGD without dampening.

    v <- beta v + delta;    w <- w - rate v               (momentum)
                            w <- w - rate (delta + beta v)  (nesterov)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Array, Vector
from fedge.core.task import DELTA
from fedge.strategies.contracts import Group
from fedge.strategies.optimizers.sgd import descend, positive_rate


@dataclass(slots=True)
class Velocity:
    """v, the sum of past pseudo-gradients, fading by beta at each step; float32 [d]."""

    velocity: Vector


def _check(rate: float, beta: float) -> None:
    positive_rate(rate)
    if not 0 <= beta < 1:
        raise ExperimentError(f"server.optimizer.beta: must be at least 0 and below 1, not {beta}.")


def _roll(state: Velocity, delta: Vector, beta: float) -> Vector:
    np.multiply(state.velocity, beta, out=state.velocity)
    np.add(state.velocity, delta, out=state.velocity)
    return state.velocity


@dataclass(frozen=True, slots=True)
class Momentum:
    """Heavy-ball momentum; the effective rate is up to rate / (1 - beta)."""

    rate: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        _check(self.rate, self.beta)

    def init(self, vector: Vector) -> Velocity:
        """At rest."""
        return Velocity(np.zeros_like(vector))

    def step(
        self,
        state: Velocity,
        vector: Vector,
        aggregate: Mapping[str, Vector],
        group: Group,
    ) -> tuple[Velocity, Vector, Mapping[str, Array]]:
        """One step along the velocity."""
        return state, descend(vector, _roll(state, aggregate[DELTA], self.beta), self.rate), {}


@dataclass(frozen=True, slots=True)
class Nesterov:
    """Nesterov's momentum; the defaults are DiLoCo's."""

    rate: float = 0.7
    beta: float = 0.9

    def __post_init__(self) -> None:
        _check(self.rate, self.beta)

    def init(self, vector: Vector) -> Velocity:
        """At rest."""
        return Velocity(np.zeros_like(vector))

    def step(
        self,
        state: Velocity,
        vector: Vector,
        aggregate: Mapping[str, Vector],
        group: Group,
    ) -> tuple[Velocity, Vector, Mapping[str, Array]]:
        """One step along the velocity as it will be after the next."""
        delta = aggregate[DELTA]
        out: Vector = np.multiply(_roll(state, delta, self.beta), self.beta)
        np.add(out, delta, out=out)
        np.multiply(out, -self.rate, out=out)
        return state, np.add(out, vector, out=out), {}
