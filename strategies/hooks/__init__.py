"""Client hooks: terms in a client's loss or gradient, with state that outlives the task. One algorithm is one file.

Owns the names of the kinds. Hooks work on flat vectors of the trainer's kind and must never touch data or network.
"""

from fedge.core.registry import Registry

HOOKS = Registry(
    "client.hooks",
    {
        "fedprox": "fedge.strategies.hooks.fedprox:FedProx",
        "scaffold": "fedge.strategies.hooks.scaffold:Scaffold",
        "feddyn": "fedge.strategies.hooks.feddyn:FedDyn",
        "moon": "fedge.strategies.hooks.moon:Moon",
        "ditto": "fedge.strategies.hooks.ditto:Ditto",
    },
)
