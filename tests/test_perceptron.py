"""The perceptron of the scheduler benchmark is what it says: PyTorch's gradient, and learning on the shipped images."""

import numpy as np
import pytest
import torch

from benchmarks.perceptron import Perceptron
from fedge.client.data import load
from fedge.core.errors import TrainerError
from fedge.core.task import Broadcast, Task


@pytest.fixture(scope="module")
def images():
    return load("fashion-mnist")


def test_one_step_is_pytorchs(images):
    shard = np.arange(32)
    trainer = Perceptron(images, hidden=8, batch_size=32, rate=0.5, seed=1)
    start = trainer.initial()
    update = trainer.train(Task("t", "c", 0, 1), Broadcast(0, start), shard, {}, None)
    part = {name: torch.tensor(view, requires_grad=True) for name, view in trainer.layout.unflatten(start).items()}
    x = torch.tensor(images.x_train[shard].reshape(32, -1) / np.float32(255))
    logits = torch.relu(x @ part["w1"] + part["b1"]) @ part["w2"] + part["b2"]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(images.y_train[shard].astype(np.int64)))
    loss.backward()
    for name, moved in trainer.layout.unflatten(update.delta).items():
        np.testing.assert_allclose(moved, 0.5 * part[name].grad.numpy(), rtol=1e-3, atol=1e-6)
    assert update.metrics["loss_start"] == pytest.approx(loss.item(), rel=1e-4)


def test_it_learns_and_its_figures_are_those_of_its_predictions(images):
    trainer = Perceptron(images, seed=2)
    start = trainer.initial()
    update = trainer.train(Task("t", "c", 0, 300), Broadcast(0, start), np.arange(8000), {}, None)
    before, after = trainer.evaluate(start), trainer.evaluate(start - update.delta)
    assert before["accuracy"] < 0.3
    assert after["accuracy"] > 0.7
    assert after["loss"] < before["loss"]


def test_a_rate_that_is_too_high_is_said(images):
    trainer = Perceptron(images, rate=1e30)
    with np.errstate(all="ignore"), pytest.raises(TrainerError, match="diverged"):
        trainer.train(Task("t", "c", 0, 50), Broadcast(0, trainer.initial()), np.arange(500), {}, None)
