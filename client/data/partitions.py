"""How a training set is shared out: from labels to one shard (indices) per client.

Owns five partitions, each a frozen dataclass of settings, found by `kind` in `PARTITIONS`. The skewed ones differ only
in their table of shares, float64 [clients, classes]: which part of each class goes to which client. Must never look at
the examples themselves, or draw from anything but `fedge.core.random`.

class, dual-dirichlet: Li, Chaturvedi, He, Chen, Singh, Kindratenko, Huerta, Kim, Madduri, "FedCompass", ICLR 2024,
appendix on partitions. dirichlet: Hsu, Qi, Brown, 2019, in the label-wise form of Li, Diao, Chen, He, "Federated
Learning on Non-IID Data Silos", ICDE 2022.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedge.client.trainer import Shard
from fedge.core.errors import DataError, ExperimentError
from fedge.core.params import Array
from fedge.core.random import generator
from fedge.core.registry import Registry, nearest

Labels = NDArray[np.int64]
Shares = NDArray[np.float64]

PARTITIONS = Registry(
    "data.partition",
    {
        "iid": "fedge.client.data.partitions:Iid",
        "class": "fedge.client.data.partitions:ByClass",
        "dirichlet": "fedge.client.data.partitions:Dirichlet",
        "dual-dirichlet": "fedge.client.data.partitions:DualDirichlet",
        "natural": "fedge.client.data.partitions:Natural",
    },
)
TRIES = 1000  # draws until every client has enough examples
ALPHA_RANGE = (1e-6, 1e9)  # beyond it the exponents below leave float64


class Partition(Protocol):
    """What every partition can do. `clients` is how many shards it makes (0, natural only: one per value)."""

    @property
    def clients(self) -> int:
        """The number of shards."""

    def split(self, labels: Labels, columns: Mapping[str, Array], seed: int) -> list[Shard]:
        """Disjoint, non-empty, sorted index arrays int64, one per client, from labels int64 [n] and columns [n].

        Raises DataError where the examples do not suffice, ExperimentError where the settings do not fit the data.
        """


@dataclass(frozen=True, slots=True)
class Iid:
    """Everything shuffled and cut into equal parts (sizes differ by one at most)."""

    clients: int

    def __post_init__(self) -> None:
        _whole("clients", self.clients, 1)

    def split(self, labels: Labels, columns: Mapping[str, Array], seed: int) -> list[Shard]:
        """All examples, each in one shard."""
        _enough(labels, self.clients, 1)
        order = generator(seed, "partition").permutation(len(labels))
        return [np.sort(part) for part in np.array_split(order, self.clients)]


@dataclass(frozen=True, slots=True)
class ByClass:
    """Each client holds U{min_classes..max_classes} classes; holders cut a class in the ratio of draws |N(10, 3)|.

    Where chance leaves a class without a holder, it takes the place of one that has several, so that no example is left
    out. (The paper's code draws everything again instead, which hardly ever succeeds for one class per client.)
    """

    clients: int
    min_classes: int = 3
    max_classes: int = 5

    def __post_init__(self) -> None:
        _whole("clients", self.clients, 1)
        _whole("min_classes", self.min_classes, 1)
        _whole("max_classes", self.max_classes, self.min_classes)

    def split(self, labels: Labels, columns: Mapping[str, Array], seed: int) -> list[Shard]:
        """All examples, each in one shard."""
        return _deal(labels, self.clients, 1, seed, self._shares)

    def _shares(self, sizes: Shares, rng: np.random.Generator) -> Shares:
        classes = len(sizes)
        if self.max_classes > classes:
            raise ExperimentError(
                f"data.partition.max_classes: {self.max_classes} is more than the {classes} classes of the data set; "
                f"set min_classes and max_classes to at most {classes}."
            )
        if self.clients * self.max_classes < classes:
            raise ExperimentError(
                f"data.partition.max_classes: {self.clients} clients of at most {self.max_classes} classes cannot hold "
                f"all {classes}; set it to at least {math.ceil(classes / self.clients)}, or take more clients."
            )
        holds = self._holders(classes, rng)
        lengths = np.abs(rng.normal(10.0, 3.0, holds.shape)) * holds
        shares: Shares = lengths / lengths.sum(axis=0)
        return shares

    def _holders(self, classes: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        many = rng.integers(self.min_classes, self.max_classes, self.clients, endpoint=True)
        while many.sum() < classes:
            many[np.argmin(many)] += 1
        holds = np.zeros((self.clients, classes), bool)
        for client, count in enumerate(many):
            holds[client, rng.permutation(classes)[:count]] = True
        for orphan in np.flatnonzero(~holds.any(axis=0)):
            spare = np.argwhere(holds & (holds.sum(axis=0) > 1))
            client, doubled = spare[rng.integers(len(spare))]
            holds[client, doubled], holds[client, orphan] = False, True
        return holds


@dataclass(frozen=True, slots=True)
class Dirichlet:
    """Each class is cut among all clients by one draw from Dir(alpha, ..., alpha).

    `alpha` is the concentration of each of the `clients` components: 100 is nearly iid, 0.1 very skewed. Drawn again
    until every client has `min_examples`.
    """

    clients: int
    alpha: float = 0.5
    min_examples: int = 10

    def __post_init__(self) -> None:
        _whole("clients", self.clients, 1)
        _positive("alpha", self.alpha)
        _whole("min_examples", self.min_examples, 1)

    def split(self, labels: Labels, columns: Mapping[str, Array], seed: int) -> list[Shard]:
        """All examples, each in one shard."""
        return _deal(labels, self.clients, self.min_examples, seed, self._shares)

    def _shares(self, sizes: Shares, rng: np.random.Generator) -> Shares:
        shares: Shares = np.exp(_log_dirichlet(np.full(self.clients, self.alpha), len(sizes), rng)).T
        return shares


@dataclass(frozen=True, slots=True)
class DualDirichlet:
    """How much a client holds, w ~ Dir(alpha1 / m, ..., alpha1 / m), and what: mix_i ~ Dir(alpha2 * prior).

    m is `clients` and prior the share of each class in the data set, so `alpha1` and `alpha2` are the *sums* of the
    concentrations: a component of w has alpha1 / m (1 by default, since alpha1 is m), and one of mix_i has alpha2 / 10
    where ten classes are equal. alpha2 = 0.5 is therefore far more skewed than what others call Dir(0.5).

    Client i gets the part w_i * mix_i[k] / sum_j w_j * mix_j[k] of class k: every example goes somewhere, and sizes
    follow w only roughly. Drawn again until every client has `min_examples`.
    """

    clients: int
    alpha1: float | None = None
    alpha2: float = 0.5
    min_examples: int = 1

    def __post_init__(self) -> None:
        _whole("clients", self.clients, 1)
        if self.alpha1 is not None:
            _positive("alpha1", self.alpha1)
        _positive("alpha2", self.alpha2)
        _whole("min_examples", self.min_examples, 1)

    def split(self, labels: Labels, columns: Mapping[str, Array], seed: int) -> list[Shard]:
        """All examples, each in one shard."""
        return _deal(labels, self.clients, self.min_examples, seed, self._shares)

    def _shares(self, sizes: Shares, rng: np.random.Generator) -> Shares:
        total = float(self.clients) if self.alpha1 is None else self.alpha1
        weight = _log_dirichlet(np.full(self.clients, total / self.clients), 1, rng).T
        mix = _log_dirichlet(self.alpha2 * sizes / sizes.sum(), self.clients, rng)
        shares: Shares = np.exp(_normalised(weight + mix, axis=0))
        return shares


@dataclass(frozen=True, slots=True)
class Natural:
    """One client per value of a column (writer, hospital, device), in the order of the values.

    With `clients` above 0, only that many: the values with most examples. The examples of the others are left out.
    """

    column: str
    clients: int = 0

    def __post_init__(self) -> None:
        _whole("clients", self.clients, 0)

    def split(self, labels: Labels, columns: Mapping[str, Array], seed: int) -> list[Shard]:
        """All examples of the values that are clients, each in one shard; `seed` plays no part."""
        if self.column not in columns:
            hint = nearest(self.column, columns) if columns else "it has none."
            raise ExperimentError(f"data.partition.column: the data set has no column {self.column!r}; {hint}")
        if columns[self.column].shape != labels.shape:
            raise DataError(f"Column {self.column!r} must hold one value per training example; give it shape [n].")
        _enough(labels, max(1, self.clients), 1)
        values, which, sizes = np.unique(columns[self.column], return_inverse=True, return_counts=True)
        if self.clients > len(values):
            raise DataError(
                f"Column {self.column!r} has {len(values)} values, too few for {self.clients} clients; "
                f"set clients to at most {len(values)}."
            )
        chosen = np.sort(np.argsort(-sizes, kind="stable")[: self.clients or len(values)])
        ends = np.cumsum(sizes)
        members = np.split(np.argsort(which, kind="stable"), ends[:-1])
        return [members[value] for value in chosen]


def counts(labels: Labels, shards: list[Shard], n_classes: int) -> NDArray[np.int64]:
    """How many examples of each class each client holds, int64 [clients, classes]."""
    return np.array([np.bincount(labels[shard], minlength=n_classes) for shard in shards], np.int64)


def _deal(
    labels: Labels,
    clients: int,
    min_examples: int,
    seed: int,
    draw: Callable[[Shares, np.random.Generator], Shares],
) -> list[Shard]:
    """Shards by a table of shares, drawn until every client has enough. Rounding keeps the size of every class."""
    _enough(labels, clients, min_examples)
    rng = generator(seed, "partition")
    _, which, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    for _ in range(TRIES):
        shares = draw(sizes.astype(np.float64), rng)
        ends = np.rint(np.cumsum(shares, axis=0) / shares.sum(axis=0) * sizes).astype(np.int64)
        if np.diff(ends, axis=0, prepend=0).sum(axis=1).min() >= min_examples:
            break
    else:
        raise DataError(
            f"No draw in {TRIES} gave each of {clients} clients at least {min_examples} of the {len(labels)} training "
            "examples; use fewer clients, less skew (a larger alpha, more classes per client) or more data."
        )
    parts = [np.split(rng.permutation(np.flatnonzero(which == index)), ends[:-1, index]) for index in range(len(sizes))]
    return [np.sort(np.concatenate(pieces)) for pieces in zip(*parts)]


def _log_dirichlet(alpha: Shares, rows: int, rng: np.random.Generator) -> Shares:
    """Logarithms of `rows` draws from Dir(alpha), [rows, len(alpha)].

    By Gamma(a) = Gamma(a + 1) * U^(1/a): small concentrations would underflow to 0, and 0 / 0 in a whole class.
    """
    shape = (rows, len(alpha))
    uniform = 1.0 - rng.random(shape)  # in (0, 1]
    return _normalised(np.log(rng.standard_gamma(alpha + 1.0, shape)) + np.log(uniform) / alpha, axis=1)


def _normalised(logs: Shares, axis: int) -> Shares:
    """Logarithms of what sums to 1 along `axis`."""
    logs = logs - logs.max(axis=axis, keepdims=True)
    result: Shares = logs - np.log(np.exp(logs).sum(axis=axis, keepdims=True))
    return result


def _whole(name: str, value: int, least: int) -> None:
    if value < least:
        raise ExperimentError(f"data.partition.{name}: {value} is too small; it must be at least {least}.")


def _positive(name: str, value: float) -> None:
    low, high = ALPHA_RANGE
    if not low <= value <= high:
        raise ExperimentError(f"data.partition.{name}: {value} will not do; it must lie between {low:g} and {high:g}.")


def _enough(labels: Labels, clients: int, min_examples: int) -> None:
    if len(labels) < clients * min_examples:
        raise DataError(
            f"{len(labels)} training examples do not suffice for {clients} clients with at least {min_examples} each; "
            "use fewer clients or more data."
        )
