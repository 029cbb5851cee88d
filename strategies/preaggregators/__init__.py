"""Pre-aggregators: rows to rows by a matrix, in front of any rule. One is one file, named after it.

Owns the names of the kinds. Must never import one before it is asked for.
"""

from fedge.core.registry import Registry

_HERE = "fedge.strategies.preaggregators"

PREAGGREGATORS = Registry(
    "server.aggregator.pre",
    {
        "nnm": f"{_HERE}.nnm:NearestNeighbourMixing",
        "bucketing": f"{_HERE}.bucketing:Bucketing",
        "clip": f"{_HERE}.clip:Clip",
        "arc": f"{_HERE}.arc:AdaptiveRobustClipping",
        "norm-filter": f"{_HERE}.norm_filter:NormFilter",
        "basgd": f"{_HERE}.basgd:Buckets",
    },
    several=True,
)
