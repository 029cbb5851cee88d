"""What the simulation costs: per client and round beside a bare loop, pfl and Flower; per local step beside PyTorch.

Part one gives every engine the trivial client of `trivial.py`, so that what is left is overhead. fedge, the bare loop
and pfl run in turns in this process, Flower in one of its own, since it starts Ray. Part two trains the same network
with `TorchTrainer` and with a plain PyTorch loop, in turns.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before NumPy loads: every engine computes on one thread

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.harness import MISSING, Goal, arguments, emit, goal, in_turns, installed, ratio
from benchmarks.trivial import Multiplier, bare_rounds, examples_of
from fedge.client.data import load
from fedge.client.models import cnn, mlp
from fedge.client.torch_trainer import TorchTrainer
from fedge.core.params import Vector
from fedge.core.task import Broadcast, Task
from fedge.server.machine import Federation, Stop
from fedge.simulation import SPEEDS, Simulation
from fedge.strategies import aggregators
from fedge.strategies.optimizers import OPTIMIZERS
from fedge.strategies.schedulers import SCHEDULERS
from fedge.strategies.weighers import STALENESS, WEIGHERS

BATCH, LEARNING_RATE = 32, 0.1


@dataclass(frozen=True)
class Plan:
    """How much to run. `client_rounds` bounds one turn of an engine, which has at least `least_rounds`."""

    clients: tuple[int, ...]
    client_rounds: int
    least_rounds: int
    repeats: int
    flower_rounds: int
    steps: int
    local_repeats: int

    def rounds(self, clients: int) -> int:
        """Rounds of one turn."""
        return max(self.least_rounds, self.client_rounds // clients)


FULL = Plan((10, 100, 1000), 5000, 3, 7, 5, 200, 21)
QUICK = Plan((100,), 500, 3, 3, 2, 40, 5)


# ---- part one: overhead ------------------------------------------------------------------------


def fedge_rounds(clients: int, rounds: int) -> Vector:
    """Synchronous rounds in virtual time; the parameters it ends with."""
    trainer = Multiplier()
    federation = Federation(
        layout=trainer.layout,
        scheduler=SCHEDULERS.build({"kind": "fedavg", "steps": 1}),
        share=WEIGHERS.build({"kind": "examples"}),
        staleness=STALENESS.build({"kind": "constant"}),
        aggregator=aggregators.build({"kind": "mean"}),
        optimizer=OPTIMIZERS.build({"kind": "sgd"}),
        expected=clients,
        stop=Stop(versions=rounds),
    )
    shards = [np.arange(examples_of(client)) for client in range(clients)]
    speeds = SPEEDS.build({"kind": "homogeneous"})
    return Simulation(federation, trainer, shards, speeds, jitter=0.0).run().vector


def overhead(plan: Plan) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Microseconds per client-round of every engine."""
    rows: list[dict[str, Any]] = []
    over_bare, over_pfl, over_flower = [], [], None
    for clients in plan.clients:
        rounds = plan.rounds(clients)
        works: dict[str, Callable[[], object]] = {
            "fedge": partial(fedge_rounds, clients, rounds),
            "bare NumPy loop": partial(bare_rounds, clients, rounds),
        }
        if installed("pfl") != MISSING:
            from benchmarks.pfl_rounds import rounds as pfl_rounds

            works["pfl"] = partial(pfl_rounds, clients, rounds)
        for work in works.values():
            work()  # once for the caches
        taken = in_turns(works, plan.repeats)
        over_bare.append(ratio(taken["fedge"], taken["bare NumPy loop"]))
        if "pfl" in taken:
            over_pfl.append(ratio(taken["pfl"], taken["fedge"]))
        for name in ("fedge", "bare NumPy loop", "pfl"):
            each = median(taken[name]) / (clients * rounds) if name in taken else None
            rows.append(row(name, clients, each, over_fedge=ratio(taken[name], taken["fedge"]) if each else None))
        fedge_s = median(taken["fedge"]) / rounds
        rows.append(flower_row(clients, plan.flower_rounds, fedge_s))
        if clients == 100:
            over_flower = rows[-1]["times_fedge"]
    return rows, [
        goal("overhead over a bare loop, worst of the fleets", max(over_bare), "<= 2"),
        goal("times faster than pfl, worst of the fleets", min(over_pfl, default=None), "> 1"),
        goal("times faster than Flower at 100 clients", over_flower, ">= 20"),
    ]


def row(engine: str, clients: int, each_s: float | None, over_fedge: float | None, note: str = "") -> dict[str, Any]:
    """One line; without a time the engine is missing."""
    return {
        "part": "overhead",
        "engine": engine,
        "clients": clients,
        "us_per_client_round": round(each_s * 1e6, 1) if each_s else None,
        "times_fedge": round(over_fedge, 2) if over_fedge else None,
        "note": note if each_s else MISSING,
    }


def flower_row(clients: int, rounds: int, fedge_s: float) -> dict[str, Any]:
    """Flower's steady rounds, beside the seconds that one of fedge's took."""
    if MISSING in (installed("flwr"), installed("ray")):
        return row("Flower", clients, None, None)
    command = [sys.executable, "-m", "benchmarks.flower_rounds", str(clients), str(1 + rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise SystemExit(f"Flower's simulation failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    steady_s = median(result["rounds_s"])
    note = f"besides, {result['first_s']:.1f} s for the first round with the start of Ray"
    return row("Flower", clients, steady_s / clients, steady_s / fedge_s, note)


# ---- part two: local training ------------------------------------------------------------------


def local_training(plan: Plan) -> tuple[list[dict[str, Any]], list[Goal]]:
    """The same steps of SGD on the same networks by `TorchTrainer` and by a plain loop."""
    dataset = load("fashion-mnist")
    shard = np.arange(len(dataset.y_train), dtype=np.int64)
    rows, slower = [], []
    for model in (mlp, cnn):
        trainer = TorchTrainer(model, dataset, batch_size=BATCH, optimizer={"lr": LEARNING_RATE}, threads=1)
        start, task = Broadcast(0, trainer.initial()), Task("t", "client", 0, plan.steps)
        works: dict[str, Callable[[], object]] = {
            "TorchTrainer": partial(trainer.train, task, start, shard, {}, None),
            "bare PyTorch loop": partial(bare_training, model(), *tensors(dataset), plan.steps),
        }
        for work in works.values():
            work()  # once for the caches
        taken = in_turns(works, plan.local_repeats)
        slower.append(ratio(taken["TorchTrainer"], taken["bare PyTorch loop"]))
        for name, seconds in taken.items():
            each_us = round(median(seconds) / plan.steps * 1e6, 1)
            times = round(ratio(seconds, taken["TorchTrainer"]), 3)
            note = f"{model.__name__}, batches of {BATCH}"
            rows.append({"part": "local", "engine": name, "us_per_step": each_us, "times_fedge": times, "note": note})
    return rows, [goal("TorchTrainer over a bare PyTorch loop, worst of the models", max(slower), "<= 1.03")]


def tensors(dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [n, 1, 28, 28] in 0..1 and labels [n]."""
    x = torch.from_numpy(dataset.x_train[:, None].astype(np.float32) / 255)
    return x, torch.from_numpy(dataset.y_train.astype(np.int64))


def bare_training(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> float:
    """Shuffled batches, cross entropy, SGD, and the mean loss: what anybody would write."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    order, total = torch.randperm(len(x)), torch.zeros(())
    model.train()
    for step in range(steps):
        rows = order[step * BATCH : (step + 1) * BATCH]
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        total += loss.detach()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(total) / steps


def main() -> None:
    options = arguments(str(__doc__).splitlines()[0])
    plan = QUICK if options.quick else FULL
    rows, goals = overhead(plan)
    more, another = local_training(plan)
    emit("simulation", [*rows, *more], [*goals, *another], as_json=options.json)


if __name__ == "__main__":
    main()
