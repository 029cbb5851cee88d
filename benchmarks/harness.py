"""What every benchmark shares: facts of the machine and the versions, paired timing, a table or one JSON object, goals.

The machine may be busy with others, so things to be compared are timed in turns and compared pair by pair. Must never
know what is measured.
"""

import argparse
import json
import operator
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("fedge", "numpy", "torch", "onnxruntime", "onnx", "grpcio", "flwr", "ray", "pfl", "byzfl")
MISSING = "missing"
_COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Goal:
    """One goal of a benchmark, held or not; `value` is None where it could not be measured."""

    name: str
    value: float | None
    goal: str
    holds: bool


def goal(name: str, value: float | None, wanted: str) -> Goal:
    """A goal such as "<= 1.3"; never held where there is no value."""
    sign, bound = wanted.split()[:2]
    holds = value is not None and bool(_COMPARISONS[sign](value, float(bound)))
    return Goal(name, None if value is None else round(value, 3), wanted, holds)


def arguments(about: str, argv: Sequence[str] | None = None, **more: str) -> argparse.Namespace:
    """`json` and `quick`, from the command line, and the text of each further option, by name what it is for."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a cut-down run of under a minute")
    for name, what in more.items():
        parser.add_argument(f"--{name}", default="", help=what)
    return parser.parse_args(argv)


def in_turns(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    before: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each work by name: `repeats` times one after the other, the order turned round each time.

    `before` is called with the name ahead of each, and not timed.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    for _ in range(repeats):
        for name in order:
            if before:
                before(name)
            begun = time.perf_counter()
            works[name]()
            taken[name].append(time.perf_counter() - begun)
        order.reverse()
    return taken


def ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """The median of the ratios pair by pair."""
    return median(one / other for one, other in zip(above, below))


def emit(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    goals: Sequence[Goal],
    *,
    as_json: bool,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Print the result: a table and the goals, or the one JSON object of the benchmark contract."""
    versions = {"python": platform.python_version()} | {package: installed(package) for package in PACKAGES}
    if as_json:
        result = {"benchmark": name, "machine": machine(), "versions": versions, "rows": list(rows)}
        print(json.dumps(result | {"goals": [asdict(goal) for goal in goals]} | dict(notes or {})))
        return
    facts = {**machine(), **versions}
    table = Table(title=name, caption=", ".join(f"{key} {value}" for key, value in facts.items()))
    for key in dict.fromkeys(key for row in rows for key in row):
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(
            *("" if row.get(str(column.header)) is None else str(row[str(column.header)]) for column in table.columns)
        )
    console = Console(width=200)
    console.print(table)
    for one in goals:
        console.print(f"{'holds ' if one.holds else 'MISSED'} {one.name}: {one.value} (goal {one.goal})")


def machine() -> dict[str, Any]:
    """The processor, its cores, the memory, and how busy the machine was just now."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    load = round(os.getloadavg()[0], 1)
    return {"processor": _processor(), "cores": os.cpu_count(), "memory_gib": round(memory), "load": load}


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(package: str) -> str:
    """Its version, or that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING
