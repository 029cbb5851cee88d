"""The plain figures of the report: learning curves, staleness, traffic, who holds which data.

Each takes values and gives a Figure, or None where there is nothing to show; within a style context. The timeline has a
file of its own (gantt). Must never read a file.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedge.report.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    SERIES,
    SKY,
    VERMILLION,
    figure,
    labels,
    plain,
    si,
)
from fedge.report.timeline import Event, number

MAX_CLIENTS, MAX_CLASSES = 40, 40


def curves(metrics: Sequence[Mapping[str, Any]], target: float | None, reached_s: float | None) -> Any:
    """Accuracy and, beside it, loss against time; the target, and when it was reached."""
    scores, losses = _points(metrics, "accuracy"), _points(metrics, "loss")
    if not scores and not losses:
        return None
    drawn = figure(11.0, 3.7)
    left, right = drawn.subplots(1, 2, width_ratios=[1.5, 1])
    _line(left, scores, BLUE)
    _line(right, losses, BLUE, label="test")
    _line(right, _points(metrics, "train_loss"), VERMILLION, label="training", ls="--", lw=1.2)
    if target is not None:
        left.axhline(target, color=MUTED, lw=1, ls=(0, (4, 3)))
        left.annotate(
            f"target {target:.0%}", (0, target), (4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", color=MUTED, size=8.5,
        )  # fmt: skip
        if reached_s is not None:
            _reached(left, reached_s, target)
    left.set_ylabel("accuracy")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set_ylabel("loss")
    if right.lines:
        right.legend(loc="upper right", fontsize=8.5)
    for axes in (left, right):
        axes.set_xlabel("time since the start (s)")
        axes.set_xlim(left=0)
        axes.grid(axis="y")
    return drawn


def _reached(axes: Any, reached_s: float, target: float) -> None:
    axes.vlines(reached_s, axes.get_ylim()[0], target, color=GREEN, lw=1.2)
    axes.plot([reached_s], [target], marker="o", ms=7, color=GREEN, mec="white", mew=1.2, zorder=5)
    axes.annotate(
        f"{reached_s:.4g} s",
        (reached_s, target),
        (7, -13),
        textcoords="offset points",
        color=GREEN,
        weight="bold",
        size=9.5,
    )


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    known = ((entry["t"], number(entry.get(key), float("nan"))) for entry in metrics)
    return [(time, value) for time, value in known if value == value]


def _line(axes: Any, points: list[tuple[float, float]], color: str, **look: Any) -> None:
    if points:
        few = {"marker": "o", "ms": 3.2} if len(points) <= 30 else {}
        axes.plot(*zip(*points), color=color, **{"lw": 1.7, **few, **look})


def overlay(runs: Mapping[str, Sequence[Mapping[str, Any]]], target: float | None) -> Any:
    """Accuracy against time, one line per run; names in the order given."""
    drawn = figure(8.2, 4.4)
    axes = drawn.subplots()
    for i, (name, metrics) in enumerate(runs.items()):
        style = ("-", "--", ":")[i // len(SERIES) % 3]
        _line(
            axes, _points(metrics, "accuracy"), SERIES[i % len(SERIES)], label=plain(name).lstrip("_") or "-", ls=style
        )
        reached = first_at(metrics, target)
        if reached is not None and target is not None:
            axes.plot(
                [reached], [target], marker="o", ms=7, color=SERIES[i % len(SERIES)], mec="white", mew=1.2, zorder=5
            )
    if target is not None:
        axes.axhline(target, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"target {target:.0%}", (1, target), (-4, 4), xycoords=("axes fraction", "data"),
            textcoords="offset points", color=MUTED, size=8.5, ha="right",
        )  # fmt: skip
    axes.set_xlabel("time since the start (s)")
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    return drawn


def first_at(metrics: Sequence[Mapping[str, Any]], target: float | None) -> float | None:
    """When the accuracy first was at least `target`, in seconds; None where it never was."""
    if target is None:
        return None
    return next((time for time, accuracy in _points(metrics, "accuracy") if accuracy >= target), None)


def staleness(events: Sequence[Event]) -> Any:
    """How many versions behind the accepted updates were."""
    counts = Counter(int(number(event.get("staleness"))) for event in events if event["event"] == "arrived")
    if not counts:
        return None
    drawn = figure(3.9, 2.9)
    axes = drawn.subplots()
    most = max(counts)
    width = max(1, -(-(most + 1) // 40))  # at most 40 bars
    bars = Counter(dict.fromkeys(range(most // width + 1), 0))
    for value, count in counts.items():
        bars[max(0, value) // width] += count
    axes.bar([bin_ * width for bin_ in bars], list(bars.values()), width=0.82 * width, color=BLUE)
    axes.set_xlabel("staleness (versions behind)" + (f", in steps of {width}" if width > 1 else ""))
    axes.set_ylabel("updates")
    axes.locator_params(axis="both", integer=True, nbins=8, min_n_ticks=1)
    axes.grid(axis="y")
    return drawn


def traffic(events: Sequence[Event], clients: Sequence[str], total_down: float) -> Any:
    """Bytes sent and received per client. Downloads are the total shared out by dispatched tasks."""
    up: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    for event in events:
        if event["event"] == "arrived":
            up[event.get("client", "")] += int(number(event.get("bytes")))
        tasks[event.get("client", "")] += event["event"] == "dispatched"
    share = total_down / max(1, sum(tasks.values()))
    shown = list(clients)[:MAX_CLIENTS]
    if not shown or not (sum(up.values()) or total_down):
        return None
    drawn = figure(3.9, max(2.9, 0.21 * len(shown) + 0.9))
    axes = drawn.subplots()
    rows = range(len(shown))
    axes.barh([row - 0.2 for row in rows], [up[name] for name in shown], height=0.36, color=GREEN, label="up")
    if total_down:
        down = [tasks[name] * share for name in shown]
        axes.barh([row + 0.2 for row in rows], down, height=0.36, color=SKY, label="down (estimated)")
    axes.set_ylim(len(shown) - 0.4, -0.6)
    labels(axes.yaxis, rows, shown, color=INK, fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: si(value))
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x")
    drawn.legend(loc="outside upper right", ncols=2, fontsize=8.5)
    return drawn


def partition(classes: Sequence[object], clients: Sequence[object], counts: Sequence[Sequence[float]]) -> Any:
    """Who holds how much of which class: one bubble per client and class, its area in proportion; sums above.

    `counts` is [client][class]. More than MAX_CLIENTS clients or MAX_CLASSES classes are cut off.
    """
    rows = [list(row)[:MAX_CLASSES] for row in counts[:MAX_CLIENTS]]
    clients, classes = list(clients)[: len(rows)], list(classes)[:MAX_CLASSES]
    most = max((number(count) for row in rows for count in row), default=0.0)
    if not most:
        return None
    wide, high = 0.3 * max(10, len(clients)) + 1.2, 0.24 * max(6, len(classes)) + 1.0
    drawn = figure(min(11.0, wide), high + 1.0)
    above, axes = drawn.subplots(2, 1, sharex=True, height_ratios=[0.8, high])
    above.bar(range(len(clients)), [sum(map(number, row)) for row in rows], width=0.6, color=SKY)
    above.set_ylabel("examples", size=8)
    above.tick_params(axis="x", length=0, labelbottom=False)
    above.spines["bottom"].set_visible(False)
    above.locator_params(axis="y", nbins=2)
    places = [(x, y, number(n)) for x, row in enumerate(rows) for y, n in enumerate(row) if number(n) > 0]
    xs, ys, sizes = zip(*places)
    axes.scatter(xs, ys, s=[190 * size / most for size in sizes], color=BLUE, alpha=0.85, lw=0)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.set_xlim(-0.6, len(clients) - 0.4)
    labels(axes.yaxis, range(len(classes)), classes, color=INK, fontsize=8)
    labels(axes.xaxis, range(len(clients)), clients, color=INK, fontsize=8, rotation=90 if len(clients) > 4 else 0)
    axes.set_ylabel("class")
    axes.grid(alpha=0.6)
    return drawn
