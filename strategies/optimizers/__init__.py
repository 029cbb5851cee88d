"""Server optimizers: the aggregate as a pseudo-gradient, applied to the model. One algorithm is one file.

Owns the names of the kinds. Must never see single updates: an optimizer works on their aggregate.
"""

from fedge.core.registry import Registry

OPTIMIZERS = Registry(
    "server.optimizer",
    {
        "sgd": "fedge.strategies.optimizers.sgd:Sgd",
        "momentum": "fedge.strategies.optimizers.momentum:Momentum",
        "nesterov": "fedge.strategies.optimizers.momentum:Nesterov",
        "adagrad": "fedge.strategies.optimizers.fedopt:Adagrad",
        "adam": "fedge.strategies.optimizers.fedopt:Adam",
        "yogi": "fedge.strategies.optimizers.fedopt:Yogi",
        "fednova": "fedge.strategies.optimizers.fednova:FedNova",
        "scaffold": "fedge.strategies.optimizers.scaffold:Scaffold",
        "feddyn": "fedge.strategies.optimizers.feddyn:FedDyn",
        "fedat": "fedge.strategies.optimizers.fedat:FedAt",
    },
)
