"""Weighers: one scalar per update from its metadata. A share is relative to the group, a discount is in (0, 1].

Owns the names of the kinds. Must never see a vector.
"""

from fedge.core.registry import Registry

WEIGHERS = Registry(
    "server.weigher",
    {
        "equal": "fedge.strategies.weighers.equal:Equal",
        "examples": "fedge.strategies.weighers.examples:Examples",
        "fednova": "fedge.strategies.weighers.fednova:FedNova",
    },
)

STALENESS = Registry(
    "server.staleness",
    {
        "constant": "fedge.strategies.weighers.staleness:Constant",
        "polynomial": "fedge.strategies.weighers.staleness:Polynomial",
        "hinge": "fedge.strategies.weighers.staleness:Hinge",
    },
)
