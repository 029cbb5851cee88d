"""Values that are no numbers: the cheapest attack there is, and enough to stop many a rule.

    nan   the own update with one coordinate NaN, which a sum over any rows spreads
    inf   infinity everywhere

A screen in front of every rule refuses both.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.params import Vector
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class NotANumber:
    """One NaN in the middle."""

    omniscient: ClassVar[bool] = False

    def forge(self, scene: Scene) -> Vector:
        """`own` but for one coordinate."""
        sent = scene.own.copy()
        sent[sent.size // 2] = np.nan
        return sent


@dataclass(frozen=True, slots=True)
class Infinite:
    """Nothing but infinities."""

    omniscient: ClassVar[bool] = False

    def forge(self, scene: Scene) -> Vector:
        """Infinity, [d]."""
        return np.full_like(scene.own, np.inf)
