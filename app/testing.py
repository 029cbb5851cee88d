"""Clients that misbehave, to test a coordinator of your own with: `fedge.testing.hostile` around any trainer.

    from fedge.client.runtime import run_client
    from fedge.testing import hostile

    def test_a_client_that_sends_nan_is_shut_out(address, trainer, shard):
        with pytest.raises(fedge.FedgeError, match="shut out"):
            run_client(address, "client-7", hostile(trainer, "nan"), shard)

A client on a real line sees nobody else's update, and so does its attack here: what needs the honest updates or the
rule gets the client's own alone. For more, see [simulation] attack. Must never be imported by fedge itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedge.client.trainer import ClientState, Shard, Trainer
from fedge.core.errors import ExperimentError
from fedge.core.params import Vector
from fedge.core.random import derive
from fedge.core.task import DELTA, Broadcast, Task, Update
from fedge.strategies import attacks
from fedge.strategies.attacks.scene import Scene, misled

__all__ = ["Hostile", "hostile"]


def hostile(
    trainer: Trainer, attack: str | Mapping[str, Any] | attacks.Attack, *, clients: int = 10, seed: int = 0
) -> "Hostile":
    """`trainer`, but its updates are forged and lied about.

    `attack` is a kind ("sign-flip", "nan", "lying", ...), a table as in an experiment file
    ({"kind": "lying", "examples": 5}), or an object with forge(). `clients` is N, of which this one is hostile.
    Raises ExperimentError for an attack that does not exist, or that acts on data.
    """
    made = attacks.build({"kind": attack}) if isinstance(attack, str) else attack
    made = attacks.build(made) if isinstance(made, Mapping) else made
    if isinstance(made, attacks.Poisons):
        raise ExperimentError(
            f"{type(made).__name__} poisons examples, which a trainer keeps to itself; give the trainer what its "
            "poison() returns, or use [simulation] attack."
        )
    return Hostile(trainer, made, clients, seed)


class Hostile:
    """A trainer (fedge.client.trainer.Trainer) that is true to another one but for what it sends."""

    def __init__(self, trainer: Trainer, attack: Any, clients: int, seed: int) -> None:
        self._trainer, self._attack, self._clients, self._seed = trainer, attack, clients, seed
        self._first: dict[str, Vector] = {}  # by client
        self.layout = trainer.layout
        self.initial, self.evaluate = trainer.initial, trainer.evaluate

    def train(self, task: Task, broadcast: Broadcast, shard: Shard, state: ClientState, out: Vector | None) -> Update:
        """What the client sends in place of its update. Raises as the trainer does; StrategyError for the attack."""
        true = self._trainer.train(task, broadcast, shard, state, None)
        own, past = true.delta, self._first.get(task.client)
        seed = derive(self._seed, "attack", task.version)
        scene = Scene(
            own, [own], 1, self._clients, None, () if past is None else (past,), own, seed, client=task.client
        )
        sent = misled(self._attack, scene, true)
        self._first.setdefault(task.client, own)
        if out is not None:
            np.copyto(out, sent.blobs[DELTA])
            sent = dataclasses.replace(sent, blobs={**sent.blobs, DELTA: out})
        return sent
