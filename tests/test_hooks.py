"""Client hooks against their papers' loops on least squares, where every gradient can be written down."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedge.client import models
from fedge.client.data import load
from fedge.client.torch_trainer import TorchTrainer
from fedge.core import state as plain
from fedge.core.errors import ExperimentError, ModelError, TrainerError
from fedge.core.task import Broadcast, Task
from fedge.strategies.contracts import Arrival, Group
from fedge.strategies.hooks import HOOKS
from fedge.strategies.hooks.moon import representation
from fedge.strategies.optimizers import OPTIMIZERS

RATE, STEPS, SIZE = 0.05, 12, 3
KINDS = sorted(HOOKS.entries)


def least_squares(seed=0, rows=40):
    """Two clients whose data disagree on the answer: client k owns rows k * rows to (k + 1) * rows."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * rows, SIZE)) * np.repeat([[2.0, 0.5, 1.0], [0.5, 2.0, 1.0]], rows, axis=0)
    answers = np.repeat([[1.0, -2.0, 0.5], [-1.0, 1.0, 3.0]], rows, axis=0)
    y = (x * answers).sum(1, keepdims=True)
    return SimpleNamespace(x_train=x.astype(np.float32), y_train=y.astype(np.float32), x_test=x[:0], y_test=y[:0])


DATA = least_squares()
SHARDS = [np.arange(40), np.arange(40, 80)]


def gradient(client, w):
    x, y = (part[SHARDS[client]].astype(float) for part in (DATA.x_train, DATA.y_train))
    return 2 / len(x) * x.T @ (x @ w - y[:, 0])


def optimum():
    x, y = DATA.x_train.astype(float), DATA.y_train[:, 0].astype(float)
    return np.linalg.lstsq(x, y, rcond=None)[0]


def trainer_with(*hooks, **options):
    settings = {"loss": functional.mse_loss, "optimizer": {"lr": RATE}, "batch_size": 1000, **options}
    built = [HOOKS.build(hook) for hook in hooks]
    return TorchTrainer(lambda: nn.Linear(SIZE, 1, bias=False), DATA, hooks=built, **settings)


def local(trainer, w, client=0, state=None, blobs=None, steps=STEPS):
    broadcast = Broadcast(0, np.asarray(w, np.float32), blobs or {})
    task = Task("t", f"client-{client}", 0, steps)
    return trainer.train(task, broadcast, SHARDS[client], {} if state is None else state, None)


def federate(hooks, optimizer_settings, rounds):
    """Rounds of both clients with a plain mean; the model after each, and the clients' states."""
    trainer, optimizer = trainer_with(*hooks), OPTIMIZERS.build(optimizer_settings)
    w, blobs, states, path = np.zeros(SIZE, np.float32), {}, [{}, {}], []
    server = optimizer.init(w)
    members = tuple(Arrival(f"client-{k}", "t", 0, 0, STEPS, STEPS, 40, 1.0, 1.0) for k in (0, 1))
    for _ in range(rounds):
        updates = [local(trainer, w, client, states[client], blobs) for client in (0, 1)]
        names = updates[0].blobs
        means = {name: np.mean([update.blobs[name] for update in updates], axis=0) for name in names}
        server, w, blobs = optimizer.step(server, w, means, Group(("p",), members, (1.0, 1.0), 1.0, 2))
        path.append(w)
    return path, states


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mu", [0.01, 1.0])
def test_fedprox_follows_the_paper(mu):
    start = np.array([0.3, -0.1, 0.7])
    w = start.copy()
    for _ in range(STEPS):
        w = w - RATE * (gradient(0, w) + mu * (w - start))
    close(start - local(trainer_with({"kind": "fedprox", "mu": mu}), start).delta, w)


def test_fedprox_without_mu_is_plain_to_the_bit():
    start = [0.3, -0.1, 0.7]
    plain_, proximal = trainer_with(), trainer_with({"kind": "fedprox", "mu": 0.0})
    assert np.array_equal(local(proximal, start).delta, local(plain_, start).delta)


def test_scaffold_follows_the_paper():
    x, c, own, wanted = np.zeros(SIZE), np.zeros(SIZE), [np.zeros(SIZE), np.zeros(SIZE)], []
    for _ in range(4):
        locals_, changes = [], []
        for client in (0, 1):
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * (gradient(client, y) - own[client] + c)
            after = own[client] - c + (x - y) / (STEPS * RATE)
            changes.append(after - own[client])
            own[client] = after
            locals_.append(y)
        x, c = np.mean(locals_, axis=0), c + np.mean(changes, axis=0)
        wanted.append(x)
    path, states = federate([{"kind": "scaffold"}], {"kind": "scaffold"}, 4)
    close(path, wanted)
    for client in (0, 1):
        close(states[client]["scaffold"]["control"], own[client])


def test_scaffold_and_feddyn_correct_the_drift_that_fedavg_is_left_with():
    best = optimum()
    drift = np.linalg.norm(federate([], {"kind": "sgd"}, 60)[0][-1] - best)
    scaffold = np.linalg.norm(federate([{"kind": "scaffold"}], {"kind": "scaffold"}, 60)[0][-1] - best)
    feddyn = np.linalg.norm(federate([{"kind": "feddyn", "alpha": 1.0}], {"kind": "feddyn"}, 60)[0][-1] - best)
    assert drift > 0.1
    assert scaffold < drift / 50
    assert feddyn < drift / 50


def test_feddyn_follows_the_paper():
    alpha, w, h = 0.5, np.zeros(SIZE), np.zeros(SIZE)
    own, wanted = [np.zeros(SIZE), np.zeros(SIZE)], []
    for _ in range(4):
        locals_ = []
        for client in (0, 1):
            y = w.copy()
            for _ in range(STEPS):
                y = y - RATE * (gradient(client, y) - own[client] + alpha * (y - w))
            own[client] = own[client] - alpha * (y - w)
            locals_.append(y)
        h = h - alpha * np.mean([y - w for y in locals_], axis=0)
        w = np.mean(locals_, axis=0) - h / alpha
        wanted.append(w)
    path, states = federate([{"kind": "feddyn", "alpha": alpha}], {"kind": "feddyn"}, 4)
    close(path, wanted)
    for client in (0, 1):
        close(states[client]["feddyn"]["gradient"], own[client])


def test_control_vectors_are_as_long_as_the_model_and_zero_where_nothing_is_trained():
    def factory():
        return nn.Sequential(nn.Linear(SIZE, 1), nn.BatchNorm1d(1))

    trainer = TorchTrainer(
        factory, DATA, hooks=[HOOKS.build({"kind": "scaffold"})], loss=functional.mse_loss, batch_size=20
    )
    state, vector = {}, trainer.initial()
    for _ in range(2):
        control = {"control": np.ones(trainer.layout.size, np.float32)}
        control["control"].flags.writeable = False
        update = trainer.train(Task("t", "c", 0, 3), Broadcast(0, vector, control), SHARDS[0], state, None)
        sent = update.blobs["control"]
        assert sent.shape == (trainer.layout.size,)
        assert sent.dtype == np.float32
        assert sent[: trainer.layout.trainable].any()
        assert not sent[trainer.layout.trainable :].any()
        assert not np.shares_memory(sent, state["scaffold"]["control"])


def test_ditto_follows_the_paper_and_keeps_the_personal_model():
    lam, trainer, state = 0.5, trainer_with({"kind": "ditto", "lam": 0.5}), {}
    v = None
    for start in (np.array([0.3, -0.1, 0.7]), np.array([0.0, 1.0, 0.0])):
        v = start.copy() if v is None else v
        for _ in range(STEPS):
            v = v - RATE * (gradient(0, v) + lam * (v - start))
        update = local(trainer, start, state=state)
        assert np.array_equal(update.delta, local(trainer_with(), start).delta)
        assert update.metrics == local(trainer_with(), start).metrics
        close(state["ditto"]["personal"], v)
    assert np.linalg.norm(state["ditto"]["personal"] - (start - update.delta)) > 0.01


def test_ditto_near_the_global_model_for_large_lam_and_alone_for_zero():
    start, alone, tied = np.array([0.3, -0.1, 0.7]), {}, {}
    update = local(trainer_with({"kind": "ditto", "lam": 0.0}), start, state=alone, steps=200)
    close(alone["ditto"]["personal"], start - update.delta)
    local(trainer_with({"kind": "ditto", "lam": 15.0}), start, state=tied, steps=200)
    distances = [np.linalg.norm(state["ditto"]["personal"] - start) for state in (alone, tied)]
    assert distances[1] < distances[0] / 3


class Featured(nn.Module):
    """The same function as a Sequential, with its representation named."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(SIZE, 5), nn.Tanh())
        self.head = nn.Linear(5, 1)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def contrastive(w, start, previous, temperature, mu):
    """The loss of MOON on client 0 with its gradient, spelled out on tensors cut from flat vectors."""
    x, y = (torch.from_numpy(part[SHARDS[0]]) for part in (DATA.x_train, DATA.y_train))

    def features(vector):
        return torch.tanh(x @ vector[:15].view(5, 3).T + vector[15:20])

    def cosine(a, b):
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

    live = torch.tensor(w, requires_grad=True)
    z = features(live)
    positive = torch.exp(cosine(z, features(torch.tensor(start))) / temperature)
    negative = torch.exp(cosine(z, features(torch.tensor(previous))) / temperature)
    loss = ((z @ live[20:25] + live[25] - y[:, 0]) ** 2).mean() - mu * torch.log(
        positive / (positive + negative)
    ).mean()
    return torch.autograd.grad(loss, live)[0].numpy()


@pytest.mark.parametrize("factory", [Featured, lambda: nn.Sequential(nn.Linear(SIZE, 5), nn.Tanh(), nn.Linear(5, 1))])
def test_moon_follows_the_paper_and_keeps_the_previous_model(factory):
    hooks = [HOOKS.build({"kind": "moon", "mu": 2.0, "temperature": 0.5})]
    options = {"loss": functional.mse_loss, "optimizer": {"lr": RATE}, "batch_size": 1000}
    trainer, without = (TorchTrainer(factory, DATA, hooks=each, **options) for each in (hooks, []))
    state, start = {}, trainer.initial()
    first = local(trainer, start, state=state)
    assert np.array_equal(first.delta, local(without, start).delta)  # no previous model, no term
    previous = start - first.delta
    close(state["moon"]["previous"], previous)

    w = second = start * 0.5
    for _ in range(STEPS):
        w = w - np.float32(RATE) * contrastive(w, second, previous, 0.5, 2.0)
    update = local(trainer, second, state=state)
    close(second - update.delta, w)
    assert not np.allclose(update.delta, local(without, second).delta, atol=1e-3)
    close(state["moon"]["previous"], w)


def test_moon_needs_something_to_compare():
    with pytest.raises(ModelError, match="features"):
        representation(nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 5, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_plain_and_survives_a_restart(kind):
    whole = load("fashion-mnist")
    data = SimpleNamespace(
        x_train=whole.x_train[:100], y_train=whole.y_train[:100], x_test=whole.x_test[:0], y_test=whole.y_test[:0]
    )
    trainer = TorchTrainer(models.mlp, data, hooks=[HOOKS.build({"kind": kind})], optimizer={"lr": RATE})
    vector, state = trainer.initial(), {}
    vector.flags.writeable = False

    def task(number):
        return Task(f"t{number}", "c", number, 4), Broadcast(number, vector), np.arange(100)

    trainer.train(*task(0), state, None)
    restored = plain.decode(plain.encode(state))
    for part in restored.values():
        for array in part.values():
            array.flags.writeable = False
    one, other = (trainer.train(*task(1), each, None) for each in (state, restored))
    assert all(np.array_equal(blob, other.blobs[name]) for name, blob in one.blobs.items())
    assert plain.encode(state) == plain.encode(restored)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_diverges_leaves_the_state_as_it_was(kind):
    trainer, state = trainer_with({"kind": kind}), {}
    local(trainer, np.ones(SIZE), state=state)
    before = plain.encode(state)
    with pytest.raises(TrainerError, match="diverged"):
        local(trainer, np.full(SIZE, 1e20), state=state)
    assert plain.encode(state) == before


def test_hooks_compose_and_do_not_mix_their_states():
    start, state = np.array([0.3, -0.1, 0.7]), {}
    trainer = trainer_with({"kind": "fedprox", "mu": 0.3}, {"kind": "scaffold"}, {"kind": "ditto"})
    update = local(trainer, start, state=state)
    assert np.array_equal(update.delta, local(trainer_with({"kind": "fedprox", "mu": 0.3}), start).delta)
    assert set(update.blobs) == {"delta", "control"}
    assert {name: set(part) for name, part in state.items()} == {
        "fedprox": set(),
        "scaffold": {"control"},
        "ditto": {"personal"},
    }


def test_a_hook_that_raises_is_named():
    class Faulty:
        def begin(self, work, state):
            raise LookupError("no anchor")

    trainer = TorchTrainer(lambda: nn.Linear(SIZE, 1), DATA, hooks=[Faulty()], loss=functional.mse_loss)
    with pytest.raises(TrainerError, match="client-0: beginning hook faulty raised LookupError"):
        local(trainer, np.zeros(SIZE + 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "fedprox", "mu": -0.1},
        {"kind": "feddyn", "alpha": 0.0},
        {"kind": "ditto", "lam": float("inf")},
        {"kind": "moon", "temperature": 0.0},
        {"kind": "moon", "mu": -1.0},
    ],
)
def test_bad_settings_are_refused_by_name(settings):
    with pytest.raises(ExperimentError, match="hook"):
        HOOKS.build(settings)
