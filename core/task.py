"""What travels between coordinator and clients, as objects: the broadcast, the task, the update.

Owns their fields and meaning. Must never hold bytes of the wire (see fedge.protos) or behaviour of a strategy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedge.core.params import Array, Vector

Scalar = bool | int | float | str
DELTA = "delta"  # the blob that holds base - local, float32 [d]


@dataclass(frozen=True, slots=True)
class Broadcast:
    """One version of the global model: the same for every client, encoded once.

    `vector` is float32 [d] and read-only; `blobs` are further vectors that a server optimizer shares (SCAFFOLD's
    control variate).
    """

    version: int
    vector: Vector
    blobs: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work for one client. `id` is single-use; `version` is the broadcast to start from."""

    id: str
    client: str
    version: int
    steps: int
    kind: str = "train"
    hyper: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Update:
    """What a client made of a task.

    `blobs["delta"]` is base - local, float32 [d] (the pseudo-gradient); further blobs are vectors of a hook's own.
    `timings` are seconds ("compute_s", "download_s", "upload_s"); `metrics` are floats ("loss": mean training loss).
    """

    client: str
    task_id: str
    base_version: int
    steps: int
    examples: int
    blobs: Mapping[str, Array]
    timings: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def delta(self) -> Vector:
        """The pseudo-gradient, float32 [d]."""
        return self.blobs[DELTA]

    @property
    def nbytes(self) -> int:
        """Size of all blobs, in bytes."""
        return sum(np.asarray(blob).nbytes for blob in self.blobs.values())
