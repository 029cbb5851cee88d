"""A small perceptron in NumPy: real local SGD on real images at a tenth of a millisecond per step.

What the scheduler benchmark trains, so that hundreds of whole federations fit in minutes. The network is
784 - hidden - 10 with ReLU and softmax; a test holds its gradient to PyTorch's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.client.trainer import ClientState, Shard
from fedge.core.errors import TrainerError
from fedge.core.params import Layout, Vector
from fedge.core.random import generator
from fedge.core.task import DELTA, Broadcast, Task, Update

Images = NDArray[np.float32]


class Perceptron:
    """A `Trainer` (see fedge.client.trainer) over images or features [n, ...] and labels [n]."""

    def __init__(self, dataset: Any, hidden: int = 64, batch_size: int = 32, rate: float = 0.1, seed: int = 0) -> None:
        self._x, self._xt = (scaled(images) for images in (dataset.x_train, dataset.x_test))
        self._y, self._yt = dataset.y_train.astype(np.int64), dataset.y_test.astype(np.int64)
        self._batch, self._rate, self._seed = batch_size, np.float32(rate), seed
        classes = int(max(self._y.max(), self._yt.max())) + 1
        shapes = {"w1": (self._x.shape[1], hidden), "b1": (hidden,), "w2": (hidden, classes), "b2": (classes,)}
        self.layout = Layout.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        self._local = np.zeros(self.layout.size, np.float32)
        self._view = self.layout.unflatten(self._local)

    def initial(self) -> Vector:
        """He initialisation from the seed."""
        random, vector = generator(self._seed, "model"), np.zeros(self.layout.size, np.float32)
        for name, part in self.layout.unflatten(vector).items():
            if name.startswith("w"):
                part[:] = random.normal(0, np.sqrt(2 / part.shape[0]), part.shape)
        return vector

    def train(self, task: Task, broadcast: Broadcast, shard: Shard, state: ClientState, out: Vector | None) -> Update:
        """`task.steps` steps of SGD on shuffled batches of the shard."""
        self._local[:] = broadcast.vector
        order = batches(shard, self._batch, task.steps, generator(self._seed, task.client, task.id))
        losses = [self._step(self._x[rows], self._y[rows]) for rows in order]
        if not np.isfinite(losses[-1]):
            raise TrainerError(f"{task.client}: the local loss diverged; lower the learning rate.")
        delta = np.subtract(broadcast.vector, self._local, out=out)
        metrics = {"loss": float(np.mean(losses)), "loss_start": float(losses[0])}
        return Update(task.client, task.id, task.version, task.steps, len(shard), {DELTA: delta}, metrics=metrics)

    def evaluate(self, vector: Vector) -> Mapping[str, float]:
        """Accuracy and mean loss on the test images."""
        part = self.layout.unflatten(vector)
        hidden = np.maximum(self._xt @ part["w1"] + part["b1"], 0)
        logits = hidden @ part["w2"] + part["b2"]
        logits -= logits.max(1, keepdims=True)
        chosen = logits[np.arange(len(self._yt)), self._yt]
        loss = float(np.mean(np.log(np.exp(logits).sum(1)) - chosen))
        return {"accuracy": float(np.mean(logits.argmax(1) == self._yt)), "loss": loss}

    def _step(self, x: Images, y: NDArray[np.int64]) -> float:
        part, rate, rows = self._view, self._rate / len(y), np.arange(len(y))
        hidden = x @ part["w1"]
        hidden += part["b1"]
        np.maximum(hidden, 0, out=hidden)
        logits = hidden @ part["w2"] + part["b2"]
        logits -= logits.max(1, keepdims=True)
        odds = np.exp(logits)
        odds /= odds.sum(1, keepdims=True)
        loss = -float(np.log(odds[rows, y] + 1e-12).mean())
        odds[rows, y] -= 1
        back = odds @ part["w2"].T
        back *= hidden > 0
        part["w2"] -= rate * (hidden.T @ odds)
        part["b2"] -= rate * odds.sum(0)
        part["w1"] -= rate * (x.T @ back)
        part["b1"] -= rate * back.sum(0)
        return loss


def scaled(images: NDArray[Any]) -> Images:
    """[n, features]: bytes in 0..1, floats as they are."""
    flat = np.asarray(images, np.float32).reshape(len(images), -1)
    return flat / 255 if images.dtype == np.uint8 else flat


def batches(shard: Shard, size: int, steps: int, random: np.random.Generator) -> list[Shard]:
    """`steps` batches out of shuffled epochs of the shard."""
    epochs = -(-steps * size // len(shard))
    order = np.concatenate([random.permutation(shard) for _ in range(epochs)])
    return [order[step * size : (step + 1) * size] for step in range(steps)]
