"""Attacks, to try a federation's defences with: in a simulation, or on a real coordinator in a test. One is one file.

Owns the names of the kinds. Must never import one before it is asked for.
"""

from collections.abc import Collection, Mapping
from typing import Any

from fedge.core.errors import ExperimentError
from fedge.core.registry import Registry
from fedge.strategies.attacks.scene import Attack, Lies, Poisons, Scene

__all__ = ["ATTACKS", "Attack", "Lies", "Poisons", "Scene", "build"]

_HERE = "fedge.strategies.attacks"

ATTACKS = Registry(
    "simulation.attack",
    {
        "none": f"{_HERE}.none:NoAttack",
        "sign-flip": f"{_HERE}.sign_flip:SignFlip",
        "flooding": f"{_HERE}.flooding:Flooding",
        "gaussian": f"{_HERE}.gaussian:Gaussian",
        "alie": f"{_HERE}.alie:ALittleIsEnough",
        "alie-optimal": f"{_HERE}.alie:OptimalALittleIsEnough",
        "ipm": f"{_HERE}.ipm:InnerProductManipulation",
        "ipm-optimal": f"{_HERE}.ipm:OptimalInnerProductManipulation",
        "min-max": f"{_HERE}.min_max:MinMax",
        "min-sum": f"{_HERE}.min_max:MinSum",
        "mimic": f"{_HERE}.mimic:Mimic",
        "replay": f"{_HERE}.replay:Replay",
        "lying": f"{_HERE}.lying:Lying",
        "nan": f"{_HERE}.not_finite:NotANumber",
        "inf": f"{_HERE}.not_finite:Infinite",
        "label-flip": f"{_HERE}.label_flip:LabelFlip",
        "sybil": f"{_HERE}.sybil:Sybil",
        "scaling": f"{_HERE}.scaling:Scaling",
    },
)


def build(settings: Mapping[str, Any], around: Collection[str] = ()) -> Any:
    """The attack {"kind": ..., **its settings}; `around` are those that another reads. Raises ExperimentError."""
    built = ATTACKS.build(settings, around)
    if not callable(getattr(built, "forge", None)) or not isinstance(getattr(built, "omniscient", None), bool):
        raise ExperimentError(
            f"simulation.attack: {settings['kind']!r} is no attack; give it omniscient and forge() "
            "(fedge.strategies.attacks.scene)."
        )
    return built
