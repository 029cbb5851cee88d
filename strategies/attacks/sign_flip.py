"""Sign flipping (Li, Xu, Chen, Giannakis, Ling, "RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed
Learning from Heterogeneous Datasets", AAAI 2019).

    sent = -scale * own

byzfl flips the mean of the honest rows instead, which is `ipm` with epsilon = 1 here.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.params import Vector
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class SignFlip:
    """`scale` 1 keeps the norm of an honest update."""

    scale: float = 1.0
    omniscient: ClassVar[bool] = False

    def forge(self, scene: Scene) -> Vector:
        """-scale * own."""
        return np.multiply(scene.own, np.float32(-self.scale))
