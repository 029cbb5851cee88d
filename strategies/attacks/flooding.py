"""Flooding: the flipped update of `sign-flip`, sent as often as the client can.

    sent = -scale * own, with 1 / faster of the time an honest client needs

It breaks what counts updates rather than clients: a buffer that closes on any K updates may hold nothing but these.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.params import Vector
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class Flooding:
    """Ten times as fast as an honest client, unless `simulation.attack.faster` says otherwise."""

    scale: float = 1.0
    omniscient: ClassVar[bool] = False
    haste: ClassVar[float] = 10.0

    def forge(self, scene: Scene) -> Vector:
        """-scale * own."""
        return np.multiply(scene.own, np.float32(-self.scale))
