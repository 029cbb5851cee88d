"""Aggregators: rows and weights to one vector. One rule is one file, named after it.

Owns the names of the kinds. Must never import a rule before it is asked for.
"""

from fedge.core.registry import Registry

AGGREGATORS = Registry("server.aggregator", {"mean": "fedge.strategies.aggregators.mean:Mean"})
