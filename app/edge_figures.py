"""Figures of split inference: latency against bandwidth with the planner's choice, and bytes against accuracy.

Must never measure or plan: it draws what `fedge.edge.plan` computes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedge.core.errors import ExperimentError
from fedge.edge.bundle import INPUT
from fedge.edge.plan.link import Link
from fedge.edge.plan.options import RAW, Option
from fedge.edge.plan.planner import Bounds, plan, switches
from fedge.report.style import INK, MUTED, RULE, SERIES, context, figure, plain, si, write_png

LOW_BPS, HIGH_BPS = 1e5, 1e9
STEPS = 161
LEAST_MS = 1e-3  # a logarithmic axis has no 0
APART = 0.052  # of the height, between names
GRAY = "#c3cad2"  # options that are not named


def draw_plan(path: Path, options: Sequence[Option], link: Link | None, bounds: Bounds) -> None:
    """Write a PNG: latency of every option against bandwidth, the winner's thick, `link` marked where known.

    The round trip is that of `link`, 0 without one. Options that break a bound on every link are dashed. Raises
    ExperimentError where there is nothing to draw, DataError where the file cannot be written.
    """
    if not options:
        raise ExperimentError("There is no option to draw; measure device and cloud for this bundle first.")
    rtt_s = link.rtt_s if link else 0.0
    winners = switches(options, bounds, rtt_s, LOW_BPS, HIGH_BPS)
    with context("edge-plan"):
        drawn = figure(8.6, 5.0)
        axes = drawn.subplots()
        colours = _colours(options, [winner for _, winner in winners])
        for option in sorted(options, key=lambda option: option in colours):
            _curve(axes, option, rtt_s, bounds, colours.get(option))
        _envelope(axes, winners, rtt_s, colours)
        _marks(axes, options, link, bounds)
        _frame(axes)
        high = Link(HIGH_BPS, rtt_s)
        won = {winner for _, winner in winners}
        _names(
            axes,
            [
                (HIGH_BPS / 1e6, max(1e3 * option.latency_s(high), LEAST_MS), option.name, colour, option in won)
                for option, colour in colours.items()
            ],
        )
        write_png(path, drawn)


def _colours(options: Sequence[Option], winners: Sequence[Option | None]) -> dict[Option, str]:
    """The options with a name in the figure: winners first, then the two ends."""
    ends = [option for option in options if not option.exits and _is_end(option)]
    named = list(dict.fromkeys([*(winner for winner in winners if winner), *ends]))
    return {option: SERIES[index % len(SERIES)] for index, option in enumerate(named)}


def _is_end(option: Option) -> bool:
    return option.boundary is None or (option.boundary == INPUT and option.coding == RAW)


def _rates(low: float, high: float, count: int = STEPS) -> list[float]:
    return [low * (high / low) ** (step / (count - 1)) for step in range(count)]


def _milliseconds(option: Option, rtt_s: float, rates: Sequence[float]) -> list[float]:
    return [max(1e3 * option.latency_s(Link(rate, rtt_s)), LEAST_MS) for rate in rates]


def _curve(axes: Any, option: Option, rtt_s: float, bounds: Bounds, colour: str | None) -> None:
    rates = _rates(LOW_BPS, HIGH_BPS)
    kept = switches([option], bounds, rtt_s, LOW_BPS, HIGH_BPS)
    style = "-" if any(winner for _, winner in kept) else (0, (4, 3))
    look = {"color": colour or GRAY, "lw": 1.4 if colour else 0.7, "ls": style, "zorder": 3 if colour else 2}
    axes.plot([rate / 1e6 for rate in rates], _milliseconds(option, rtt_s, rates), **look)


def _envelope(axes: Any, winners: Sequence[tuple[float, Option | None]], rtt_s: float, colours: Any) -> None:
    ends = [start for start, _ in winners[1:]] + [HIGH_BPS]
    for (start, winner), end in zip(winners, ends):
        if start > LOW_BPS:
            axes.axvline(start / 1e6, color=RULE, lw=0.8, zorder=1)
            axes.annotate(
                f"{start / 1e6:.3g}", (start / 1e6, 1), (0, 3), xycoords=("data", "axes fraction"),
                textcoords="offset points", color=MUTED, size=8, ha="center",
            )  # fmt: skip
        if winner:
            rates = _rates(start, end, 41)
            values = _milliseconds(winner, rtt_s, rates)
            axes.plot(
                [rate / 1e6 for rate in rates], values, color=colours[winner], lw=4.5, zorder=4, solid_capstyle="butt"
            )


def _marks(axes: Any, options: Sequence[Option], link: Link | None, bounds: Bounds) -> None:
    """The deadline, and the measured link with the choice on it."""
    if bounds.deadline_s is not None:
        axes.axhline(1e3 * bounds.deadline_s, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.annotate(
            "deadline", (1, 1e3 * bounds.deadline_s), (-4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", color=MUTED, size=8.5, ha="right",
        )  # fmt: skip
    if link is None:
        return
    place = min(max(link.bandwidth_bps, LOW_BPS), HIGH_BPS) / 1e6
    axes.axvline(place, color=INK, lw=1, ls=":", zorder=5)
    try:
        choice = plan(options, link, bounds).choice
    except ExperimentError:
        return
    now_ms = 1e3 * choice.latency_s(link)
    axes.plot([place], [now_ms], marker="o", ms=8, color=INK, mec="white", mew=1.4, zorder=6)
    words = f"now {link.bandwidth_bps / 1e6:.3g} Mbit/s, {1e3 * link.rtt_s:.3g} ms there and back:\n{now_ms:.3g} ms, "
    right = place > math.sqrt(LOW_BPS * HIGH_BPS) / 1e6
    axes.annotate(
        words + plain(choice.name, 34), (place, 0.02), (-7 if right else 7, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", size=8.5, color=INK, ha="right" if right else "left", va="bottom", zorder=7,
    )  # fmt: skip


def _frame(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(LOW_BPS / 1e6, HIGH_BPS / 1e6)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel("bandwidth (Mbit/s)", labelpad=6)
    axes.set_ylabel("expected latency per sample (ms)")
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y")


def _names(axes: Any, rows: Sequence[tuple[float, float, str, str, bool]]) -> None:
    """Names (x, y, text, colour, bold) in the right margin, moved apart where they would overlap; limits are set."""
    inside = axes.transData + axes.transAxes.inverted()
    placed = sorted((*inside.transform((x, y)), plain(text, 34), colour, bold) for x, y, text, colour, bold in rows)
    placed.sort(key=lambda row: row[1])
    heights = [row[1] for row in placed]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + APART)
    spare = max(0.0, heights[-1] - max(1.0, placed[-1][1]))  # what the stack grew above the top
    for (x, y, text, colour, bold), height in zip(placed, heights):
        axes.annotate(
            text, (x, y), (1.03, height - spare), xycoords="axes fraction", textcoords="axes fraction", va="center",
            color=colour, size=8.5, weight="bold" if bold else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "ls": ":", "shrinkA": 2, "shrinkB": 2},
        )  # fmt: skip


def draw_rates(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write a PNG: accuracy against bytes per sample, one line per name, of (bytes, accuracy in [0, 1]) points.

    Raises ExperimentError where there is no point, DataError where the file cannot be written.
    """
    shown = {
        name: sorted((size, 100 * accuracy) for size, accuracy in points) for name, points in lines.items() if points
    }
    if not shown:
        raise ExperimentError("There is no coding to draw; measure some on held-out data first.")
    with context("edge-rates"):
        drawn = figure(7.6, 4.4)
        axes = drawn.subplots()
        for index, points in enumerate(shown.values()):
            colour, style = SERIES[index % len(SERIES)], ("-", "--", ":")[index // len(SERIES) % 3]
            axes.plot(*zip(*points), color=colour, ls=style, lw=1.7, marker="o", ms=5, mec="white", mew=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: si(value))
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.set_xlabel("bytes per sample on the link")
        axes.set_ylabel("accuracy (%)")
        axes.tick_params(which="minor", length=0)
        axes.grid(axis="y")
        rows = [
            (*points[-1], name, SERIES[index % len(SERIES)], False)
            for index, (name, points) in enumerate(shown.items())
        ]
        _names(axes, rows)
        write_png(path, drawn)
