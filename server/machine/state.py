"""What a federation is made of (Federation) and all that changes while it runs (State), as plain data.

Owns the snapshot: every field of State goes into it, so a restored machine goes on exactly where the old one was.
Must never hold behaviour of the machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fedge.core import state as codec
from fedge.core.limits import Limits
from fedge.core.params import Array, Layout, Vector
from fedge.core.task import Scalar, Task
from fedge.server.machine.pools import Pool
from fedge.strategies.contracts import Aggregator, Scheduler, ServerOptimizer, Weigher


@dataclass(frozen=True, slots=True)
class Stop:
    """When a run ends: at the first of these that is set. `target` is a test accuracy in (0, 1]."""

    updates: int | None = None
    versions: int | None = None
    seconds: float | None = None
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Federation:
    """The plan of a run: the model's layout and the strategies. `expected` is N, the number of clients it is made for.

    `share` weighs updates against each other (equal, examples), `staleness` discounts old ones. `blobs` names the
    further vectors that updates may bring. `hyper` goes out with every task.
    """

    layout: Layout
    scheduler: Scheduler
    share: Weigher
    staleness: Weigher
    aggregator: Aggregator
    optimizer: ServerOptimizer
    expected: int
    seed: int = 0
    stop: Stop = Stop()
    limits: Limits = Limits()
    blobs: frozenset[str] = frozenset()
    hyper: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(slots=True)
class ClientRecord:
    """One client. `task` is the id of the task it holds, or empty; `gone`: it has left for good."""

    state: str = "absent"
    task: str = ""
    examples: int = 0
    updates: int = 0
    refused: int = 0
    refused_in_row: int = 0
    gone: bool = False


@dataclass(slots=True)
class TaskRecord:
    """One task that was issued; `dispatched` in seconds."""

    client: str
    version: int
    steps: int
    dispatched: float
    state: str = "leased"
    hyper: dict[str, Scalar] = field(default_factory=dict)

    def task(self, id_: str) -> Task:
        """What was sent to the client."""
        return Task(id_, self.client, self.version, self.steps, hyper=self.hyper)


@dataclass(slots=True)
class State:
    """Everything that changes. `updates` counts those aggregated; `issued` all tasks; `ended` orders spent tasks;
    `memory` is what the aggregator remembers between groups, by blob name; `held_in_row` counts groups held since the
    last version, `unchanged` those of them since all expected clients had come and the last new one was among the rows.
    """

    vector: Vector
    scheduler: Any
    optimizer: Any
    now: float = 0.0
    version: int = 0
    updates: int = 0
    held_in_row: int = 0
    unchanged: int = 0
    issued: int = 0
    lease_wake: float = -1.0
    finished: str = ""
    blobs: dict[str, Array] = field(default_factory=dict)
    clients: dict[str, ClientRecord] = field(default_factory=dict)
    idle: dict[str, None] = field(default_factory=dict)
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)
    ended: dict[str, None] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


def encode(state: State) -> codec.Parts:
    """All of `state`, as buffers to write before it changes."""
    return codec.encode_parts({item.name: getattr(state, item.name) for item in fields(state)})


def decode(data: bytes, federation: Federation) -> State:
    """The state that `encode` was given. Raises msgspec.ValidationError where the strategies are others."""
    raw = codec.decode(data)
    vector = raw["vector"]
    raw["scheduler"] = codec.convert(raw["scheduler"], type(federation.scheduler.init()))
    raw["optimizer"] = codec.convert(raw["optimizer"], type(federation.optimizer.init(vector)))
    fold_type = type(federation.aggregator.init(1))
    for pool in raw["pools"].values():
        pool["folds"] = {name: codec.convert(fold, fold_type) for name, fold in pool["folds"].items()}
    memory_type = type(federation.aggregator.memory())
    raw["memory"] = {name: codec.convert(held, memory_type) for name, held in raw["memory"].items()}
    state = codec.convert(raw, State)
    state.vector.flags.writeable = False
    return state
