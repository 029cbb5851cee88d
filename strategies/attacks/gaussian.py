"""Gaussian noise (Blanchard, El Mhamdi, Guerraoui, Stainer, NIPS 2017, there with a deviation of 200).

    sent ~ N(0, s^2) in every coordinate,   s = sigma * mean |honest row| / sqrt(d)

so that sigma = 1 has the norm of an honest update whatever the model. byzfl's sigma is s itself.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Vector
from fedge.core.random import generator
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Every hostile client draws its own."""

    sigma: float = 10.0
    omniscient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sigma < 0:
            raise ExperimentError(f"simulation.attack.sigma: must be at least 0, not {self.sigma}.")

    def forge(self, scene: Scene) -> Vector:
        """The noise."""
        norm = float(np.mean([np.sqrt(np.dot(row, row)) for row in scene.honest]))
        noise = generator(scene.seed, "gaussian", scene.client).standard_normal(scene.own.size, np.float32)
        return np.multiply(noise, np.float32(self.sigma * norm / np.sqrt(scene.own.size)), out=noise)
