"""Rounds of Flower's simulation with a trivial client, as a process of its own: it starts Ray.

Run as `python -m benchmarks.flower_rounds CLIENTS ROUNDS`; the last line printed is {"first_s": ..., "rounds_s": [..]}:
the first round with the start of Ray and its workers, and each one after it. A client answers the model it was sent
times a constant; the strategy is Flower's own FedAvg over every client, without evaluation.
"""

import os

os.environ.update({"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_DEDUP_LOGS": "0"})

import json
import sys
import time
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.trivial import RATE, SIZE, examples_of

client_app, server_app = ClientApp(), ServerApp()
moments: list[float] = []
rounds, clients = int(sys.argv[-1]), int(sys.argv[-2])


@client_app.train()
def train(message: Message, context: Context) -> Message:
    vector = message.content.array_records["arrays"].to_numpy_ndarrays()[0]
    local = vector * np.float32(1 - RATE)
    examples = examples_of(int(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": examples})
    return Message(RecordDict({"arrays": ArrayRecord([local]), "metrics": metrics}), reply_to=message)


@server_app.main()
def main(grid: Grid, _: Context) -> None:
    moments.append(time.perf_counter())

    def note(*_: object) -> None:
        moments.append(time.perf_counter())

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.start(grid, ArrayRecord([np.ones(SIZE, np.float32)]), num_rounds=rounds, evaluate_fn=note)


if __name__ == "__main__":
    begun = time.perf_counter()
    backend: Any = {
        "client_resources": {"num_cpus": 1},
        "init_args": {"include_dashboard": False, "log_to_driver": False},
    }
    run_simulation(server_app, client_app, clients, backend_config=backend)
    _, _, first, *later = moments
    steps = [after - before for before, after in zip([first, *later], later)]
    print(json.dumps({"first_s": first - begun, "rounds_s": steps}))
