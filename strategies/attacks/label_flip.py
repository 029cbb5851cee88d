"""Label flipping (Tolpegin, Truex, Gursoy, Liu, "Data Poisoning Attacks Against Federated Learning Systems", ESORICS
2020; for all classes at once as in Fang, Cao, Jia, Gong, USENIX Security 2020).

    trains on (x, C - 1 - c) where an example is (x, c), and sends what comes of it
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedge.core.params import Array, Vector
from fedge.strategies.attacks.scene import Scene


def flipped(y: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """C - 1 - c for every label c."""
    return classes - 1 - y


@dataclass(frozen=True, slots=True)
class LabelFlip:
    """An attack on the data alone."""

    omniscient: ClassVar[bool] = False

    def poison(self, x: Array, y: NDArray[np.int64], classes: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
        """The same inputs under other labels."""
        return x, flipped(y, classes)

    def forge(self, scene: Scene) -> Vector:
        """`own`, trained on those."""
        return scene.own
