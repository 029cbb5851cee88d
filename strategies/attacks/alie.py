"""A little is enough (Baruch, Baruch, Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning",
NeurIPS 2019).

    sent = mean - z * std                                     by coordinate, over the honest rows
    z    = quantile((N - f - s) / (N - f)) of N(0, 1),   s = floor(N / 2 + 1) - f

so little off the mean that s honest rows, with the f hostile a majority, lie further off. The deviation divides by the
number of rows and z moves against the mean, as in the authors' code; byzfl adds z std, divides by one less, and takes
z = 1.5. `alie-optimal` looks for the z that hurts the rule in use most, as byzfl's Optimal_ALittleIsEnough.
"""

from dataclasses import dataclass
from math import floor
from statistics import NormalDist
from typing import ClassVar

import numpy as np

from fedge.core.params import Vector
from fedge.strategies.attacks.moments import deviation, mean
from fedge.strategies.attacks.scene import Scene
from fedge.strategies.attacks.search import check_evaluations, strongest

HIGHEST = 3.0  # where the hostile are so many that any z would do


def supported(clients: int, byzantine: int) -> float:
    """The paper's z, from 0 (too few to sway anybody) to HIGHEST."""
    honest, supporters = clients - byzantine, floor(clients / 2 + 1) - byzantine
    share = (honest - supporters) / honest
    return HIGHEST if share >= 1 else max(0.0, min(HIGHEST, NormalDist().inv_cdf(share))) if share > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ALittleIsEnough:
    """`z` 0: by the paper's formula; below 0: on the other side of the mean."""

    z: float = 0.0
    omniscient: ClassVar[bool] = True

    def forge(self, scene: Scene) -> Vector:
        """Mean - z * std."""
        factor = self.z or supported(scene.clients, scene.byzantine)
        return mean(scene.honest) - np.float32(factor) * deviation(scene.honest)


@dataclass(frozen=True, slots=True)
class OptimalALittleIsEnough:
    """The z found by asking the rule `evaluations` times."""

    evaluations: int = 20
    omniscient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_evaluations(self.evaluations)

    def forge(self, scene: Scene) -> Vector:
        """Mean - z * std; the paper's z where the rule cannot be asked."""
        centre, spread = mean(scene.honest), deviation(scene.honest)
        plain = supported(scene.clients, scene.byzantine)
        return strongest(scene, lambda z: centre - np.float32(z) * spread, plain, self.evaluations)
