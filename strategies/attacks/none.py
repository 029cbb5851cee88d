"""No attack: clients counted as hostile that behave, to compare a run under attack with."""

from dataclasses import dataclass
from typing import ClassVar

from fedge.core.params import Vector
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class NoAttack:
    """Sends the truth."""

    omniscient: ClassVar[bool] = False

    def forge(self, scene: Scene) -> Vector:
        """`own`."""
        return scene.own
