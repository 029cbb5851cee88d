"""Sybils (Fung, Yoon, Beschastnikh, "The Limitations of Federated Learning in Sybil Settings", RAID 2020): one attacker
behind many names, who trains once and sends the result under each.

    sent = one update, trained on flipped labels, by every hostile client alike

The paper's sybils train on the same poisoned data with noise of their own; identical copies are their limit.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedge.core.params import Array, Vector
from fedge.strategies.attacks.label_flip import flipped
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class Sybil:
    """Copies of what the first of them made of the newest version."""

    omniscient: ClassVar[bool] = False

    def poison(self, x: Array, y: NDArray[np.int64], classes: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
        """The same inputs under other labels."""
        return x, flipped(y, classes)

    def forge(self, scene: Scene) -> Vector:
        """`lead`."""
        return scene.own if scene.lead is None else scene.lead
