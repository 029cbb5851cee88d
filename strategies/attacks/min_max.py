"""Min-max and min-sum (Shejwalkar, Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and
Defenses for Federated Learning", NDSS 2021).

    sent    = m + gamma p,   m the mean of the honest rows x_i,   p = -m / |m|, -std or -sign(m)
    min-max   largest gamma with  max_i |sent - x_i|^2 <= max_ij |x_i - x_j|^2
    min-sum   largest gamma with  sum_i |sent - x_i|^2 <= max_i sum_j |x_i - x_j|^2

The paper halves its way to gamma; each constraint being a parabola in gamma, its root is taken here. One honest row
leaves no room, and is sent itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Vector
from fedge.strategies import gram
from fedge.strategies.attacks.moments import deviation, mean
from fedge.strategies.attacks.scene import Scene
from fedge.strategies.gram import Matrix, Weights

DIRECTIONS = ("unit", "std", "sign")


@dataclass(frozen=True, slots=True)
class MinMax:
    """No further from any honest row than honest rows are from each other."""

    direction: str = "std"
    omniscient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.direction)

    def forge(self, scene: Scene) -> Vector:
        """M + gamma p."""
        centre, apart = _centred(scene.honest)
        push = _push(self.direction, centre, scene.honest)
        *products, own = gram.products([*scene.honest, centre], push)
        gammas = _largest(_square(push), own - np.array(products), apart.max() - _to_mean(apart))
        return centre + np.float32(gammas.min()) * push


@dataclass(frozen=True, slots=True)
class MinSum:
    """No further from all honest rows together than one of them is from the others."""

    direction: str = "std"
    omniscient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.direction)

    def forge(self, scene: Scene) -> Vector:
        """M + gamma p; the differences to the mean add up to 0, so that p meets none of them."""
        centre, apart = _centred(scene.honest)
        push = _push(self.direction, centre, scene.honest)
        slack = (apart.sum(axis=1).max() - _to_mean(apart).sum()) / len(apart)
        gamma = _largest(_square(push), np.zeros(1), np.array([slack]))[0]
        return centre + np.float32(gamma) * push


def _check(direction: str) -> None:
    if direction not in DIRECTIONS:
        raise ExperimentError(f"simulation.attack.direction: must be one of {', '.join(DIRECTIONS)}, not {direction}.")


def _centred(rows: Sequence[Vector]) -> tuple[Vector, Matrix]:
    """Their mean, and the squared distances between them."""
    centre = mean(rows)
    return centre, gram.distances(gram.gram(rows, centre))


def _to_mean(apart: Matrix) -> Weights:
    """|x_i - m|^2 from the squared distances between the rows, [n]."""
    found: Weights = apart.mean(axis=1) - apart.mean() / 2
    return found


def _push(direction: str, centre: Vector, rows: Sequence[Vector]) -> Vector:
    if direction == "std":
        return -deviation(rows)
    if direction == "sign":
        return -np.sign(centre)
    norm = np.sqrt(_square(centre))
    return centre / np.float32(-norm) if norm > 0 else np.zeros_like(centre)


def _square(vector: Vector) -> float:
    return float(gram.products([vector], vector)[0])


def _largest(square: float, along: Weights, slack: Weights) -> Weights:
    """The largest gamma >= 0 with square gamma^2 + 2 along gamma <= slack, each; 0 where no direction is left."""
    if square <= 0:
        return np.zeros_like(along)
    slack = np.maximum(slack, 0.0)
    root = np.sqrt(along**2 + square * slack)
    ahead = along + root  # of the two forms of the root the one without cancellation
    found: Weights = np.where(along > 0, slack / np.where(ahead > 0, ahead, 1.0), (root - along) / square)
    return found
