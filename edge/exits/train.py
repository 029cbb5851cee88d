"""Exits on a torch model, and their training.

    model = attach(net, batch, after=["layer1", "layer2"], classes=10)
    train(model, batches(x, y, 64), steps=500, loss=joint())                          # all at once
    train(model, batches(x, y, 64), steps=500, loss=distilled(), only_exits=True)     # the net stays as it is

Owns the module with exits and two losses. Must never choose a threshold, or save anything.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isfinite

import torch
from torch import nn
from torch.nn import functional

from fedge.core.errors import DataError, ExperimentError, ModelError, TrainerError
from fedge.core.random import generator

Logits = tuple[torch.Tensor, ...]
Loss = Callable[[Logits, torch.Tensor], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]
WARM_UP = 0.2  # of the steps
MOMENTUM, DECAY = 0.9, 5e-4


class EarlyExit(nn.Module):
    """Stages one behind the other, then a head; `exits[i]` makes logits of what stage i gives out.

    Returns the logits [n, classes] of all exits in order and, last, those of the head.
    """

    def __init__(self, stages: Sequence[nn.Module], exits: Mapping[int, nn.Module], head: nn.Module) -> None:
        super().__init__()
        if not all(0 <= stage < len(stages) for stage in exits):
            raise ModelError(f"Exits stand after the stages {sorted(exits)}, but there are only {len(stages)} stages.")
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleDict({str(stage): exits[stage] for stage in sorted(exits)})
        self.head = head

    def forward(self, x: torch.Tensor) -> Logits:
        """All logits of the batch."""
        found: list[torch.Tensor] = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if str(index) in self.exits:
                found.append(self.exits[str(index)](x))
        return (*found, self.head(x))


def attach(
    model: nn.Module, sample: torch.Tensor, *, after: Sequence[str], classes: int, kind: str = "linear"
) -> EarlyExit:
    """The same model, its weights shared, with an exit after each of the named submodules.

    The children of `model` must run one after the other in the order of their names, as those of a Sequential or a
    torchvision ResNet do; what lies in a Sequential is named with a dot ("features.3"). `sample` is a batch of inputs,
    to learn shapes from and to check that the chain computes what the model does. Exits are untrained; `kind` is
    "linear" (average pool and a linear layer) or "conv" (a 3 x 3 convolution of stride 2 before it).

    Raises ModelError where the children are no such chain or a name is none of them, ExperimentError for another kind.
    """
    links = _chain(model, after)
    names = [name for name, _ in links]
    if unknown := [name for name in after if name not in names[:-1]]:
        raise ModelError(f"No exit can stand after {unknown[0]!r}; the model's chain is {', '.join(names)}.")
    if not after:
        raise ModelError("No exit was asked for; name at least one submodule in `after`.")
    ends = sorted({names.index(name) + 1 for name in after})
    modules = [module for _, module in links]
    stages = [nn.Sequential(*modules[start:end]) for start, end in zip([0, *ends], ends)]
    training = model.training
    model.eval()
    try:
        exits, x = {}, sample
        with torch.no_grad():
            for index, stage in enumerate(stages):
                x = stage(x)
                exits[index] = exit_head(x, classes, kind)
            found = EarlyExit(stages, exits, nn.Sequential(*modules[ends[-1] :])).eval()
            same = torch.equal(found(sample)[-1], model(sample))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"The children of the model do not run one after the other ({error}).") from error
    finally:
        model.train(training)
    if not same:
        raise ModelError("The children of the model, one after the other, compute something else than the model does.")
    return found.train(training)


def exit_head(features: torch.Tensor, classes: int, kind: str = "linear") -> nn.Module:
    """An untrained exit for features like these, [n, c, h, w] or [n, c]. Raises ExperimentError, ModelError."""
    if kind not in ("linear", "conv"):
        raise ExperimentError(f"There is no kind of exit {kind!r}; use 'linear' or 'conv'.")
    channels = features.shape[1] if features.ndim in (2, 4) else 0
    if not channels or classes < 2:
        raise ModelError(f"No exit for {classes} classes fits features of the shape {tuple(features.shape)}.")
    if features.ndim == 2:
        return nn.Linear(channels, classes)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    if kind == "linear":
        return nn.Sequential(*pooled)
    return nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU(), *pooled)


def _chain(model: nn.Module, after: Sequence[str], prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Name and module of each link. A Sequential is opened where an exit stands in it; a Linear is fed flat."""
    links: list[tuple[str, nn.Module]] = []
    for child, module in model.named_children():
        name = prefix + child
        opened = isinstance(module, nn.Sequential) and any(wanted.startswith(name + ".") for wanted in after)
        inner = _chain(module, after, name + ".") if opened else [(name, module)]
        first = next(iter(module.children()), module) if isinstance(module, nn.Sequential) else module
        if isinstance(first, nn.Linear) and links and not isinstance(model, nn.Sequential):
            inner[0] = (inner[0][0], nn.Sequential(nn.Flatten(), inner[0][1]))
        links += inner
    return links


def joint(weights: Sequence[float] | None = None) -> Loss:
    """The weighted sum of all cross entropies, the head's last; weights are 1 unless told (BranchyNet, ICPR 2016)."""

    def loss(logits: Logits, labels: torch.Tensor) -> torch.Tensor:
        factors = weights or [1.0] * len(logits)
        if len(factors) != len(logits):
            raise ExperimentError(f"There are {len(factors)} weights for {len(logits)} outputs; give one for each.")
        terms = [factor * functional.cross_entropy(one.float(), labels) for factor, one in zip(factors, logits)]
        return torch.stack(terms).sum()

    return loss


def distilled(temperature: float = 2.0) -> Loss:
    """Sum of T^2 KL(head || exit), both softened by T (Hinton, Vinyals, Dean 2015); labels and the head do not matter.

    Meant for exits on a trained model, with `only_exits`.
    """

    def loss(logits: Logits, _: torch.Tensor) -> torch.Tensor:
        *exits, head = logits
        teacher = functional.log_softmax(head.detach().float() / temperature, dim=1)
        students = [functional.log_softmax(one.float() / temperature, dim=1) for one in exits]
        terms = [functional.kl_div(one, teacher, reduction="batchmean", log_target=True) for one in students]
        return temperature**2 * torch.stack(terms).sum()

    return loss


def train(
    model: EarlyExit,
    batches: Iterable[Batch],
    *,
    steps: int,
    loss: Loss,
    rate: float = 0.1,
    only_exits: bool = False,
    seed: int = 0,
) -> list[float]:
    """`steps` steps of SGD with momentum, the rate rising to `rate` and falling to 0; the loss of each step.

    `only_exits` leaves stages and head untouched, batch statistics included. The model ends in evaluation mode, its
    parameters as trainable as they were. With the same batches, seed and threads the result is the same to the bit.

    Raises TrainerError where the loss is not finite or the batches run out.
    """
    moved = [p for p in (model.exits if only_exits else model).parameters() if p.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is one for one in moved)]
    model.train(not only_exits)
    model.exits.train()
    for parameter in others:
        parameter.requires_grad = False
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            losses = _descend(model, moved, zip(range(steps), batches), loss, _triangle(rate, steps))
    finally:
        model.eval()
        for parameter in others:
            parameter.requires_grad = True
    if len(losses) < steps:
        raise TrainerError(f"The batches ended after {len(losses)} of {steps} steps; give an iterable without end.")
    return losses


def _descend(
    model: EarlyExit,
    moved: list[nn.Parameter],
    batches: Iterable[tuple[int, Batch]],
    loss: Loss,
    rates: Callable[[int], float],
) -> list[float]:
    optimizer = torch.optim.SGD(moved, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY, lr=0.0)
    losses = []
    for step, (x, y) in batches:
        optimizer.param_groups[0]["lr"] = rates(step)
        optimizer.zero_grad()
        value = loss(model(x), y)
        torch.autograd.backward(value)
        optimizer.step()
        losses.append(value.item())
        if not isfinite(losses[-1]):
            raise TrainerError(f"The loss was {losses[-1]} at step {step}; lower the rate.")
    return losses


def _triangle(peak: float, steps: int) -> Callable[[int], float]:
    """Up over WARM_UP of the steps, then down to 0 (Smith & Topin 2017, one cycle)."""
    top = max(1, round(WARM_UP * steps))
    return lambda step: peak * min((step + 1) / top, (steps - step) / max(1, steps - top))


def batches(x: torch.Tensor, y: torch.Tensor, size: int, seed: int = 0) -> Iterator[Batch]:
    """Shuffled batches of [size, ...] and [size], epoch after epoch without end, by `seed`; short sets give all.

    Raises DataError where there is nothing, or not one label for each input.
    """
    if not len(x) or len(x) != len(y) or size < 1:
        raise DataError(f"{len(x)} inputs with {len(y)} labels make no batches of {size}; mend the data.")
    random = generator(seed, "exit batches")
    size = min(size, len(x))
    while True:
        order = torch.from_numpy(random.permutation(len(x)))
        for start in range(0, len(x) - size + 1, size):
            chosen = order[start : start + size]
            yield x[chosen], y[chosen]
