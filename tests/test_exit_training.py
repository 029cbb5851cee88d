"""Exits on a torch model: where they stand, and that their training does what it says."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedge.core.errors import DataError, ExperimentError, ModelError, TrainerError
from fedge.edge.exits.train import EarlyExit, attach, batches, distilled, joint, train

SAMPLE = torch.rand(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.relu(self.bn(self.conv(x)))


class ResNetLike(nn.Module):
    """Flattens between the pool and the last layer without a module for it, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.layer1, self.layer2 = nn.Sequential(Block(6), Block(6)), nn.Sequential(Block(6), nn.MaxPool2d(2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class VggLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(28, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Crossed(nn.Module):
    """Its children run the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(self.two(x) + 1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


CASES = [
    (ResNetLike, ["relu", "layer1"]),
    (VggLike, ["features.1", "features.3", "classifier.1"]),
    (mlp, ["2", "4"]),
]


@pytest.mark.parametrize(("make", "after"), CASES, ids=["resnet", "vgg", "mlp"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_exits_stand_beside_a_model_that_stays_as_it_is(make: type[nn.Module], after: list[str], kind: str) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = attach(model, SAMPLE, after=after, classes=4, kind=kind)
    assert found.training
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    logits = found.eval()(SAMPLE)
    assert [one.shape for one in logits] == [(2, 4)] * (len(after) + 1)
    assert torch.equal(logits[-1], model.eval()(SAMPLE))
    shared = {id(parameter) for parameter in model.parameters()}
    assert shared <= {id(parameter) for parameter in found.parameters()}


def test_each_exit_sees_what_its_submodule_gives_out() -> None:
    model = ResNetLike().eval()
    seen: list[torch.Tensor] = []
    model.layer1.register_forward_hook(lambda _, __, out: seen.append(out))
    found = attach(model, SAMPLE, after=["layer1"], classes=4)
    with torch.no_grad():
        first, _ = found(SAMPLE)
    assert torch.equal(first, found.exits["0"](seen[-1]))


def test_a_model_that_is_no_chain_or_an_unknown_name_is_refused() -> None:
    with pytest.raises(ModelError, match="something else"):
        attach(Crossed(), SAMPLE, after=["one"], classes=4)
    with pytest.raises(ModelError, match="one after the other"):
        attach(nn.ModuleDict({"a": nn.Linear(7, 2), "b": nn.ReLU()}), SAMPLE, after=["a"], classes=4)
    for name in ("nowhere", "fc"):  # the last is the head itself
        with pytest.raises(ModelError, match=f"No exit can stand after '{name}'; the model's chain is conv1, bn1"):
            attach(ResNetLike(), SAMPLE, after=[name], classes=4)
    with pytest.raises(ModelError, match="at least one"):
        attach(ResNetLike(), SAMPLE, after=[], classes=4)
    with pytest.raises(ExperimentError, match="no kind of exit 'wide'"):
        attach(ResNetLike(), SAMPLE, after=["layer1"], classes=4, kind="wide")
    with pytest.raises(ModelError, match="1 classes"):
        attach(ResNetLike(), SAMPLE, after=["layer1"], classes=1)
    with pytest.raises(ModelError, match="only 1 stages"):
        EarlyExit([nn.ReLU()], {1: nn.ReLU()}, nn.ReLU())


def test_the_joint_loss_is_the_weighted_sum() -> None:
    logits, labels = tuple(torch.randn(3, 5, 4)), torch.tensor([0, 1, 2, 3, 0])
    terms = [float(functional.cross_entropy(one, labels)) for one in logits]
    assert float(joint()(logits, labels)) == pytest.approx(sum(terms))
    assert float(joint([1.0, 0.0, 2.0])(logits, labels)) == pytest.approx(terms[0] + 2 * terms[2])
    with pytest.raises(ExperimentError, match="2 weights for 3 outputs"):
        joint([1.0, 1.0])(logits, labels)


def test_distillation_draws_exits_to_the_head_and_leaves_the_head_alone() -> None:
    exit_, head = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    value = distilled(2.0)((exit_, head), torch.zeros(5))
    value.backward()
    p, q = (torch.softmax(one.detach() / 2, 1) for one in (head, exit_))
    assert value.item() == pytest.approx(4 * float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert head.grad is None
    assert distilled()((head, head), torch.zeros(5)).item() == pytest.approx(0, abs=1e-6)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Which channel or none is brightest: learnt in seconds."""
    y = torch.arange(256) % 4
    x = torch.randn(256, 3, 8, 8) + 1.5 * nn.functional.one_hot(y, 4)[:, :3, None, None]
    return x, y


def accuracies(model: EarlyExit, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return [float((one.argmax(1) == y).float().mean()) for one in model.eval()(x)]


def test_joint_training_teaches_every_output_and_repeats_to_the_bit() -> None:
    x, y = problem()
    ends = []
    for _ in range(2):
        torch.manual_seed(1)
        model = attach(ResNetLike(), SAMPLE, after=["layer1"], classes=4)
        model.stages.append(nn.Dropout(0.1))  # draws on torch's own generator
        losses = train(model, batches(x, y, 32, seed=5), steps=60, loss=joint(), seed=3)
        ends.append(model.state_dict())
        torch.rand(7)  # what others draw in between does not matter
    assert len(losses) == 60
    assert not model.training
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert min(accuracies(model, x, y)) > 0.9


def test_only_the_exits_learn_from_the_head_where_the_rest_is_frozen() -> None:
    x, y = problem()
    torch.manual_seed(2)
    model = attach(ResNetLike(), SAMPLE, after=["layer1"], classes=4)
    train(model, batches(x, y, 32), steps=40, loss=joint([0.0, 1.0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = torch.zeros_like(y)  # labels do not matter now
    train(model, batches(x, wrong, 32), steps=60, loss=distilled(), only_exits=True)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if name.startswith("exits.")}
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        first, head = model(x)
    assert float((first.argmax(1) == head.argmax(1)).float().mean()) > 0.85


def test_training_that_cannot_go_on_says_so() -> None:
    x, y = problem()
    model = attach(ResNetLike(), SAMPLE, after=["layer1"], classes=4)
    with pytest.raises(TrainerError, match="ended after 2 of 5 steps"):
        train(model, [(x[:8], y[:8])] * 2, steps=5, loss=joint())
    with pytest.raises(TrainerError, match="at step 0; lower the rate"):
        train(model, batches(x * torch.nan, y, 8), steps=5, loss=joint())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for inputs, labels, size in ((x[:0], y[:0], 4), (x, y[:3], 4), (x, y, 0)):
        with pytest.raises(DataError, match="make no batches"):
            next(batches(inputs, labels, size))


def test_batches_are_shuffled_by_seed_and_never_short() -> None:
    x, y = torch.arange(10.0), torch.arange(10)
    stream = batches(x, y, 4, seed=1)
    drawn = [next(stream)[1] for _ in range(4)]
    assert all(len(one) == 4 for one in drawn)
    assert len({int(value) for one in drawn[:2] for value in one}) == 8
    assert drawn[0].tolist() != drawn[2].tolist()
    again = batches(x, y, 4, seed=1)
    assert all(torch.equal(one, next(again)[1]) for one in drawn)
