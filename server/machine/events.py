"""What goes into the federation machine (events, each with its time `now`) and what comes out (effects).

Times are seconds on one clock that never goes back: virtual in a simulation, monotonic behind gRPC. Must never hold
logic: an event is a fact, an effect is a wish that a shell fulfils.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedge.core.task import Broadcast, Task, Update


@dataclass(frozen=True, slots=True)
class Joined:
    """A client has connected, or connected again. `layout_hash` is that of its model; empty where it has none yet."""

    now: float
    client: str
    examples: int = 0
    layout_hash: str = ""


@dataclass(frozen=True, slots=True)
class Arrived:
    """An update was received whole and its bytes verified."""

    now: float
    update: Update


@dataclass(frozen=True, slots=True)
class Failed:
    """A client says that its task came to nothing."""

    now: float
    client: str
    task_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Left:
    """A client has gone; `for_good` where it is known never to come back."""

    now: float
    client: str
    reason: str = "left"
    for_good: bool = False


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has come to `now`."""

    now: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The shell measured a version on the test set."""

    now: float
    version: int
    metrics: Mapping[str, float]


Event = Joined | Arrived | Failed | Left | Ticked | Evaluated


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Give this task to its client."""

    client: str
    task: Task


@dataclass(frozen=True, slots=True)
class Publish:
    """A new version of the model."""

    broadcast: Broadcast


@dataclass(frozen=True, slots=True)
class Ack:
    """The update of this task counts, or has counted before (`repeated`): the client may forget it."""

    client: str
    task_id: str
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Refuse:
    """The update of this task does not count. `reason` and `status` are those of the error."""

    client: str
    task_id: str
    reason: str
    status: str
    detail: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Drop the client and do not let it join again."""

    client: str
    reason: str


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send Ticked at this time."""

    at: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The stop criterion is met; nothing more will be dispatched."""

    reason: str


@dataclass(frozen=True, slots=True)
class Record:
    """One line for events.jsonl: {"t": now, "event": kind, **values}."""

    t: float
    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)


Effect = Dispatch | Publish | Ack | Refuse | Evict | WakeAt | Finished | Record
