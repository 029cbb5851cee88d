"""The choice: the fastest option that keeps every bound, and at which bandwidths another one takes over.

Must never measure, and never hold state (see `replan`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from fedge.core.errors import ExperimentError
from fedge.edge.plan.link import Link
from fedge.edge.plan.options import Option
from fedge.edge.plan.profile import Profile
from fedge.edge.plan.scale import AS_PROFILED, Scale


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a plan must keep; None asks for nothing. Raises ExperimentError for a bound that is no bound.

    `deadline_s` holds for a sample that never leaves early; `memory_bytes` is what the device's sessions hold;
    `energy_j` is radio energy per sample, at `joule_per_byte`; `accuracy` is on held-out data; `keep_input` forbids
    to send the input itself in any coding, be it beside other tensors of a cut.
    """

    deadline_s: float | None = None
    memory_bytes: int | None = None
    energy_j: float | None = None
    joule_per_byte: float = 0.0
    accuracy: float | None = None
    keep_input: bool = False

    def __post_init__(self) -> None:
        for name in ("deadline_s", "memory_bytes", "energy_j", "joule_per_byte", "accuracy"):
            figure = getattr(self, name)
            if figure is not None and not 0 <= figure < math.inf:
                raise ExperimentError(f"The bound {name} is {figure}; give a number that is finite and at least 0.")


@dataclass(frozen=True, slots=True)
class Row:
    """One option on one link: its expected and its longest latency, and the bounds that it breaks."""

    option: Option
    latency_s: float
    longest_s: float
    breaks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen option, and every option with what speaks against it."""

    choice: Option
    rows: tuple[Row, ...]


def check_memory(device: Profile | None, bounds: Bounds) -> None:
    """Raises ExperimentError for a bound on memory that no figure of the device can be held against.

    What is not known does not count as kept, so the input itself would be sent, without a word; a bound of 0 asks for
    just that.
    """
    if bounds.memory_bytes and not (device and device.memory_bytes):
        raise ExperimentError(
            "A bound on memory needs what the pieces take, which this device's profile does not tell; "
            "measure it with `fedge edge bench --out FILE` and name that file, or leave out the bound."
        )


def plan(options: Sequence[Option], link: Link, bounds: Bounds, scale: Scale = AS_PROFILED) -> Plan:
    """The fastest option that keeps all bounds. Raises ExperimentError, with the bound to move, where none does."""
    rows = tuple(_row(option, link, bounds, scale) for option in options)
    kept = [row for row in rows if not row.breaks]
    if not kept:
        raise ExperimentError(_advice(rows, bounds))
    return Plan(min(kept, key=lambda row: row.latency_s).option, rows)


def switches(
    options: Sequence[Option], bounds: Bounds, rtt_s: float, low_bps: float, high_bps: float
) -> tuple[tuple[float, Option | None], ...]:
    """(bandwidth from which it wins, winner), from `low_bps` up to `high_bps`; exact.

    Latencies are lines in 1 / bandwidth, so the winner can only change where two of them cross or one meets the
    deadline: all those places are tried.
    """
    static = [option for option in options if not _breaks_static(option, bounds)]
    lines = [(_fixed_s(option, rtt_s), option.sent * 8 * option.link_bytes) for option in static]
    places = {_crossing(*first, *second) for first, second in combinations(lines, 2)}
    if bounds.deadline_s is not None:
        longest = ((option.longest_s(Link(math.inf, rtt_s)), 8 * option.link_bytes) for option in static)
        places |= {_crossing(fixed, slope, bounds.deadline_s, 0.0) for fixed, slope in longest}
    edges = [low_bps, *sorted(place for place in places if low_bps < place < high_bps), high_bps]
    found: list[tuple[float, Option | None]] = []
    for low, high in pairwise(edges):
        winner = _winner(static, Link(math.sqrt(low * high), rtt_s), bounds)
        if not found or found[-1][1] != winner:
            found.append((low, winner))
    return tuple(found)


def _fixed_s(option: Option, rtt_s: float) -> float:
    return option.latency_s(Link(math.inf, rtt_s))


def _crossing(fixed: float, slope: float, other_fixed: float, other_slope: float) -> float:
    """The bandwidth at which fixed + slope / bandwidth is the same for both; 0 where there is none."""
    apart = other_fixed - fixed
    return (slope - other_slope) / apart if apart else 0.0


def _winner(options: Sequence[Option], link: Link, bounds: Bounds) -> Option | None:
    rows = (_row(option, link, bounds, AS_PROFILED) for option in options)
    kept = [row for row in rows if not row.breaks]
    return min(kept, key=lambda row: row.latency_s).option if kept else None


def _row(option: Option, link: Link, bounds: Bounds, scale: Scale) -> Row:
    longest_s = option.longest_s(link, scale)
    late = bounds.deadline_s is not None and longest_s > bounds.deadline_s
    breaks = _breaks_static(option, bounds) + (("deadline_s",) if late else ())
    return Row(option, option.latency_s(link, scale), longest_s, breaks)


def _breaks_static(option: Option, bounds: Bounds) -> tuple[str, ...]:
    """The bounds that this option breaks on any link. What is not known does not count as kept."""
    broken = {
        "memory_bytes": _over(option.memory_bytes, bounds.memory_bytes),
        "energy_j": _over(energy_j(option, bounds), bounds.energy_j),
        "accuracy": bounds.accuracy is not None and (option.accuracy is None or option.accuracy < bounds.accuracy),
        "keep_input": bounds.keep_input and option.carries_input,
    }
    return tuple(name for name, breaks in broken.items() if breaks)


def _over(figure: float | None, bound: float | None) -> bool:
    return bound is not None and (figure is None or figure > bound)


def energy_j(option: Option, bounds: Bounds) -> float:
    """Expected radio energy of one sample in joules."""
    return option.sent * option.bytes * bounds.joule_per_byte


def _advice(rows: Sequence[Row], bounds: Bounds) -> str:
    """Which bound excludes most, and the values that would let the nearest option pass."""
    if not rows:
        return "There is no option to choose from; measure device and cloud for this bundle first."
    counts = {name: sum(name in row.breaks for row in rows) for row in rows for name in row.breaks}
    worst = max(counts, key=lambda name: counts[name])
    nearest = min(rows, key=lambda row: (len(row.breaks), worst not in row.breaks, row.latency_s))
    values: dict[str, Callable[[], object]] = {
        "deadline_s": lambda: _enough(nearest.longest_s),
        "memory_bytes": lambda: _memory(nearest.option.memory_bytes),
        "energy_j": lambda: _enough(energy_j(nearest.option, bounds)),
        "accuracy": lambda: nearest.option.accuracy,
        "keep_input": lambda: "false",
    }
    wanted = " and ".join(f"{name} = {values[name]()}" for name in nearest.breaks)
    return (
        f"No option keeps all bounds, and {worst} excludes most ({counts[worst]} of {len(rows)}): "
        f"set {wanted} to allow '{nearest.option.name}'."
    )


def _enough(figure: float) -> str:
    """Three digits of it, rounded up: who sets this bound keeps it."""
    short = float(f"{figure:.2e}")
    return f"{short if short >= figure * (1 - 1e-9) else short + 10.0 ** (math.floor(math.log10(figure)) - 2):.3g}"


def _memory(size: int | None) -> str:
    """Bytes, and megabytes rounded up as `--memory` takes them."""
    return "None" if size is None else f"{size} ({math.ceil(size / 1e5) / 10:g} MB)"
