"""Reading a run folder for the report: events, metrics, summary, experiment.

Owns the tolerance: a run that was cut off leaves half a line, a client may have claimed anything. What cannot be read
is left out. Must never write, and never trust a value's type.
"""

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedge.core.errors import ExperimentError


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds. `events` are in order of `t`, each with a finite `t` and its names as strings;
    `experiment` is the text of the file and `settings` the same, parsed.
    """

    folder: Path
    name: str
    events: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    experiment: str
    settings: dict[str, Any]


def load(folder: Path) -> RunFiles:
    """Read what is there. Raises ExperimentError where `folder` holds neither metrics nor events."""
    if not (folder / "metrics.jsonl").is_file() and not (folder / "events.jsonl").is_file():
        raise ExperimentError(f"{folder} holds no metrics.jsonl and no events.jsonl; name a folder 'fedge run' wrote.")
    experiment = _text(folder / "experiment.toml")
    try:
        settings = tomllib.loads(experiment)
    except tomllib.TOMLDecodeError:
        settings = {}
    summary = next(iter(_objects(_text(folder / "summary.json"), lines=False)), {})
    name = str(summary.get("name") or folder.resolve().name)
    return RunFiles(folder, name, _events(folder), _metrics(folder), summary, experiment, settings)


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _objects(text: str, lines: bool = True) -> list[dict[str, Any]]:
    found = []
    for part in text.splitlines() if lines else [text]:
        try:
            value = json.loads(part)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _timed(entry: dict[str, Any]) -> bool:
    time = entry.get("t")
    return isinstance(time, int | float) and not isinstance(time, bool) and math.isfinite(time)


def _events(folder: Path) -> list[dict[str, Any]]:
    events, last = [], 0.0
    for entry in _objects(_text(folder / "events.jsonl")):
        if not _timed(entry) or not isinstance(entry.get("event"), str):
            continue
        last = entry["t"] = max(last, float(entry["t"]))
        for key in ("client", "task"):
            if key in entry:
                entry[key] = str(entry[key])
        for key in ("pools", "members", "absent", "clients"):
            if not isinstance(entry.get(key, []), list):
                entry[key] = []
        for key in ("members", "absent"):
            entry[key] = [member for member in entry.get(key, []) if isinstance(member, dict)]
        events.append(entry)
    return events


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return sorted((entry for entry in _objects(_text(folder / "metrics.jsonl")) if _timed(entry)), key=lambda e: e["t"])
