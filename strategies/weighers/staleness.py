"""Discounts for stale updates, the functions s(tau) of FedAsync (Xie et al. 2019, arXiv 1903.03934, section 5.2).

Laws: s(0) = 1, s is in (0, 1] and never rises with the staleness tau, the number of versions published between an
update's base and its arrival. Must never depend on anything else.
"""

from dataclasses import dataclass

from fedge.core.errors import ExperimentError
from fedge.strategies.contracts import Arrival


@dataclass(frozen=True, slots=True)
class Constant:
    """No discount."""

    def weigh(self, arrival: Arrival) -> float:
        """1.0."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Polynomial:
    """(1 + tau) ** -exponent; 0.5 is also what FedBuff (arXiv 2106.06639) takes."""

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 10:  # far above any in use, and (1 + tau) ** -10 is still above 0
            raise ExperimentError(f"server.staleness.exponent: must be from 0 to 10, not {self.exponent}.")

    def weigh(self, arrival: Arrival) -> float:
        """In (0, 1]."""
        return float((1.0 + arrival.staleness) ** -self.exponent)


@dataclass(frozen=True, slots=True)
class Hinge:
    """1 up to a staleness of `b`, then 1 / (a (tau - b) + 1)."""

    a: float = 10.0
    b: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.a < float("inf") or self.b < 0:
            raise ExperimentError(f"server.staleness: a and b must be finite and at least 0, not {self.a}, {self.b}.")

    def weigh(self, arrival: Arrival) -> float:
        """In (0, 1]."""
        return 1.0 / (self.a * max(0, arrival.staleness - self.b) + 1.0)
