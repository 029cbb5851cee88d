"""How long a local step takes on each client: homogeneous, normal, exponential, or as recorded.

The first three are the settings of the FedCompass experiments: client i has mean mu_i, and each task's step time is
N(mu_i, (jitter mu_i)^2). Pure functions of (seed, client, task); must never look at a clock.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import msgspec

from fedge.core.errors import DataError, ExperimentError
from fedge.core.random import generator
from fedge.core.registry import Registry

FASTEST_RATIO = 20.0  # no drawn client is faster than mean / FASTEST_RATIO: a time of zero has no meaning


class StepTimes(Protocol):
    """Seconds per local step."""

    def step_s(self, client: int, task: int, seed: int) -> float:
        """The mean of one task (its number counts from 0) of one client (its index), before jitter."""


@dataclass(frozen=True)
class Homogeneous:
    """Every client alike."""

    mean_s: float = 0.15

    def __post_init__(self) -> None:
        _positive(self.mean_s)

    def step_s(self, client: int, task: int, seed: int) -> float:
        """`mean_s`."""
        return self.mean_s


@dataclass(frozen=True)
class Normal:
    """mu_i ~ N(mean, (spread * mean)^2)."""

    mean_s: float = 0.15
    spread: float = 0.3

    def __post_init__(self) -> None:
        _positive(self.mean_s)

    def step_s(self, client: int, task: int, seed: int) -> float:
        """The client's mean."""
        return _drawn("normal", self.mean_s, self.spread * self.mean_s, client, seed)


@dataclass(frozen=True)
class Exponential:
    """mu_i ~ Exp(mean): a few clients are very slow, many fast."""

    mean_s: float = 0.15

    def __post_init__(self) -> None:
        _positive(self.mean_s)

    def step_s(self, client: int, task: int, seed: int) -> float:
        """The client's mean."""
        return _drawn("exponential", self.mean_s, 0.0, client, seed)


@dataclass(frozen=True)
class Trace:
    """Recorded step times: a JSON file with one list of seconds per client, repeated from its start when used up.

    Client i uses list i modulo their number, so that a few recorded devices stand for many.
    """

    file: str

    @cached_property
    def _lists(self) -> list[list[float]]:
        try:
            lists = msgspec.json.decode(Path(self.file).read_bytes(), type=list[list[float]])
        except OSError as error:
            raise DataError(f"simulation.speeds.file: cannot read {self.file!r} ({error.strerror}).") from None
        except msgspec.DecodeError as error:
            raise DataError(
                f"simulation.speeds.file: {self.file!r} is no JSON list of lists of seconds ({error})."
            ) from None
        if not lists or not all(times and min(times) > 0 for times in lists):
            raise DataError(f"simulation.speeds.file: {self.file!r} needs a list of times above 0 for every client.")
        return lists

    def step_s(self, client: int, task: int, seed: int) -> float:
        """The recorded time."""
        times = self._lists[client % len(self._lists)]
        return times[task % len(times)]


@cache
def _drawn(kind: str, mean_s: float, spread_s: float, client: int, seed: int) -> float:
    random = generator(seed, "speed", client)
    drawn = random.normal(mean_s, spread_s) if kind == "normal" else random.exponential(mean_s)
    return max(float(drawn), mean_s / FASTEST_RATIO)


def _positive(mean_s: float) -> None:
    if not mean_s > 0:
        raise ExperimentError(f"simulation.speeds.mean_s is {mean_s}; seconds per step must be above 0.")


SPEEDS = Registry(
    "simulation.speeds",
    {
        "homogeneous": "fedge.simulation.speeds:Homogeneous",
        "normal": "fedge.simulation.speeds:Normal",
        "exponential": "fedge.simulation.speeds:Exponential",
        "trace": "fedge.simulation.speeds:Trace",
    },
)
