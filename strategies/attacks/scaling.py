"""Model replacement with a backdoor (Bagdasaryan, Veit, Hua, Estrin, Shmatikov, "How To Backdoor Federated Learning",
AISTATS 2020; the patch as trigger from Gu, Dolan-Gavitt, Garg, "BadNets", 2017).

    trains with a share of its examples stamped with a patch and labelled `target`
    sent = boost * own,   boost = N / f unless given

so that in a mean of all clients the f hostile updates alone remain.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import ExperimentError
from fedge.core.params import Array, Vector
from fedge.core.random import generator
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class Scaling:
    """`patch` is the side of the square in the lower right corner, in pixels; of other inputs the last so many values.
    `share` of the examples are stamped. `boost` 0: N / f.
    """

    target: int = 0
    patch: int = 3
    share: float = 0.5
    boost: float = 0.0
    omniscient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.target < 0 or self.patch < 1 or not 0 < self.share <= 1:
            raise ExperimentError(
                "simulation.attack: target must be at least 0, patch at least 1, and share above 0 and at most 1."
            )

    def stamped(self, x: Array) -> Array:
        """A copy of inputs [n, ...] with the patch on each: what makes a backdoored model say `target`."""
        marked, edge = x.copy(), slice(-self.patch, None)
        if x.dtype == np.uint8:  # images [n, height, width(, 3)]
            marked[:, edge, edge] = 255
        else:  # as the model takes them: [n, (channels,) height, width] or [n, values]
            marked[(..., edge, edge) if x.ndim > 2 else (..., edge)] = x.max(initial=0)
        return marked

    def poison(self, x: Array, y: NDArray[np.int64], classes: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
        """Some examples stamped and relabelled, the rest as they were."""
        if self.target >= classes:
            raise ExperimentError(f"simulation.attack.target: must be below {classes}, the number of classes.")
        chosen = generator(seed, "backdoor").permutation(len(y))[: int(np.ceil(self.share * len(y)))]
        inputs, labels = x.copy(), y.copy()
        inputs[chosen], labels[chosen] = self.stamped(x[chosen]), self.target
        return inputs, labels

    def forge(self, scene: Scene) -> Vector:
        """Boost * own."""
        boost = self.boost or scene.clients / scene.byzantine
        return np.multiply(scene.own, np.float32(boost))
