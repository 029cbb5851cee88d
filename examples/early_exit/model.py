"""A small CNN with two exits for a federation, and the hook through which clients train the exits, too."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedge.edge.exits.train import EarlyExit, exit_head


class Federated(nn.Module):
    """An early-exit model that answers with its final logits, as a trainer expects; `left` keeps those of the exits."""

    def __init__(self, inner: EarlyExit) -> None:
        super().__init__()
        self.inner = inner
        self.left: tuple[torch.Tensor, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, 10] of images [n, 1, 28, 28]."""
        *left, output = self.inner(x)
        self.left = tuple(left)
        return output


def factory() -> Federated:
    """Three stages, the first two with an exit; the third and the head are most of the work."""
    stages = [_stage(1, 8), _stage(8, 16), nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU())]
    head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 256), nn.ReLU(), nn.Linear(256, 10))
    exits: dict[int, nn.Module] = {
        0: exit_head(torch.zeros(1, 8, 14, 14), 10, "conv"),
        1: nn.Sequential(nn.Flatten(), nn.Linear(16 * 7 * 7, 10)),
    }
    return Federated(EarlyExit(stages, exits, head))


def _stage(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))


@dataclass(frozen=True, slots=True)
class ExitLoss:
    """A client hook: adds `weight` times the cross entropy of every exit to the loss of the output."""

    weight: float = 0.5

    def begin(self, work: Any, state: dict[str, Any]) -> None:
        """Nothing to prepare."""

    def penalty(self, work: Any, model: Federated, batch: Any, output: Any) -> torch.Tensor:
        """The exits' part of the joint loss (BranchyNet, ICPR 2016)."""
        return self.weight * torch.stack([functional.cross_entropy(one, batch[1]) for one in model.left]).sum()

    def adjust(self, work: Any) -> None:
        """The gradient stays as it is."""

    def finish(self, work: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Nothing outlives the task."""
        return {}
