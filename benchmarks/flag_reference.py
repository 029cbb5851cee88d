"""The Flag Aggregator by decomposing the rows themselves, [d, n], as its paper (ICLR 2024) and its published code do;
what fedge's is compared with (strategies/aggregators/flag.py has the formula).

Both on unit rows, with m = ceil((n + 1) / 2) and lambda = 0, in words of our own.
"""

import math

import torch

EPS = 1e-7


def of_the_paper(rows: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The projected mean of the unit rows, float32 [d], from [n, d]; the weights begin equal."""
    units = _units(rows)
    explained = torch.zeros(len(rows))
    for _ in range(steps):
        basis = _leading(units, explained)
        explained = (basis.T @ units).square().sum(dim=0)
    return basis @ (basis.T @ units.mean(dim=1))


def of_the_code(rows: torch.Tensor) -> torch.Tensor:
    """One step from a random subspace, which is kept where the step makes it no better; the projected sum over m.

    What a subspace explains of a row is the trace of Y' x x' Y, formed from the left: m d numbers for each row.
    """
    units = _units(rows)
    basis, _ = torch.linalg.qr(
        torch.randn(len(units), math.ceil((len(rows) + 1) / 2), generator=torch.Generator().manual_seed(0))
    )
    before = _explained(basis, units)
    found = _leading(units, before)
    better = (1 - _explained(found, units)).clamp(min=0).sqrt().sum() < (1 - before).clamp(min=0).sqrt().sum()
    basis = found if better else basis
    return basis @ (basis.T @ units.sum(dim=1)) / basis.shape[1]


def _units(rows: torch.Tensor) -> torch.Tensor:
    units: torch.Tensor = torch.nn.functional.normalize(rows, dim=1).T
    return units


def _leading(units: torch.Tensor, explained: torch.Tensor) -> torch.Tensor:
    """Y [d, m]: the first left singular vectors of the weighted columns."""
    weights = (1 - explained.clamp(max=1) + EPS) ** -0.25
    left, _, _ = torch.linalg.svd(units * weights, full_matrices=False)
    return left[:, : math.ceil((units.shape[1] + 1) / 2)]


def _explained(basis: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.trace(basis.T @ x[:, None] @ x[None, :] @ basis) for x in units.T])
