"""The factor of an attack that hurts the rule in use most, found by asking the rule.

    harm(factor) = |rule(honest rows, f times forged(factor)) - mean of the honest rows|

First the plain factor, 0 and a coarse grid, a constant ratio apart; then both sides of the best, at ever smaller
ratios: harm mostly grows with the factor up to where the rule throws the rows out. (byzfl steps out from 0 by doubling,
then tries ever smaller steps upwards.) Must never hold an attack.
"""

from collections.abc import Callable

import numpy as np

from fedge.core.errors import ExperimentError, FedgeError
from fedge.core.params import Vector
from fedge.strategies.attacks.moments import mean
from fedge.strategies.attacks.scene import Scene

LEAST, MOST = 1 / 16, 256.0  # a plain mean is hurt the more the larger the factor: there has to be an end


def check_evaluations(evaluations: int) -> None:
    """Raises ExperimentError where the rule could never be asked."""
    if evaluations < 1:
        raise ExperimentError(f"simulation.attack.evaluations: must be at least 1, not {evaluations}.")


def strongest(scene: Scene, forged: Callable[[float], Vector], plain: float, evaluations: int) -> Vector:
    """`forged(factor)` at its worst; at the `plain` factor where there is no rule or it refuses the rows."""
    rule = scene.aggregate
    if rule is None:
        return forged(plain)
    rows, centre = list(scene.honest), mean(scene.honest)

    def harm(factor: float) -> float:
        away = rule([*rows, *[forged(factor)] * scene.byzantine]) - centre
        return float(np.dot(away, away))

    coarse = max(2, evaluations // 2)
    grid = np.geomspace(LEAST, MOST, coarse).tolist()
    ratio = (MOST / LEAST) ** (1 / (coarse - 1))
    try:
        found = {factor: harm(factor) for factor in list(dict.fromkeys([plain, 0.0, *grid]))[:evaluations]}
        while len(found) < evaluations:
            best, ratio = max(found, key=found.__getitem__), ratio**0.5
            beside = [factor for factor in (best * ratio, best / ratio) if factor <= MOST and factor not in found]
            if not beside:
                break
            found |= {factor: harm(factor) for factor in beside[: evaluations - len(found)]}
    except FedgeError:
        return forged(plain)
    return forged(max(found, key=found.__getitem__))
