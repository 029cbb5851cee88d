"""The network of the exits benchmark: a small residual CNN for CIFAR-10 with three exits, trained once and kept.

Owns the architecture, its training on all but HELD_OUT of the training images, and the count of its multiply-adds.
Weights lie beside the data as safetensors. Must never see a test image.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from fedge.core.random import generator
from fedge.edge.exits.train import Batch, EarlyExit, Logits, batches, distilled, joint, train

CIFAR = Path(os.environ.get("FEDGE_DATA", Path.home() / ".cache" / "fedge-data")) / "cifar10.npz"
HELD_OUT = 5000  # of the training images, for temperatures and thresholds
BATCH, STEPS, RATE = 128, 2500, 0.1
WEIGHTS = (0.5, 0.5, 0.5, 1.0)
Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Residual(nn.Module):
    """x plus two convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(channels, channels), convolution(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        out: torch.Tensor = x + self.body(x)
        return out


def convolution(channels: int, out: int, stride: int = 1) -> nn.Module:
    """3 x 3, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def leave(channels: int, edge: int) -> nn.Module:
    """An exit for features [n, channels, edge, edge]: means over sixteenths, one hidden layer."""
    pool = nn.AvgPool2d(edge // 4)
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(16 * channels, 128), nn.ReLU(), nn.Linear(128, 10))


def network(exits: bool = True) -> EarlyExit:
    """Four stages of 24, 48, 48 and 96 channels, exits after the first three or none."""
    stages = [
        nn.Sequential(convolution(3, 24, 2), convolution(24, 24)),
        nn.Sequential(convolution(24, 48, 2), convolution(48, 48)),
        Residual(48),
        nn.Sequential(convolution(48, 96, 2), Residual(96)),
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))
    leaves = {0: leave(24, 16), 1: leave(48, 8), 2: leave(48, 8)} if exits else {}
    return EarlyExit(stages, leaves, head)


def multiply_adds(model: EarlyExit) -> list[float]:
    """Those of one image up to each output, exits passed on the way included."""
    counts: list[float] = []

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        counts[-1] += weight.numel() * out[0].numel() / len(weight)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    x, total = torch.zeros(1, 3, 32, 32), []
    with torch.no_grad():
        counts.append(0.0)
        for index, stage in enumerate(model.stages):
            x = stage(x)
            if str(index) in model.exits:
                model.exits[str(index)](x)
                total.append(counts[-1])
        model.head(x)
    for hook in hooks:
        hook.remove()
    return [*total, counts[-1]]


def sides() -> dict[str, tuple[Images, Labels]]:
    """Images [n, 32, 32, 3] and labels [n] to train on, to calibrate on, and to test on."""
    with np.load(CIFAR, allow_pickle=False) as data:
        order = generator(0, "exits benchmark").permutation(len(data["x_train"]))
        x, y, held = data["x_train"], data["y_train"], np.sort(order[:HELD_OUT])
        rest = np.sort(order[HELD_OUT:])
        return {
            "train": (x[rest], y[rest]),
            "held out": (x[held], y[held]),
            "test": (data["x_test"], data["y_test"]),
        }


def tensor(images: Images) -> torch.Tensor:
    """[n, 3, 32, 32], about -2 to 2, the channels last in memory."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def augmented(images: Images, labels: Labels, seed: int) -> Iterator[Batch]:
    """Endless batches, mirrored and moved by up to four pixels at random."""
    random = generator(seed, "augmented")
    for x, y in batches(torch.from_numpy(images), torch.from_numpy(labels), BATCH, seed):
        mirror = torch.from_numpy(random.random(len(x)) < 0.5)
        rows, columns = (torch.from_numpy(random.integers(0, 9, (len(x), 1))) + torch.arange(32) for _ in range(2))
        padded = functional.pad(x, (0, 0, 4, 4, 4, 4), value=128)
        moved = padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
        moved = torch.where(mirror[:, None, None, None], moved.flip(2), moved)
        yield (moved.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25, y


def loss(logits: Logits, labels: torch.Tensor) -> torch.Tensor:
    """Every output learns the labels, and the exits what the head says."""
    if len(logits) == 1:
        return joint()(logits, labels)
    return joint(WEIGHTS)(logits, labels) + 0.5 * distilled(3.0)(logits, labels)


def trained(exits: bool, retrain: bool = False, at_most: int | None = None) -> tuple[EarlyExit, float | None]:
    """The network in evaluation mode, and how many seconds its training took where it was trained now.

    With `at_most` so many steps, nothing is kept; weights that are there are used all the same.
    """
    kept = CIFAR.with_name(f"exits-benchmark-{'exits' if exits else 'plain'}-{STEPS}.safetensors")
    torch.manual_seed(0)
    model = network(exits).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if kept.exists() and not retrain:
        model.load_state_dict(load_file(kept))
        return model.eval(), None
    begun = time.monotonic()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # cached weights would never see a step
        train(model, augmented(*sides()["train"], 0), steps=at_most or STEPS, loss=loss, rate=RATE)
    if at_most is None:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, kept)
    return model, time.monotonic() - begun


def all_logits(model: EarlyExit, images: Images) -> list[NDArray[np.float32]]:
    """The logits of every output, [n, 10] each."""
    with torch.no_grad():
        parts = [[one.numpy() for one in model(tensor(images[at : at + 500]))] for at in range(0, len(images), 500)]
    return [np.concatenate(one) for one in zip(*parts)]
