"""The figure of a plan for a language model: time per token over the link's round trip, for each number of devices.

Must never measure or plan: it draws what the planner says.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedge.edge.llm.shards.planner import Option, Plan
from fedge.edge.plan.link import Link
from fedge.report.style import INK, MUTED, SERIES, context, figure, write_png

LOW_S, HIGH_S = 5e-5, 5e-2  # from a wire in one room to the other side of a continent
STEPS = 61


def draw_plan(path: Path, planned: Callable[[Link], Plan], link: Link) -> None:
    """Write a PNG: `planned` for many round trips at the bandwidth of `link`, the best thick, `link` marked.

    Raises DataError where the file cannot be written.
    """
    trips = [LOW_S * (HIGH_S / LOW_S) ** (step / (STEPS - 1)) for step in range(STEPS)]
    plans = [planned(Link(link.bandwidth_bps, rtt_s)) for rtt_s in trips]
    with context("llm-plan"):
        drawn = figure(7.2, 4.2)
        axes = drawn.subplots()
        for at, count in enumerate(_counts(plans[0])):
            _curve(axes, trips, plans, count, SERIES[at % len(SERIES)])
        here = planned(link).choice
        axes.plot([1e3 * link.rtt_s], [1e3 * here.token_s], marker="o", ms=8, color=INK, mec="white", zorder=5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"round trip (ms), at {link.bandwidth_bps / 1e6:g} Mbit/s")
        axes.set_ylabel("ms per token, predicted")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.annotate(
            f"dot: your link, {1e3 * here.token_s:.3g} ms by {len(here.ranks)}", (0.02, 0.95),
            xycoords="axes fraction", size=8.5, color=MUTED,
        )  # fmt: skip
        axes.legend(fontsize=8)
        write_png(path, drawn)


def _counts(plan: Plan) -> list[int]:
    return [len(option.ranks) for option in plan.options]


def _of(plan: Plan, count: int) -> Option:
    return next(option for option in plan.options if len(option.ranks) == count)


def _curve(axes: Any, trips: list[float], plans: list[Plan], count: int, colour: str) -> None:
    """All of a number's predictions, and thick where it is the best."""
    axes.plot(
        [1e3 * rtt_s for rtt_s in trips], [1e3 * _of(plan, count).token_s for plan in plans], color=colour, lw=1.3,
        label=f"{count} device{'s' if count > 1 else ''}",
    )  # fmt: skip
    best = [
        (1e3 * rtt_s, 1e3 * plan.choice.token_s) for rtt_s, plan in zip(trips, plans) if len(plan.choice.ranks) == count
    ]
    if best:
        axes.plot(*zip(*best), color=colour, lw=4.5, solid_capstyle="butt")
