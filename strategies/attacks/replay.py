"""Replay: whatever the model has become, the client sends its very first update again.

    sent = the first own update

A coordinator sees the base version that goes with the task, so no screen for staleness finds it.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedge.core.params import Vector
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class Replay:
    """Honest once, and stale for ever after."""

    omniscient: ClassVar[bool] = False

    def forge(self, scene: Scene) -> Vector:
        """The first of `past`."""
        return scene.past[0] if scene.past else scene.own
