"""Milliseconds per token over a link's delay and rate, for each number of devices, beside what the planner predicts.

Devices are slow ones, as small computers are: a product takes as long as they would need, by waiting, so that four of
them fit on this machine's cores; ranks, exchanges and everything else are real. The planner is given what a group would
give it: the speed of a device, its other work as measured with one rank, and the link as two ranks have measured it.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import llm_models
from benchmarks.harness import Goal, goal
from benchmarks.llm_models import Shape
from benchmarks.llm_net import Net
from benchmarks.llm_ranks import Crew, Opening, Taken
from fedge.edge.llm.shards import planner
from fedge.edge.llm.shards.shard import open_shard
from fedge.edge.llm.shards.shares import FFN_GRANULE, costs
from fedge.edge.plan.link import Link

Row = dict[str, Any]
PART = "link"
DELAYS_MS, RATES_MBPS = (0, 1, 2, 5, 10, 20), (10, 50, 300)
RANKS = (1, 2, 3, 4)
QUICK_DELAYS_MS, QUICK_RATES_MBPS, QUICK_RANKS = (0, 2), (50,), (1, 2)
WEIGHTS_PER_S = 3e9  # about a Raspberry Pi 4 with weights of 8 bits
QUICK_WEIGHTS_PER_S = 1e8
TOKENS, ALONE_TOKENS = 8, 24
TIMEOUT_S = 120.0
GOAL = "planner's number of devices over the really best one's time, worst link"


def measure(shape: Shape, cache: Path, *, quick: bool) -> list[Row]:
    """One row per link and number of devices."""
    speed = QUICK_WEIGHTS_PER_S if quick else WEIGHTS_PER_S
    delays, rates = (QUICK_DELAYS_MS, QUICK_RATES_MBPS) if quick else (DELAYS_MS, RATES_MBPS)
    points = [(delay, rate) for rate in rates for delay in delays]
    taken: dict[int, list[Taken]] = {}
    for ranks in QUICK_RANKS if quick else RANKS:
        paths = llm_models.made(shape, "shards", "int8", str(ranks), cache=cache)
        taken[ranks] = list(_taken(paths, points, speed))
    return rows(paths[0], points, taken, speed)


def rows(
    path: Path, points: Sequence[tuple[int, int]], taken: dict[int, list[Taken]], weights_per_s: float
) -> list[Row]:
    """Measured and predicted, side by side. `path` is a shard of the model."""
    config = open_shard(path).config
    alone_s = median(taken[1][0].token_s)
    head, kv_head, granule = costs(config)
    weights = head + kv_head * config.kv_heads + granule * config.ffn / FFN_GRANULE
    layer_s = max(0.0, (alone_s - weights / weights_per_s) / config.layers)
    devices = [planner.Device(f"device {one}", weights_per_s, 1 << 40, 1e12, layer_s) for one in range(max(taken))]
    found = []
    for at, (delay, rate) in enumerate(points):
        link = Link(taken[2][at].bandwidth_bps, taken[2][at].rtt_s)
        plan = planner.plan(config, "int8", devices, link, kv_tokens=64)
        for option in plan.options:
            count = len(option.ranks)
            seconds = median(taken[count][at].token_s)
            found.append(
                {
                    "part": PART,
                    "runtime": "fedge",
                    "weights": "int8",
                    "ranks": count,
                    "delay_ms": delay,
                    "Mbit/s": rate,
                    "rtt_ms": round(1e3 * link.rtt_s, 2),
                    "measured_Mbit/s": round(link.bandwidth_bps / 1e6, 1),
                    "ms_per_token": round(1e3 * seconds, 2),
                    "predicted_ms": round(1e3 * option.token_s, 2),
                    "planned": option is plan.choice,
                }
            )
    return found


def measured(rows: Sequence[Row]) -> list[Row]:
    """This part's rows, but not the note of one that failed."""
    return [row for row in rows if row["part"] == PART and "ms_per_token" in row]


def goals(rows: Sequence[Row]) -> list[Goal]:
    """The plan is judged by the worst link; the prediction by two ranks and more, as one rank's time is what it is
    made from.
    """
    mine = measured(rows)
    over = []
    for point in dict.fromkeys((row["delay_ms"], row["Mbit/s"]) for row in mine):
        here = [row for row in mine if (row["delay_ms"], row["Mbit/s"]) == point]
        planned = next(row["ms_per_token"] for row in here if row["planned"])
        over.append(planned / min(row["ms_per_token"] for row in here))
    off = [abs(row["predicted_ms"] / row["ms_per_token"] - 1) for row in mine if row["ranks"] > 1]
    return [
        goal(GOAL, max(over, default=None), "<= 1.05"),
        goal("planner's prediction off by, median over links", median(off) if off else None, "<= 0.1"),
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds per token over delay, a panel for each rate: points as measured, lines as predicted."""
    from fedge.report.style import SERIES, context, figure, png, replace_file

    mine = measured(rows)
    rates = list(dict.fromkeys(row["Mbit/s"] for row in mine))
    with context("llm"):
        drawn = figure(3.4 * max(len(rates), 2), 3.2)
        axes = np.atleast_1d(drawn.subplots(1, len(rates), sharey=True))
        for axis, rate in zip(axes, rates):
            for colour, count in zip(SERIES, dict.fromkeys(row["ranks"] for row in mine)):
                here = [row for row in mine if (row["Mbit/s"], row["ranks"]) == (rate, count)]
                delays = [row["delay_ms"] for row in here]
                label = f"{count} device{'s' if count > 1 else ''}"
                axis.plot(delays, [row["predicted_ms"] for row in here], color=colour, linewidth=1.2)
                axis.plot(delays, [row["ms_per_token"] for row in here], "o", color=colour, markersize=4, label=label)
            axis.set_xscale("symlog", linthresh=1)
            axis.set_yscale("log")
            axis.set_xlabel("ms one way")
            axis.set_title(f"{rate} Mbit/s", fontsize=10, loc="left", fontweight="bold")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("ms per token")
        axes[-1].legend(fontsize=7)
        replace_file(path, png(drawn))


def _taken(paths: Sequence[Path], points: Sequence[tuple[int, int]], speed: float) -> Iterable[Taken]:
    """A run per link, by ranks that stay; one run for all links where there is only one rank."""
    openings = [Opening(str(path), rank, 0, "onnx-int8", weights_per_s=speed) for rank, path in enumerate(paths)]
    with ExitStack() as opened:
        crew = opened.enter_context(Crew(openings))
        net = opened.enter_context(Net(crew.addresses))
        for delay, rate in points if len(paths) > 1 else points[:1]:
            net.change(delay * 1e-3, rate * 1e6)
            crew.order([3], TOKENS if len(paths) > 1 else ALONE_TOKENS, net.addresses)
            one = crew.taken(TIMEOUT_S)
            print(f"{len(paths)} ranks, {delay} ms, {rate} Mbit/s: {1e3 * median(one.token_s):.1f} ms", file=sys.stderr)
            yield one
        if len(paths) == 1:
            yield from [one] * (len(points) - 1)
