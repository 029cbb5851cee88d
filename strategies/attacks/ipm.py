"""Inner product manipulation (Xie, Koyejo, Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product
Manipulation", UAI 2020).

    sent = -epsilon * mean of the honest rows

A small epsilon slips through rules that look at distances, a large one turns a mean round. `ipm-optimal` looks for the
epsilon that hurts the rule in use most, as byzfl's Optimal_InnerProductManipulation; byzfl's plain one has 2.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.params import Vector
from fedge.strategies.attacks.moments import mean
from fedge.strategies.attacks.scene import Scene
from fedge.strategies.attacks.search import check_evaluations, strongest

EPSILON = 0.1


@dataclass(frozen=True, slots=True)
class InnerProductManipulation:
    """One factor for every rule."""

    epsilon: float = EPSILON
    omniscient: ClassVar[bool] = True

    def forge(self, scene: Scene) -> Vector:
        """-epsilon * mean."""
        return np.float32(-self.epsilon) * mean(scene.honest)


@dataclass(frozen=True, slots=True)
class OptimalInnerProductManipulation:
    """The epsilon found by asking the rule `evaluations` times."""

    evaluations: int = 20
    omniscient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_evaluations(self.evaluations)

    def forge(self, scene: Scene) -> Vector:
        """-epsilon * mean; the plain epsilon where the rule cannot be asked."""
        centre = mean(scene.honest)
        return strongest(scene, lambda factor: np.float32(-factor) * centre, EPSILON, self.evaluations)
