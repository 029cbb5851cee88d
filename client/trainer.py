"""The contract of a trainer, and the one for plain NumPy functions (mocks, tests, custom maths).

A trainer is one resident model per process that trains for any client whose shard it is given. Must never know where
tasks come from.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import FedgeError, TrainerError
from fedge.core.params import Array, Layout, Vector
from fedge.core.task import DELTA, Broadcast, Task, Update

Shard = NDArray[np.int64]  # indices into the training set
ClientState = dict[str, dict[str, Array]]  # by plug-in name; outlives tasks, rounds and restarts


class Trainer(Protocol):
    """Local training and evaluation of one model."""

    layout: Layout

    def initial(self) -> Vector:
        """The parameters every federation with this model starts from, float32 [d]."""

    def train(self, task: Task, broadcast: Broadcast, shard: Shard, state: ClientState, out: Vector | None) -> Update:
        """Do the task on the shard; the delta is written to `out` where given. Raises TrainerError."""

    def evaluate(self, vector: Vector) -> Mapping[str, float]:
        """{"accuracy": in [0, 1], "loss": mean} on the test set; empty where there is none."""


def train(
    trainer: Trainer, task: Task, broadcast: Broadcast, shard: Shard, state: ClientState, out: Vector | None = None
) -> Update:
    """`trainer.train`, held to its contract whoever wrote it. Raises TrainerError for all else that comes out of it."""
    try:
        update: object = trainer.train(task, broadcast, shard, state, out)
    except FedgeError:
        raise
    except Exception as error:  # a plug-in boundary: whatever the user's code raises goes on with who and where
        raise TrainerError(f"{task.client}: the trainer raised {error!r} in task {task.id}.") from error
    if not isinstance(update, Update):
        raise TrainerError(f"{task.client}: the trainer returned {type(update).__name__}, not an Update.")
    if update.task_id != task.id or update.client != task.client:
        raise TrainerError(f"{task.client}: the trainer returned an update for task {update.task_id}, not {task.id}.")
    delta = update.blobs.get(DELTA)
    if not isinstance(delta, np.ndarray) or delta.shape != broadcast.vector.shape or delta.dtype != np.float32:
        found = f"{delta.dtype} {delta.shape}" if isinstance(delta, np.ndarray) else type(delta).__name__
        raise TrainerError(f"{task.client}: the delta should be float32 {broadcast.vector.shape} but is {found}.")
    return update


class FunctionTrainer:
    """A trainer out of a function `(parameters [d], task, shard) -> local parameters [d]`.

        trainer = FunctionTrainer(np.zeros(10), lambda w, task, shard: w + 1.0)

    `examples` in the update is the length of the shard. `evaluate` is optional: parameters -> metrics.
    """

    def __init__(
        self,
        initial: Array,
        step: Callable[[Vector, Task, Shard], Array],
        evaluate: Callable[[Vector], Mapping[str, float]] | None = None,
    ) -> None:
        self._initial = np.array(initial, np.float32).reshape(-1)
        self._step = step
        self._evaluate = evaluate
        self.layout = Layout.of({"parameters": self._initial})

    def initial(self) -> Vector:
        """A copy of the vector given."""
        return self._initial.copy()

    def train(self, task: Task, broadcast: Broadcast, shard: Shard, state: ClientState, out: Vector | None) -> Update:
        """Call the function. Raises TrainerError where it raises or returns no vector [d]."""
        try:
            local: Any = np.asarray(self._step(broadcast.vector, task, shard), np.float32)
        except Exception as error:  # a plug-in boundary: whatever the user's code raises goes on with who and where
            raise TrainerError(f"{task.client}: the training function raised {error!r} in task {task.id}.") from error
        if local.shape != broadcast.vector.shape:
            raise TrainerError(
                f"{task.client}: the training function returned {local.shape}, not {broadcast.vector.shape}."
            )
        delta = np.subtract(broadcast.vector, local, out=out)
        return Update(task.client, task.id, task.version, task.steps, max(1, len(shard)), {DELTA: delta})

    def evaluate(self, vector: Vector) -> Mapping[str, float]:
        """The metrics of the function given, or none."""
        return self._evaluate(vector) if self._evaluate else {}
