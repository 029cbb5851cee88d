"""The work that every engine does in the simulation benchmark: a client whose training is one multiplication.

A client moves the 1 MiB model by a constant factor and claims 1 to 7 examples; a round is the mean of the moves
weighted by examples, taken from the model. Must never import an engine.
"""

import numpy as np

from fedge.client.trainer import ClientState, Shard
from fedge.core.params import Layout, Vector
from fedge.core.task import DELTA, Broadcast, Task, Update

SIZE = 1 << 18  # elements: 1 MiB of float32
RATE = 1e-3


def examples_of(client: int) -> int:
    """How many examples a client claims."""
    return client % 7 + 1


class Multiplier:
    """A fedge `Trainer`: delta = RATE * parameters."""

    def __init__(self) -> None:
        self.layout = Layout.of({"parameters": np.empty(SIZE, np.float32)})

    def initial(self) -> Vector:
        """Ones."""
        return np.ones(SIZE, np.float32)

    def train(self, task: Task, broadcast: Broadcast, shard: Shard, state: ClientState, out: Vector | None) -> Update:
        """One pass over the parameters, whatever the steps."""
        delta = np.multiply(broadcast.vector, np.float32(RATE), out=out)
        return Update(task.client, task.id, task.version, task.steps, len(shard), {DELTA: delta})

    def evaluate(self, vector: Vector) -> dict[str, float]:
        """Nothing to measure."""
        return {}


def bare_rounds(clients: int, rounds: int) -> Vector:
    """The same arithmetic as a plain loop with reused buffers: the floor. The parameters it ends with."""
    vector = np.ones(SIZE, np.float32)
    delta, scaled, total = (np.empty_like(vector) for _ in range(3))
    weights = [np.float32(examples_of(client)) for client in range(clients)]
    whole = np.float32(sum(weights))
    for _ in range(rounds):
        total.fill(0)
        for weight in weights:
            np.multiply(vector, np.float32(RATE), out=delta)
            np.multiply(delta, weight, out=scaled)
            np.add(total, scaled, out=total)
        np.divide(total, whole, out=total)
        np.subtract(vector, total, out=vector)
    return vector
