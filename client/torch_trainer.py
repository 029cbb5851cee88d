"""The trainer for PyTorch modules: one resident model per process, its parameters one flat vector.

The model lies flat (see flat_model.py), so loading a version is one copy, a delta one subtraction, a hook one vector
operation, and an optimizer step one kernel instead of one per layer.

Owns the data as tensors, the local loop, and the order of batches, which follows from (seed, client, task): the same
task gives the same bytes in any process with as many threads. Must never keep anything of a client between tasks (that
is `state`) or measure time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedge.client.flat_model import FlatModel
from fedge.client.trainer import ClientState, Shard
from fedge.core import random
from fedge.core.errors import DataError, ExperimentError, FedgeError, ModelError, TrainerError
from fedge.core.params import Array, Vector
from fedge.core.registry import load, nearest
from fedge.core.task import DELTA, Broadcast, Task, Update
from fedge.strategies.contracts import ClientHook

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Adjust = Callable[["TorchWork"], None]

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
_EVALUATION_BATCH = 1000


class Examples(Protocol):
    """What a trainer needs of a data set. Images are uint8 [n, h, w] or [n, h, w, c]; float arrays stay as they are."""

    @property
    def x_train(self) -> Array:
        """Inputs to train on, [n, ...]."""

    @property
    def y_train(self) -> Array:
        """Their labels: whole numbers [n] for classes, or floats."""

    @property
    def x_test(self) -> Array:
        """Inputs to evaluate on; may be empty."""

    @property
    def y_test(self) -> Array:
        """Their labels."""


@dataclass(slots=True)
class TorchWork:
    """A task in progress, as hooks see it (the contract is Work in fedge.strategies.contracts)."""

    task: Task
    broadcast: Broadcast
    start: torch.Tensor
    params: torch.Tensor
    grad: torch.Tensor
    rate: float
    descend: Callable[[torch.Tensor, int, Adjust], torch.Tensor]
    scratch: dict[str, Any] = field(default_factory=dict)


class TorchTrainer:
    """Trains `factory()` on shards of `dataset`.

    `optimizer` is {"kind": one of OPTIMIZERS or "package.module:factory", "lr": ..., **settings}; a factory of one's
    own is called with the list of the model's parameters and the settings. Each task gets a fresh one; a task's
    `hyper["lr"]` overrides the rate. `loss(output, labels)` returns a scalar. `threads` is set for the whole process:
    more threads change the order of sums, and so the last bits.

    Raises ModelError, DataError or ExperimentError where the parts do not go together.
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        dataset: Examples,
        *,
        batch_size: int = 32,
        optimizer: Mapping[str, Any] | None = None,
        hooks: Sequence[ClientHook] = (),
        loss: Loss = functional.cross_entropy,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        if batch_size < 1 or threads < 1:
            raise ExperimentError("client: batch_size and threads must be at least 1.")
        torch.set_num_threads(threads)
        self._flat = FlatModel(factory, seed)
        self.layout = self._flat.layout
        self._initial: Vector = self._flat.array.copy()
        for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)):
            if len(x) != len(y):
                raise DataError(f"The data set has {len(x)} inputs but {len(y)} labels; mend the files.")
        self._dataset = dataset
        self._batch_size, self._hooks, self._loss, self._seed = batch_size, tuple(hooks), loss, seed
        # What a local optimizer moves: the whole vector at once, in the model's own memory.
        whole = nn.Parameter(self._flat.params)
        whole.grad = self._flat.grad
        self._optimizer = _local_optimizer(optimizer or {}, whole, self._flat.module)

    def initial(self) -> Vector:
        """The parameters as the factory made them under the seed; a copy."""
        return self._initial.copy()

    def train(self, task: Task, broadcast: Broadcast, shard: Shard, state: ClientState, out: Vector | None) -> Update:
        """`task.steps` steps on shuffled batches of the shard, epoch after epoch.

        Metrics are "loss", the mean over steps, and "loss_start", that of the first batch, both without hooks' terms.
        Raises TrainerError where the data, the model, the loss or a hook raises, or the loss is not finite.
        """
        if not len(shard):
            raise TrainerError(f"{task.client}: the shard is empty; give this client data or leave it out.")
        if task.steps < 1:
            raise TrainerError(f"{task.client}: task {task.id} has {task.steps} steps; it needs at least 1.")
        with torch.random.fork_rng(devices=[]), _blame(task.client, "training"):
            torch.default_generator.manual_seed(random.derive(self._seed, task.client, task.id))
            self._flat.load(broadcast.vector)
            losses, blobs = self._run(task, broadcast, shard, state)
        delta = np.subtract(broadcast.vector, self._flat.array, out=out)
        return Update(
            task.client, task.id, task.version, task.steps, len(shard), {**blobs, DELTA: delta}, metrics=losses
        )

    def evaluate(self, vector: Vector) -> Mapping[str, float]:
        """Mean loss on the test set, and the accuracy where labels are classes; empty without a test set."""
        x, y = self._test_set
        if not len(x):
            return {}
        self._flat.load(vector)
        model, loss, hits = self._flat.module.eval(), 0.0, 0.0
        classes = not y.is_floating_point()
        with torch.no_grad(), _blame("the coordinator", "evaluation"):
            for start in range(0, len(x), _EVALUATION_BATCH):
                labels = y[start : start + _EVALUATION_BATCH]
                output = model(x[start : start + _EVALUATION_BATCH])
                self._check_outputs(output)
                loss += float(self._loss(output, labels)) * len(labels)
                hits += float((output.argmax(1) == labels).float().mean()) * len(labels) if classes else 0.0
        metrics = {"loss": loss / len(x)}
        return {"accuracy": hits / len(x), **metrics} if classes else metrics

    @cached_property
    def _classes(self) -> int:
        """How many classes the labels tell of; 0 where they are no classes, or the loss is one's own."""
        known = [y for y in (self._dataset.y_train, self._dataset.y_test) if y.dtype.kind in "iu" and len(y)]
        return int(max((y.max() for y in known), default=-1)) + 1 if self._loss is functional.cross_entropy else 0

    def _check_outputs(self, output: torch.Tensor) -> None:
        if output.ndim == 2 and output.shape[1] < self._classes:
            raise ModelError(
                f"The model has {output.shape[1]} outputs and the data {self._classes} classes; "
                "let the factory make one output per class."
            )

    @cached_property
    def _train_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _inputs(self._dataset.x_train), _labels(self._dataset.y_train)

    @cached_property
    def _test_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _inputs(self._dataset.x_test), _labels(self._dataset.y_test)

    def _run(
        self, task: Task, broadcast: Broadcast, shard: Shard, state: ClientState
    ) -> tuple[dict[str, float], dict[str, Array]]:
        """Train the loaded model in place; the losses and the hooks' blobs."""
        optimizer = self._optimizer(task)
        batches = self._batches(shard, task.client, task.id)
        if not self._hooks:
            return self._steps(task.client, task.steps, batches, optimizer), {}
        flat, rate = self._flat, float(optimizer.param_groups[0]["lr"])

        def descend(vector: torch.Tensor, steps: int, adjust: Adjust) -> torch.Tensor:
            return self._apart(work, shard, vector, steps, adjust)

        work = TorchWork(task, broadcast, flat.params.clone(), flat.params, flat.grad, rate, descend)
        mine = [(hook, type(hook).__name__.lower()) for hook in self._hooks]
        for hook, name in mine:
            with _blame(task.client, f"beginning hook {name}"):
                hook.begin(work, state.setdefault(name, {}))
        penalties = [partial(hook.penalty, work) for hook in self._hooks]
        adjusts = [partial(hook.adjust, work) for hook in self._hooks]
        losses = self._steps(task.client, task.steps, batches, optimizer, penalties, adjusts)
        blobs: dict[str, Array] = {}
        for hook, name in mine:
            with _blame(task.client, f"finishing hook {name}"):
                blobs.update(hook.finish(work, state[name]))
        return losses, blobs

    def _steps(
        self,
        client: str,
        steps: int,
        batches: Iterator[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        penalties: Sequence[Callable[..., Any]] = (),
        adjusts: Sequence[Callable[[], None]] = (),
    ) -> dict[str, float]:
        """The local loop. Raises TrainerError where it diverged, before any hook stores what came of it."""
        (x, y), flat, total = self._train_set, self._flat, torch.zeros(())
        model, first = flat.module.train(), total
        for step, indices in zip(range(steps), batches):
            batch = x.index_select(0, indices), y.index_select(0, indices)
            output = model(batch[0])
            if step == 0:
                self._check_outputs(output)
            loss = self._loss(output, batch[1])
            total += loss.detach()
            if step == 0:
                first = total.clone()
            for penalty in penalties:
                term = penalty(model, batch, output)
                loss = loss if term is None else loss + term
            flat.grad.zero_()
            torch.autograd.backward(loss)
            for adjust in adjusts:
                adjust()
            optimizer.step()
        mean = float(total) / steps
        if not isfinite(mean) or not isfinite(float(flat.params.dot(flat.params))):
            raise TrainerError(f"{client}: the local loss diverged (mean {mean:.4g}); lower the learning rate.")
        return {"loss": mean, "loss_start": float(first)}

    def _apart(self, work: TorchWork, shard: Shard, vector: torch.Tensor, steps: int, adjust: Adjust) -> torch.Tensor:
        """Train other parameters in the resident model, and put everything back."""
        task, flat = work.task, self._flat
        kept = flat.vector.clone()
        flat.params.copy_(vector)
        batches = self._batches(shard, task.client, task.id, "apart")
        self._steps(task.client, steps, batches, self._optimizer(task), adjusts=[partial(adjust, work)])
        result = flat.params.clone()
        flat.vector.copy_(kept)
        return result

    def _batches(self, shard: Shard, *purpose: str) -> Iterator[torch.Tensor]:
        """Indices [batch], without end: permutations of the shard, one behind the other, so that no batch is short."""
        shuffle = random.generator(self._seed, *purpose)
        size, pool = min(self._batch_size, len(shard)), np.empty(0, np.int64)
        while True:
            while len(pool) < size:
                pool = np.concatenate([pool, shuffle.permutation(np.asarray(shard, np.int64))])
            yield torch.from_numpy(pool[:size])
            pool = pool[size:]


@contextmanager
def _blame(who: str, stage: str) -> Iterator[None]:
    """A plug-in boundary: whatever the user's model, data or hook raises goes on with who, at what, and why."""
    try:
        yield
    except FedgeError:
        raise
    except Exception as error:
        raise TrainerError(f"{who}: {stage} raised {error!r}; mend the model, the data or the hook.") from error


def _local_optimizer(
    given: Mapping[str, Any], whole: nn.Parameter, module: nn.Module
) -> Callable[[Task], torch.optim.Optimizer]:
    """A function that makes a task's fresh optimizer. Raises ExperimentError where the settings do not fit."""
    settings = {"kind": "sgd", "lr": 0.1, **given}
    kind = str(settings.pop("kind"))
    if kind not in OPTIMIZERS and ":" not in kind:
        raise ExperimentError(f"client.optimizer: no kind {kind!r}; {nearest(kind, OPTIMIZERS)}")
    own = kind not in OPTIMIZERS
    make = load(kind, "client.optimizer") if own else OPTIMIZERS[kind]

    def fresh(task: Task) -> torch.optim.Optimizer:
        rate = task.hyper.get("lr", settings["lr"])
        if isinstance(rate, bool | str) or not 0 < rate < float("inf"):
            raise TrainerError(f"{task.client}: lr is {rate!r}; it must be a number above 0.")
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad] if own else [whole]
        optimizer: torch.optim.Optimizer = make(parameters, **{**settings, "lr": float(rate)})
        return optimizer

    try:
        fresh(Task("", "every client", 0, 1))
    except (TypeError, ValueError, TrainerError) as error:
        raise ExperimentError(f"client.optimizer ({kind}): {str(error).rstrip('.')}.") from error
    return fresh


def _tensor(array: Array) -> torch.Tensor:
    """The same memory where torch may share it."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _inputs(array: Array) -> torch.Tensor:
    """Images uint8 [n, h, w(, c)] as float32 [n, c, h, w] in [0, 1]; floats as float32; whole numbers as int64."""
    if array.dtype == np.uint8:
        if array.ndim == 3:
            array = array[:, None]
        elif array.ndim == 4:
            array = np.ascontiguousarray(np.moveaxis(array, 3, 1))
        return torch.from_numpy(np.divide(array, 255.0, dtype=np.float32))
    if array.dtype.kind == "f":
        return _tensor(np.ascontiguousarray(array, np.float32))
    if array.dtype.kind in "iu":
        return _tensor(np.ascontiguousarray(array, np.int64))
    raise DataError(f"The inputs are {array.dtype}; they must be uint8 images, floats or whole numbers.")


def _labels(array: Array) -> torch.Tensor:
    """Classes as int64, anything else as float32."""
    return _tensor(np.ascontiguousarray(array, np.int64 if array.dtype.kind in "iu" else np.float32))
