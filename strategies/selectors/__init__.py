"""Selectors: which of the idle clients take part in a round."""

from fedge.core.registry import Registry

SELECTORS = Registry(
    "server.selector",
    {
        "all": "fedge.strategies.selectors.all:All",
        "uniform": "fedge.strategies.selectors.uniform:Uniform",
    },
)
