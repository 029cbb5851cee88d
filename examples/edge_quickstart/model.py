"""A small CNN with two exits for pictures of 28 x 28 pixels, most of whose weights lie behind the exits."""

import torch
from torch import nn

from fedge.edge.exits.train import EarlyExit, batches, exit_head, joint, train

CLASSES = 10
WIDE = 2048


def network() -> EarlyExit:
    """Two stages with an exit each, then a wide head of 26 MB that a small device would rather not hold."""
    torch.manual_seed(0)
    stages = [_stage(3, 16), _stage(16, 32)]
    exits: dict[int, nn.Module] = {
        0: exit_head(torch.zeros(1, 16, 14, 14), CLASSES, "conv"),
        1: nn.Sequential(nn.Flatten(), nn.Linear(32 * 7 * 7, CLASSES)),
    }
    body = [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten()]
    head = nn.Sequential(*body, nn.Linear(64 * 7 * 7, WIDE), nn.ReLU(), nn.Linear(WIDE, CLASSES))
    return EarlyExit(stages, exits, head)


def trained(x: torch.Tensor, y: torch.Tensor, steps: int) -> EarlyExit:
    """The network after so many steps on floats [n, 3, 28, 28] in [0, 1] and classes [n], the output above all."""
    model = network()
    train(model, batches(x, y, 64), steps=steps, loss=joint([0.3, 0.3, 1.0]))
    return model


def _stage(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
