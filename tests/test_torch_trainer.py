"""The PyTorch trainer against a slow, obvious loop; determinism; errors that say who, where and why."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedge.client import models
from fedge.client.data import load
from fedge.client.torch_trainer import TorchTrainer
from fedge.core import random
from fedge.core.errors import DataError, ExperimentError, ModelError, TrainerError
from fedge.core.task import Broadcast, Task

SHARD = np.arange(50, 150)


@pytest.fixture(scope="module")
def fashion():
    whole = load("fashion-mnist")
    return SimpleNamespace(
        x_train=whole.x_train[:200], y_train=whole.y_train[:200], x_test=whole.x_test[:100], y_test=whole.y_test[:100]
    )


class Normed(nn.Module):
    """Batch norm (float buffers and a counter), dropout, a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(784, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(12, 10)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.frozen(self.first(x.flatten(1))))))


def own_optimizer(parameters, lr, momentum):
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def task(steps=7, **hyper):
    return Task("task-1", "ann", 3, steps, hyper=hyper)


def train(trainer, the_task=None, state=None, vector=None, out=None):
    vector = trainer.initial() if vector is None else vector
    vector.flags.writeable = False
    return trainer.train(the_task or task(), Broadcast(3, vector), SHARD, {} if state is None else state, out)


def reference(factory, data, steps, batch_size, make, seed=5):
    """What the trainer must come to, parameter by parameter; the losses; and the initial tensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.derive(seed, "model"))
        model = factory()
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.manual_seed(random.derive(seed, "ann", "task-1"))
        shuffle, order = random.generator(seed, "ann", "task-1"), []
        while len(order) < steps * batch_size:
            order += shuffle.permutation(SHARD).tolist()
        x = torch.tensor(data.x_train[:, None], dtype=torch.float32) / 255
        y = torch.tensor(data.y_train)
        optimizer, losses = make(model.parameters()), []
        model.train()
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model.state_dict(), losses, start


@pytest.mark.parametrize(
    ("factory", "settings", "make"),
    [
        (models.linear, {"lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
        (models.mlp, {"lr": 0.05, "momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
        (models.cnn, {"lr": 0.05}, lambda p: torch.optim.SGD(p, lr=0.05)),
        (models.mlp, {"kind": "adam", "lr": 0.001}, lambda p: torch.optim.Adam(p, lr=0.001)),
        (models.mlp, {"kind": "adamw", "lr": 0.001}, lambda p: torch.optim.AdamW(p, lr=0.001)),
        (models.mlp, {"kind": "rmsprop", "lr": 0.001}, lambda p: torch.optim.RMSprop(p, lr=0.001)),
        (Normed, {"lr": 0.1, "weight_decay": 0.01}, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01)),
        (
            Normed,
            {"kind": f"{__name__}:own_optimizer", "lr": 0.1, "momentum": 0.5},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
        ),
    ],
)
def test_training_is_that_of_the_obvious_loop(fashion, factory, settings, make):
    trainer = TorchTrainer(factory, fashion, batch_size=32, optimizer=settings, seed=5)
    base = trainer.initial()
    update = train(trainer, vector=base)
    tensors, losses, start = reference(factory, fashion, 7, 32, make)
    layout = trainer.layout
    for name, found in layout.unflatten(base - update.delta).items():
        np.testing.assert_allclose(found, tensors[name].numpy(), rtol=1e-4, atol=2e-6, err_msg=name)
    for name, found in layout.unflatten(base).items():
        assert np.array_equal(found, start[name].numpy()), name
    np.testing.assert_allclose(update.metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(update.metrics["loss_start"], losses[0], rtol=1e-6)
    assert (update.client, update.task_id, update.base_version, update.steps) == ("ann", "task-1", 3, 7)
    assert update.examples == len(SHARD)
    assert not update.timings


def test_plain_sgd_equals_the_obvious_loop_to_the_bit(fashion):
    trainer = TorchTrainer(models.mlp, fashion, batch_size=32, optimizer={"lr": 0.1}, seed=5)
    train(trainer)
    tensors, _, _ = reference(models.mlp, fashion, 7, 32, lambda p: torch.optim.SGD(p, lr=0.1))
    live = trainer.layout.unflatten(trainer._flat.array)
    assert all(np.array_equal(live[name], tensor.numpy()) for name, tensor in tensors.items())


def test_the_layout_puts_trained_parameters_first_and_leaves_counters_out(fashion):
    trainer = TorchTrainer(Normed, fashion)
    layout = trainer.layout
    trained = ["first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"]
    assert list(layout.names) == [*trained, "frozen.weight", "frozen.bias", "norm.running_mean", "norm.running_var"]
    assert layout.trainable == layout.offsets[len(trained)]
    assert set(layout.buffers) == {"norm.num_batches_tracked"}
    delta = layout.unflatten(train(trainer).delta)
    assert not delta["frozen.weight"].any()
    assert delta["norm.running_mean"].all()


def test_a_task_gives_the_same_bytes_whatever_came_before(fashion):
    one, other = (TorchTrainer(Normed, fashion, optimizer={"momentum": 0.9}, seed=2) for _ in range(2))
    other.train(Task("x", "bob", 0, 3), Broadcast(0, other.initial()), np.arange(40), {}, None)
    other.evaluate(other.initial())
    torch.rand(10)
    assert np.array_equal(train(one).delta, train(other).delta)
    renamed = one.train(dataclasses.replace(task(), id="task-2"), Broadcast(3, one.initial()), SHARD, {}, None)
    assert not np.array_equal(renamed.delta, train(one).delta)


def test_training_leaves_the_random_numbers_of_the_process_alone(fashion):
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    train(TorchTrainer(Normed, fashion))
    assert torch.equal(torch.rand(3), wanted)


def test_the_delta_is_written_where_asked_and_the_broadcast_stays(fashion):
    trainer = TorchTrainer(models.linear, fashion)
    vector, out = trainer.initial(), np.empty(trainer.layout.size, np.float32)
    update = train(trainer, vector=vector, out=out)
    assert update.delta is out
    assert out.any()
    assert np.array_equal(vector, trainer.initial())


def test_the_rate_of_a_task_overrides_the_setting(fashion):
    trainer = TorchTrainer(models.linear, fashion, optimizer={"lr": 0.1})
    slow = TorchTrainer(models.linear, fashion, optimizer={"lr": 0.01})
    assert np.array_equal(train(trainer, task(lr=0.01)).delta, train(slow).delta)
    for rate in ("fast", 0.0, -1.0, float("nan"), True):
        with pytest.raises(TrainerError, match=f"ann: lr is {rate!r}"):
            train(trainer, task(lr=rate))


def test_batches_cover_the_shard_once_before_any_example_comes_again(fashion):
    trainer = TorchTrainer(models.linear, fashion, batch_size=8)
    batches = trainer._batches(SHARD, "ann", "task-1")
    seen = np.concatenate([next(batches).numpy() for _ in range(25)])
    assert np.array_equal(np.sort(seen[:100]), SHARD)
    assert np.array_equal(np.sort(seen[100:]), SHARD)
    assert not np.array_equal(seen[:100], seen[100:])
    few = trainer._batches(np.arange(3), "ann", "task-1")
    assert all(sorted(next(few).tolist()) == [0, 1, 2] for _ in range(4))


def test_training_learns_and_evaluation_is_that_of_the_obvious_loop(fashion):
    trainer = TorchTrainer(models.linear, fashion, optimizer={"lr": 0.1})
    base = trainer.initial()
    after = base - train(trainer, task(60), vector=base).delta
    found = trainer.evaluate(after)
    tensors = trainer.layout.unflatten(after)
    logits = fashion.x_test.reshape(100, -1) / 255 @ tensors["1.weight"].T + tensors["1.bias"]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == fashion.y_test))
    assert found["loss"] == pytest.approx(-np.log(chances[range(100), fashion.y_test]).mean(), rel=1e-4)
    assert found["accuracy"] > trainer.evaluate(base)["accuracy"] + 0.3


def test_evaluation_uses_the_statistics_of_the_vector_and_no_dropout(fashion):
    trainer = TorchTrainer(Normed, fashion)
    vector = trainer.initial()
    assert trainer.evaluate(vector) == trainer.evaluate(vector)
    shifted = vector.copy()
    trainer.layout.unflatten(shifted)["norm.running_mean"][:] = 3.0
    assert trainer.evaluate(shifted)["loss"] != trainer.evaluate(vector)["loss"]


def test_counters_are_those_of_the_factory_at_each_task(fashion):
    trainer = TorchTrainer(Normed, fashion)
    for _ in range(2):
        train(trainer)
        assert int(trainer._flat.module.norm.num_batches_tracked) == 7


def test_regression_on_float_labels_with_a_loss_of_ones_own():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4))
    y = (x @ np.ones((4, 1))).astype(np.float32)
    data = SimpleNamespace(x_train=x, y_train=y, x_test=x, y_test=y)
    trainer = TorchTrainer(lambda: nn.Linear(4, 1), data, loss=functional.mse_loss, optimizer={"lr": 0.1})
    base = trainer.initial()
    update = trainer.train(task(80), Broadcast(0, base), np.arange(60), {}, None)
    assert set(trainer.evaluate(base)) == {"loss"}
    assert trainer.evaluate(base - update.delta)["loss"] < 1e-3


def test_colour_images_become_channels_first_in_the_unit_range():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
    data = SimpleNamespace(x_train=pixels, y_train=np.arange(5), x_test=pixels[:0], y_test=np.arange(0))
    trainer = TorchTrainer(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), data)
    x, y = trainer._train_set
    assert x.shape == (5, 3, 4, 3)
    np.testing.assert_array_equal(x.numpy()[2, 1, 3, 0], np.float32(pixels[2, 3, 0, 1]) / np.float32(255))
    assert y.dtype == torch.int64
    assert trainer.evaluate(trainer.initial()) == {}


@pytest.mark.parametrize("rate", [1e30, 1e5])
def test_a_local_loss_that_diverges_is_said_to(fashion, rate):
    trainer = TorchTrainer(models.mlp, fashion, optimizer={"lr": rate, "momentum": 0.99})
    with pytest.raises(TrainerError, match=r"^ann: the local loss diverged.*learning rate"):
        train(trainer, task(200 if rate < 1e10 else 5))


def test_a_model_with_fewer_outputs_than_there_are_classes_is_told(fashion):
    def three():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))

    trainer = TorchTrainer(three, fashion)
    with pytest.raises(ModelError, match="The model has 3 outputs and the data 10 classes"):
        trainer.evaluate(trainer.initial())
    with pytest.raises(ModelError, match="The model has 3 outputs and the data 10 classes"):
        train(trainer)
    own = TorchTrainer(three, fashion, loss=lambda output, labels: output.square().mean())
    assert "loss" in own.evaluate(own.initial())  # a loss of one's own may see in labels what it likes


def test_a_wrong_rate_is_one_sentence_with_one_full_stop(fashion):
    with pytest.raises(ExperimentError, match=r"lr is -1; it must be a number above 0\.$"):
        TorchTrainer(models.linear, fashion, optimizer={"lr": -1})


def test_errors_of_the_users_code_say_who_at_what_and_why(fashion):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(784, 10)

        def forward(self, x):
            raise KeyError("pixel")

    trainer = TorchTrainer(Broken, fashion)
    with pytest.raises(TrainerError, match=r"ann: training raised KeyError\('pixel'\)"):
        train(trainer)
    with pytest.raises(TrainerError, match="evaluation raised KeyError"):
        trainer.evaluate(trainer.initial())
    good = TorchTrainer(models.linear, fashion)
    with pytest.raises(TrainerError, match="ann: training raised IndexError"):
        good.train(task(), Broadcast(0, good.initial()), np.array([5000]), {}, None)
    with pytest.raises(TrainerError, match="the shard is empty"):
        good.train(task(), Broadcast(0, good.initial()), np.arange(0), {}, None)
    with pytest.raises(TrainerError, match="0 steps"):
        train(good, task(0))
    with pytest.raises(ModelError, match="same model code"):
        train(good, vector=np.zeros(3, np.float32))
    train(good)  # and goes on as if nothing had been


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: nn.Linear(784, 10).double(), "float"),
        (lambda: nn.Linear(784, 10).half(), "float"),
        (lambda: nn.Linear(784, 10).requires_grad_(False), "nothing to train"),
        (lambda: nn.LazyLinear(10), "no shape yet"),
        (lambda: "a model", "must return a torch.nn.Module"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_models_that_cannot_be_used_are_refused(fashion, factory, words):
    with pytest.raises(ModelError, match=words):
        TorchTrainer(factory, fashion)


def test_settings_and_data_that_cannot_be_used_are_refused(fashion):
    with pytest.raises(ExperimentError, match="did you mean 'adam'"):
        TorchTrainer(models.linear, fashion, optimizer={"kind": "adaam"})
    with pytest.raises(ExperimentError, match="nesterof"):
        TorchTrainer(models.linear, fashion, optimizer={"nesterof": True})
    with pytest.raises(ExperimentError, match="lr"):
        TorchTrainer(models.linear, fashion, optimizer={"lr": -1.0})
    with pytest.raises(ExperimentError, match="batch_size"):
        TorchTrainer(models.linear, fashion, batch_size=0)
    short = SimpleNamespace(**{**vars(fashion), "y_train": fashion.y_train[:10]})
    with pytest.raises(DataError, match="10 labels"):
        TorchTrainer(models.linear, short)
    words = SimpleNamespace(**{**vars(fashion), "x_train": np.array(["a"] * 200)})
    with pytest.raises(DataError, match="must be uint8 images"):
        train(TorchTrainer(models.linear, words))


@pytest.mark.parametrize(("factory", "size"), [(models.linear, 7_850), (models.mlp, 101_770), (models.cnn, 54_314)])
def test_models_have_the_sizes_they_say_and_start_where_the_seed_says(fashion, factory, size):
    one, other, third = (TorchTrainer(factory, fashion, seed=seed).initial() for seed in (1, 1, 2))
    assert one.shape == (size,)
    assert np.array_equal(one, other)
    assert not np.array_equal(one, third)
