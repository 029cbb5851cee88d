"""Adaptive server optimizers, FedOpt (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): Adagrad, Adam and Yogi.

    m <- beta1 m + (1 - beta1) delta
    v <- v + delta^2                                   (adagrad)
    v <- beta2 v + (1 - beta2) delta^2                 (adam)
    v <- v - (1 - beta2) delta^2 sign(v - delta^2)     (yogi)
    w <- w - rate m / (sqrt(v) + tau)

m and v begin at 0 and the defaults are Flower's, so that runs compare. Must never divide by less than tau: it is what
keeps a coordinate that hardly moves from being thrown about.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Array, Vector
from fedge.core.task import DELTA
from fedge.strategies.blocks import blocks
from fedge.strategies.contracts import Group
from fedge.strategies.optimizers.sgd import positive_rate


@dataclass(slots=True)
class Moments:
    """The running first and second moments m and v of the pseudo-gradient, float32 [d] each, and steps taken."""

    m: Vector
    v: Vector
    steps: int = 0


def _moments(vector: Vector) -> Moments:
    return Moments(np.zeros_like(vector), np.zeros_like(vector))


def _check(rate: float, tau: float, *betas: float) -> None:
    positive_rate(rate)
    if not 0 < tau < float("inf"):
        raise ExperimentError(f"server.optimizer.tau: must be a number above 0, not {tau}.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ExperimentError("server.optimizer: beta1 and beta2 must be at least 0 and below 1.")


def _step(
    state: Moments,
    vector: Vector,
    delta: Vector,
    beta1: float,
    second: Callable[[Vector, Vector], None],
    scale: tuple[float, float],
) -> Vector:
    """The new parameters; `second(v, square)` updates v in place and may use up the squares. `scale` is (rate, tau)."""
    rate, tau = scale
    state.steps += 1
    out = np.empty_like(vector)
    for w, g, m, v, to in blocks(vector, delta, state.m, state.v, out):
        np.multiply(m, beta1, out=m)
        np.multiply(g, 1.0 - beta1, out=to)
        np.add(m, to, out=m)
        np.multiply(g, g, out=to)
        second(v, to)
        np.sqrt(v, out=to)
        np.add(to, tau, out=to)
        np.divide(m, to, out=to)
        np.multiply(to, -rate, out=to)
        np.add(to, w, out=to)
    return out


@dataclass(frozen=True, slots=True)
class Adagrad:
    """Rates that only fall, by the sum of squares so far."""

    rate: float = 0.1
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check(self.rate, self.tau)

    def init(self, vector: Vector) -> Moments:
        """Both moments 0."""
        return _moments(vector)

    def step(
        self,
        state: Moments,
        vector: Vector,
        aggregate: Mapping[str, Vector],
        group: Group,
    ) -> tuple[Moments, Vector, Mapping[str, Array]]:
        """One step without momentum (beta1 = 0)."""

        def second(v: Vector, square: Vector) -> None:
            np.add(v, square, out=v)

        return state, _step(state, vector, aggregate[DELTA], 0.0, second, (self.rate, self.tau)), {}


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam with Kingma and Ba's correction for moments that begin at 0, taken into the rate.

    rate_t = rate sqrt(1 - beta2^t) / (1 - beta1^t), t = 1 at the first step, so tau is set against the uncorrected
    sqrt(v). FedOpt's own pseudo-code leaves the correction out; Flower's FedAdam has it.
    """

    rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check(self.rate, self.tau, self.beta1, self.beta2)

    def init(self, vector: Vector) -> Moments:
        """Both moments 0."""
        return _moments(vector)

    def step(
        self,
        state: Moments,
        vector: Vector,
        aggregate: Mapping[str, Vector],
        group: Group,
    ) -> tuple[Moments, Vector, Mapping[str, Array]]:
        """One corrected step."""
        beta2, count = self.beta2, state.steps + 1
        rate = self.rate * sqrt(1.0 - beta2**count) / (1.0 - self.beta1**count)

        def second(v: Vector, square: Vector) -> None:
            np.multiply(v, beta2, out=v)
            np.multiply(square, 1.0 - beta2, out=square)
            np.add(v, square, out=v)

        return state, _step(state, vector, aggregate[DELTA], self.beta1, second, (rate, self.tau)), {}


@dataclass(frozen=True, slots=True)
class Yogi:
    """v moves towards delta^2 by an amount that does not depend on v; no bias correction."""

    rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check(self.rate, self.tau, self.beta1, self.beta2)

    def init(self, vector: Vector) -> Moments:
        """Both moments 0."""
        return _moments(vector)

    def step(
        self,
        state: Moments,
        vector: Vector,
        aggregate: Mapping[str, Vector],
        group: Group,
    ) -> tuple[Moments, Vector, Mapping[str, Array]]:
        """One step."""

        def second(v: Vector, square: Vector) -> None:
            towards = np.sign(v - square)  # one block long
            np.multiply(square, towards, out=square)
            np.multiply(square, 1.0 - self.beta2, out=square)
            np.subtract(v, square, out=v)

        return state, _step(state, vector, aggregate[DELTA], self.beta1, second, (self.rate, self.tau)), {}
