"""The contracts between the federation machine and the algorithms that plug into it.

A strategy is a frozen dataclass of settings. What changes is a state that goes in and comes out: plain data
(dataclasses, dicts, lists, numbers, strings, NumPy arrays), so that it can be written to a snapshot and replayed.
A state is handed over: `step` may change it in place, and the caller goes on with the one returned.

Owns the words spoken between them. Must never hold an algorithm.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from fedge.core.params import Array, Vector
from fedge.core.task import Broadcast, Scalar, Task


@dataclass(frozen=True, slots=True)
class Arrival:
    """What strategies see of an accepted update: its metadata, never its vector.

    `version` is the base version; `staleness` counts the versions published between base and arrival. `duration_s`
    runs from dispatch to arrival on the coordinator's clock. `steps`, at most those `asked` for, and `examples` are
    claimed by the client, within the limits.
    `overdue`: the task had been given up (Lost was sent) before its update came after all; the client may be busy with
    another by now.
    """

    client: str
    task_id: str
    version: int
    staleness: int
    steps: int
    asked: int
    examples: int
    duration_s: float
    norm: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    overdue: bool = False


# ---- signals: what a scheduler is told ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """A client is connected and idle, and has not just delivered: it joined, came back, or its task came to nothing."""

    client: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """An update passed the screen. The scheduler answers with exactly one Keep or Discard; its client is now idle."""

    arrival: Arrival


@dataclass(frozen=True, slots=True)
class Lost:
    """The client's task will bring nothing in time: it left, failed, was refused, or its lease ran out."""

    client: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """A time asked for with Wake has come (others may come too)."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Pools were aggregated and a new version is out. `norm` is that of the aggregate, before the server's step."""

    pools: tuple[str, ...]
    members: tuple[Arrival, ...]
    norm: float


Signal = Ready | Arrived | Lost | Ticked | Closed


# ---- orders: what a scheduler wants done -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Train:
    """Dispatch `steps` local steps on the current version to an idle client."""

    client: str
    steps: int
    hyper: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Keep:
    """Fold the update that just arrived into the pool of that name.

    `late`: it missed the group it was meant for. `share` multiplies the weigher's.
    """

    pool: str
    late: bool = False
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Discard:
    """Refuse the update that just arrived as too stale."""

    why: str


@dataclass(frozen=True, slots=True)
class Close:
    """Aggregate these pools together and move the model by `step` times the aggregate (times the mean discount)."""

    pools: tuple[str, ...]
    step: float = 1.0


@dataclass(frozen=True, slots=True)
class Wake:
    """Send Ticked at this time (seconds on the machine's clock)."""

    at: float


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the record of the run, e.g. Note("group", {"group": "g3", "expected_t": 12.0})."""

    kind: str
    values: Mapping[str, Any]


Order = Train | Keep | Discard | Close | Wake | Note


@dataclass(slots=True)
class Fleet:
    """The federation as strategies see it; read-only to them. `idle` holds connected clients without a task."""

    seed: int
    expected: int  # N: how many clients the experiment is made for, without those shut out
    now: float = 0.0
    version: int = 0
    idle: dict[str, None] = field(default_factory=dict)  # an ordered set: who has been idle longest comes first
    examples: dict[str, int] = field(default_factory=dict)  # of each connected client, as it said on joining


class Scheduler(Protocol):
    """Who trains, for how many steps, and which arrivals form a group."""

    def init(self) -> Any:
        """The state before the first client has joined."""

    def step(self, state: Any, signal: Signal, fleet: Fleet) -> tuple[Any, Sequence[Order]]:
        """One signal in, orders out; carried out in the order given."""


class Selector(Protocol):
    """Which of the idle clients take part in a round."""

    def select(self, fleet: Fleet, round_: int) -> list[str]:
        """Names out of `fleet.idle`; a pure function of (seed, round, who is idle)."""


class Weigher(Protocol):
    """One scalar per update from its metadata."""

    def weigh(self, arrival: Arrival) -> float:
        """At least 0. A share (examples) is relative to the group, a discount (staleness) is in (0, 1]."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one row: its distance to the aggregate over the median of those distances, and whether it counted.

    `coefficient` is the factor with which it entered the aggregate, where the rule has one for the row as a whole.
    """

    score: float
    rejected: bool
    coefficient: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """An aggregate, float32 [size]; the verdicts by client, where rows were judged; and the memory to hand in next."""

    vector: Vector
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    memory: Any = None


class Aggregator(Protocol):
    """Rows and weights to one vector, fed row by row.

    `associative`: rows may be forgotten once folded, and states merged in any tree. Where it is False, `fold` may keep
    the row itself, so the caller must not reuse its buffer; it is a KeepsRows then, and each client has one row in a
    group, its newest.
    """

    associative: ClassVar[bool]

    @property
    def honours_weights(self) -> bool:
        """Whether the weights of rows change anything."""

    def min_rows(self) -> int:
        """Fewer clients than this are never enough."""

    def lacks(self, clients: Collection[str], memory: Any) -> str:
        """What a group of these clients misses, in words: such a group is held and merged with the next. Else empty."""

    def memory(self) -> Any:
        """What outlives a group, before the first one; None where nothing does."""

    def init(self, size: int) -> Any:
        """The state for vectors of `size` elements."""

    def fold(self, state: Any, row: Array, weight: float) -> Any:
        """`state` with one more row [size]."""

    def merge(self, state: Any, other: Any) -> Any:
        """Both states as one, the rows of `other` behind."""

    def finish(self, state: Any, clients: Sequence[str], memory: Any, seed: int) -> Outcome:
        """The aggregate. `clients` are whose the rows are, in the order of folding; `seed` is this group's own.

        State and memory are used up.
        """


@runtime_checkable
class KeepsRows(Protocol):
    """An aggregator that holds on to its rows, so that a client's newer one can take the place of its older."""

    def drop(self, state: Any, index: int) -> Any:
        """`state` without its row at `index`, counted in the order of folding."""


@dataclass(frozen=True, slots=True)
class Group:
    """The updates aggregated together. `weights` are as given to the aggregator; `step` is the server's scale.

    `verdicts` are on the deltas, by client: of the members, and of others whose last update was taken in again.
    """

    pools: tuple[str, ...]
    members: tuple[Arrival, ...]
    weights: tuple[float, ...]
    step: float
    expected: int  # N
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)


class ServerOptimizer(Protocol):
    """Applies an aggregate as a pseudo-gradient."""

    def init(self, vector: Vector) -> Any:
        """The state at version 0, whose parameters are `vector`."""

    def step(
        self, state: Any, vector: Vector, aggregate: Mapping[str, Vector], group: Group
    ) -> tuple[Any, Vector, Mapping[str, Array]]:
        """(state, new parameters, blobs to broadcast). `aggregate["delta"]` is the pseudo-gradient, already scaled by
        `group.step`; further blobs are unscaled. `vector` must not be changed.
        """


class Work(Protocol):
    """One task in progress on a client, as a hook sees it. Vectors are of the trainer's kind (torch, flat [trainable]).

    `start` holds the received parameters, `params` the live ones, `grad` their gradient; `blobs` came with the
    broadcast. `rate` is the learning rate of a local step. `scratch` is for what hooks remember during this one task,
    under keys that begin with their name.
    """

    task: Task
    broadcast: Broadcast
    start: Any
    params: Any
    grad: Any
    rate: float
    scratch: dict[str, Any]

    def descend(self, vector: Any, steps: int, adjust: Any) -> Any:
        """Train from `vector` for `steps` on the client's data, apart from the task's own parameters; the result, a
        new vector. `adjust(work)` is called before each step with `work.params` and `work.grad` of that training.
        """


class ClientHook(Protocol):
    """Terms in a client's loss or gradient, with state that outlives the task.

    `state` is this hook's own part of the client's state: a dict of NumPy arrays, kept across tasks and restarts.
    """

    def begin(self, work: Work, state: dict[str, Array]) -> None:
        """Before the first step."""

    def penalty(self, work: Work, model: Any, batch: Any, output: Any) -> Any:
        """A term added to the loss of one batch, or None."""

    def adjust(self, work: Work) -> None:
        """After backward, before the step: change `work.grad` in place."""

    def finish(self, work: Work, state: dict[str, Array]) -> Mapping[str, Array]:
        """After the last step: store what lasts in `state`; return further blobs for the update."""
