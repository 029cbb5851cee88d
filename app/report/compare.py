"""Several runs side by side: accuracy against time in one plot, and who met the target first.

Reads run folders, writes one page and one PNG. Must never run anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedge.core.errors import ExperimentError
from fedge.report import figures
from fedge.report.files import RunFiles, load
from fedge.report.page import Plots, render, scheduler, seconds, section, table
from fedge.report.style import replace_file, si
from fedge.report.timeline import busy, intervals, number


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one run. None: the target was missed, or the run did not record it.

    `relative` is the time to the target over that of the fastest run (1.0); `at_work` the share of their connected time
    that clients spent on work that counted; `bytes_total` both ways. `aggregator` names the rule and what stands in
    front of it, `byzantine` its f, `attack` who attacks and how many they are; `held` counts the groups too small for
    the rule, and `rejected` is the share of all judged rows that it rejected.
    """

    name: str
    scheduler: str
    time_to_target_s: float | None
    relative: float | None
    best_accuracy: float | None
    updates: int | None
    bytes_total: int | None
    at_work: float | None
    aggregator: str = ""
    byzantine: int | None = None
    attack: str = ""
    held: int | None = None
    rejected: float | None = None

    def cells(self) -> tuple[str, ...]:
        """As text, '-' where there is nothing; in the order of HEADS."""
        return (
            self.name,
            self.scheduler or "-",
            "-" if self.time_to_target_s is None else seconds(self.time_to_target_s),
            "-" if self.relative is None else f"{self.relative:.2f}",
            "-" if self.best_accuracy is None else f"{self.best_accuracy:.2%}",
            "-" if self.updates is None else f"{self.updates:,}",
            "-" if self.bytes_total is None else si(self.bytes_total),
            "-" if self.at_work is None else f"{self.at_work:.0%}",
            self.aggregator or "-",
            "-" if self.byzantine is None else str(self.byzantine),
            self.attack or "-",
            f"{self.held:,}" if self.held else "-",
            "-" if self.rejected is None else f"{self.rejected:.0%}",
        )


HEADS = (
    *("run", "scheduler", "time to target", "relative", "best accuracy", "updates", "bytes", "at work"),
    *("aggregator", "f", "attack", "held", "rejected"),
)
WORDS = ("run", "scheduler", "aggregator", "attack")  # columns to the left
ALWAYS = 8  # columns; the others are about hostile clients, and shown where a run has something in them


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows in the order the runs were given, the accuracy they are held to, and the files written."""

    target: float | None
    rows: tuple[Row, ...]
    page: Path
    plot: Path

    @property
    def heads(self) -> tuple[str, ...]:
        """HEADS, but for columns about hostile clients that are empty in every row."""
        return tuple(HEADS[index] for index in self._shown)

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """Each row as text, in the order of `heads`."""
        return [tuple(row.cells()[index] for index in self._shown) for row in self.rows]

    @property
    def _shown(self) -> list[int]:
        columns = list(zip(*(row.cells() for row in self.rows)))
        return [index for index in range(len(HEADS)) if index < ALWAYS or set(columns[index]) != {"-"}]


def compare(folders: Sequence[Path], out: Path, target: float | None = None) -> Comparison:
    """Write compare.html and compare.png into `out`; the figures of each run.

    The target is the lowest of the runs' own where none is given. Raises ExperimentError where a folder holds no run,
    the target is no accuracy, or matplotlib is not installed.
    """
    if target is not None and not 0 < target <= 1:
        raise ExperimentError(f"A target of {target:g} is no accuracy; give one above 0 and at most 1: 0.8 for 80 %.")
    runs = [load(folder) for folder in folders]
    if not runs:
        raise ExperimentError("There is nothing to compare; name at least one run folder.")
    if target is None:
        own = [number(run.summary["target"]) for run in runs if run.summary.get("target") is not None]
        target = min(own, default=None)
    names, plots = _names(runs), Plots()
    rows = _rows(runs, names, target)
    lines = {name: run.metrics for name, run in zip(names, runs)}
    drawing = plots("compare", lambda: figures.overlay(lines, target))
    caption = "Accuracy on the test set as time passes; a dot marks when a run first met the target."
    body = section("Accuracy", drawing, caption)
    found = Comparison(target, rows, out / "compare.html", out / "compare.png")
    numbers = [index for index, head in enumerate(found.heads) if head not in WORDS]
    body += f"<section><h2>Figures</h2>{table(found.heads, found.cells, numbers)}</section>"
    subtitle = "" if target is None else f"time to {target:.1%} accuracy, relative to the fastest run"
    plots.save(out)
    replace_file(found.page, render("Comparison", subtitle, body))
    return found


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Each run's name; that of its folder where two have the same, and a number where that does not tell either."""
    names = [run.name for run in runs]
    told = [run.folder.resolve().name if names.count(run.name) > 1 else run.name for run in runs]
    return [f"{name} #{i + 1}" if told.count(name) > 1 else name for i, name in enumerate(told)]


def _rows(runs: Sequence[RunFiles], names: Sequence[str], target: float | None) -> tuple[Row, ...]:
    times = [figures.first_at(run.metrics, target) for run in runs]
    fastest = min((time for time in times if time is not None), default=None)
    return tuple(_row(run, name, time, fastest) for run, name, time in zip(runs, names, times))


def _row(run: RunFiles, name: str, time: float | None, fastest: float | None) -> Row:
    relative = None
    if time is not None and fastest is not None:
        relative = time / fastest if fastest else 1.0
    last = run.metrics[-1] if run.metrics else {}
    found = {**last, **run.summary}
    scores = [number(entry["accuracy"]) for entry in run.metrics if entry.get("accuracy") is not None]
    moved = [found[key] for key in ("bytes_up", "bytes_down") if found.get(key) is not None]
    return Row(
        name=name,
        scheduler=scheduler(run),
        time_to_target_s=time,
        relative=relative,
        best_accuracy=max(scores, default=None),
        updates=None if found.get("updates") is None else int(number(found["updates"])),
        bytes_total=int(sum(map(number, moved))) if moved else None,
        at_work=busy(intervals(run.events)),
        **_hostility(run),
    )


def _hostility(run: RunFiles) -> dict[str, Any]:
    """Of a Row, what it says of the rule and of who attacks."""
    rule, attack = (_table(run.settings, *path) for path in (("server", "aggregator"), ("simulation", "attack")))
    before = rule.get("pre") if isinstance(rule.get("pre"), list) else []
    steps = [str(step.get("kind", "")) if isinstance(step, dict) else str(step) for step in before or []]
    verdicts = [one for one in _table(run.summary, "verdicts").values() if isinstance(one, dict)]
    judged = sum(number(one.get("judged")) for one in verdicts)
    return {
        "aggregator": f"{rule.get('kind', '')}{' behind ' + ', '.join(steps) if steps else ''}",
        "byzantine": int(number(rule["byzantine"])) if "byzantine" in rule else None,
        "attack": f"{attack.get('kind', '')} x {int(number(attack.get('clients', 1)))}" if attack else "",
        "held": None if run.summary.get("held") is None else int(number(run.summary["held"])),
        "rejected": sum(number(one.get("rejected")) for one in verdicts) / judged if judged else None,
    }


def _table(data: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The table there, or an empty one."""
    for key in path:
        inner = data.get(key)
        data = inner if isinstance(inner, dict) else {}
    return data
