"""What every benchmark shares: facts of the machine and the versions, a table or one JSON object, goals held or not."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("fedge", "numpy", "torch", "grpcio", "flwr", "ray", "pfl")


@dataclass(frozen=True)
class Goal:
    """One goal of a benchmark, held or not."""

    name: str
    value: float
    goal: str
    holds: bool


def emit(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    goals: Sequence[Goal],
    *,
    as_json: bool,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Print the result: a table and the goals, or the one JSON object of the benchmark contract."""
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version()} | {package: installed(package) for package in PACKAGES}
    if as_json:
        result = {"benchmark": name, "machine": machine, "versions": versions, "rows": list(rows)}
        print(json.dumps(result | {"goals": [asdict(goal) for goal in goals]} | dict(notes or {})))
        return
    table = Table(title=name, caption=", ".join(f"{key} {value}" for key, value in versions.items()))
    for key in rows[0]:
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console = Console(width=200)
    console.print(table)
    for goal in goals:
        console.print(f"{'holds ' if goal.holds else 'MISSED'} {goal.name}: {goal.value} (goal {goal.goal})")


def installed(package: str) -> str:
    """Its version, or that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
