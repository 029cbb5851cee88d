"""Schedulers: who trains, for how many steps, and which arrivals are aggregated together."""

from fedge.core.registry import Registry

SCHEDULERS = Registry(
    "server.scheduler",
    {
        "fedavg": "fedge.strategies.schedulers.fedavg:FedAvg",
        "dbw": "fedge.strategies.schedulers.dbw:DynamicBackupWorkers",
        "fedasync": "fedge.strategies.schedulers.fedasync:FedAsync",
        "fedbuff": "fedge.strategies.schedulers.fedbuff:FedBuff",
        "fedat": "fedge.strategies.schedulers.fedat:FedAT",
        "tifl": "fedge.strategies.schedulers.tifl:TiFL",
        "compass": "fedge.strategies.schedulers.compass:Compass",
    },
)
