"""Clients out of plain functions, first in virtual time and then behind a coordinator on loopback: the same federation
must learn the same in both.

    python -m pytest examples/mock_clients

Four clients each pull the model towards a value of their own, so the federation should settle on their mean.
"""

import asyncio
from pathlib import Path

import numpy as np

from fedge.client.runtime import Summary, run_client
from fedge.client.trainer import FunctionTrainer, Shard
from fedge.core.params import Vector
from fedge.core.task import Task
from fedge.server.coordinator import serve
from fedge.server.machine import Federation, Stop
from fedge.simulation import SPEEDS, Simulation
from fedge.strategies.aggregators.mean import Mean
from fedge.strategies.optimizers.sgd import Sgd
from fedge.strategies.schedulers.fedavg import FedAvg
from fedge.strategies.weighers.equal import Equal
from fedge.strategies.weighers.staleness import Constant

VALUES = np.array([1.0, 2.0, 3.0, 6.0])
SHARDS = [np.array([index]) for index in range(len(VALUES))]
NAMES = [f"mock-{index}" for index in range(len(VALUES))]


def pull(weights: Vector, _task: Task, shard: Shard) -> Vector:
    """Halfway to the client's value; `shard` holds the index of its only example."""
    goal = VALUES[shard].mean()
    return np.asarray(weights + (goal - weights) / 2, np.float32)


TRAINER = FunctionTrainer(np.zeros(100), pull)
PLAN = Federation(
    TRAINER.layout, FedAvg(steps=1), Equal(), Constant(), Mean(), Sgd(), expected=len(VALUES), stop=Stop(versions=12)
)


def test_in_virtual_time() -> None:
    result = Simulation(PLAN, TRAINER, SHARDS, SPEEDS.build({"kind": "exponential"}), names=NAMES).run()
    assert result.updates == 48
    np.testing.assert_allclose(result.vector, VALUES.mean(), rtol=1e-3)


def test_behind_a_coordinator(tmp_path: Path) -> None:
    machine, clients = asyncio.run(federate(tmp_path))
    assert {client.finished for client in clients} == {"versions"}
    assert sum(client.updates for client in clients) == 48
    np.testing.assert_allclose(machine, VALUES.mean(), rtol=1e-3)


async def federate(folder: Path) -> tuple[Vector, list[Summary]]:
    """A coordinator on a free port and each client in a thread; the final model and what each client did."""
    address = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve(
            PLAN,
            TRAINER.initial(),
            listen="127.0.0.1:0",
            state_dir=folder,
            on_record=lambda _: None,
            on_listening=address.set_result,
        )
    )
    await asyncio.wait([serving, address], return_when=asyncio.FIRST_COMPLETED)
    work = [asyncio.to_thread(run_client, address.result(), name, TRAINER, shard) for name, shard in zip(NAMES, SHARDS)]
    clients = await asyncio.gather(*work)
    return (await serving).broadcast.vector, list(clients)
