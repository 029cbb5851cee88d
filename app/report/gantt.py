"""The timeline of the clients: one row each, what it did when, and which updates were aggregated together.

Draws what fedge.report.timeline found. Must never compute who did what.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fedge.report import timeline
from fedge.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PAPER, PURPLE, SKY, VERMILLION, figure, labels, plain
from fedge.report.timeline import Group, History, Job, Span

MAX_ROWS, TASKS_PER_ROW, WIDE_TASKS = 40, 12, 1000

COLOURS = {
    timeline.DOWNLOADING: SKY,
    timeline.COMPUTING: BLUE,
    timeline.SENDING: GREEN,
    timeline.LATE: VERMILLION,
    timeline.LOST: PURPLE,
}
# Pale tints after Tol's light scheme; neighbours differ in hue and lightness.
TINTS = ("#ee8866", "#77aadd", "#bbcc33", "#ffaabb", "#44bb99", "#eedd88", "#99ddff", "#aaaa00")
_ON_TINT = "#1b1b1b"  # on a tint, in light and dark pages alike
_TROUBLE = {"failed", "refused", "expired", "evicted"}


@dataclass(frozen=True)
class Chart:
    """What one timeline shows: clients by speed, up to `end_s`."""

    clients: tuple[str, ...]
    spans: tuple[Span, ...]
    jobs: tuple[Job, ...]
    groups: tuple[Group, ...]
    troubles: tuple[tuple[str, float], ...]
    end_s: float
    whole: bool  # all clients and all of the run

    def row(self, client: str) -> int:
        """Its row, from the top; -1 where it is not shown."""
        return self.clients.index(client) if client in self.clients else -1


def chart(history: History, tasks: int) -> Chart:
    """The first `tasks` tasks of at most MAX_ROWS clients, spread evenly from the fastest to the slowest."""
    everyone = history.by_speed()
    shown = everyone
    if len(everyone) > MAX_ROWS:
        shown = [everyone[round(i * (len(everyone) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]
    known = set(shown)
    jobs = sorted((job for job in history.jobs if job.client in known), key=lambda job: job.start_s)
    end = jobs[tasks].start_s if len(jobs) > tasks else history.end_s
    return Chart(
        clients=tuple(shown),
        spans=tuple(
            replace(span, end_s=min(span.end_s, end))
            for span in history.spans
            if span.client in known and span.start_s < end
        ),
        jobs=tuple(job for job in jobs if job.start_s < end),
        groups=tuple(group for group in history.groups if group.start_s < end),
        troubles=tuple(
            (event["client"], event["t"])
            for event in history.events
            if event["event"] in _TROUBLE and event.get("client") in known and event["t"] <= end
        ),
        end_s=end,
        whole=len(shown) == len(everyone) and end == history.end_s,
    )


def draw(shown: Chart, width: float = 11.0) -> Any:
    """The chart as a Figure `width` inches wide; within a style context."""
    together = [group for group in shown.groups if len(group.members) > 1 or group.expected_s is not None]
    tint = {group.version: TINTS[i % len(TINTS)] for i, group in enumerate(together)}
    lanes = _lanes(together)
    strip, rows = 0.24 * max(1, 1 + max(lanes.values(), default=0)) + 0.1, 0.34 * max(3, len(shown.clients)) + 0.2
    drawn = figure(width, strip + rows + 1.0)
    above, axes = drawn.subplots(2, 1, sharex=True, height_ratios=[strip, rows])
    for part in (above, axes):
        part.set_autoscale_on(False)  # the limits are known, and finding them again for each bar is slow
    inch_s = (shown.end_s or 1.0) / (width - 2.2)  # names and shares take the rest
    _groups(above, shown, tint, lanes, inch_s)
    for group in together:
        _members(axes, shown, group, tint[group.version])
    _bars(axes, shown)
    _steps(axes, shown, inch_s)
    _shares(axes, shown)
    if width <= 12:  # the wide one lies below one with a legend
        _legend(drawn)
    axes.set_ylim(len(shown.clients) - 0.4, -0.6)
    axes.set_xlim(0, shown.end_s or 1.0)
    labels(axes.yaxis, range(len(shown.clients)), shown.clients, color=INK)
    axes.locator_params(axis="x", nbins=int(width))
    axes.set_xlabel("time since the start (s)")
    axes.spines["left"].set_visible(False)
    return drawn


def _lanes(groups: Iterable[Group]) -> dict[int, int]:
    """The lane of each version in the strip, so that groups under way at the same time lie below each other."""
    ends: list[float] = []
    lanes: dict[int, int] = {}
    for group in sorted(groups, key=lambda group: group.start_s):
        lane = next((i for i, end in enumerate(ends) if end <= group.start_s), len(ends))
        ends[lane : lane + 1] = [max(group.closed_s, group.latest_s or 0.0)]
        lanes[group.version] = lane
    return lanes


def _groups(axes: Any, shown: Chart, tint: dict[int, str], lanes: dict[int, int], inch_s: float) -> None:
    """The strip on top: each group from its first dispatch to its aggregation, when it was expected and the latest."""
    together = [group for group in shown.groups if group.version in lanes]
    for group in together:
        lane, colour = lanes[group.version], tint[group.version]
        axes.broken_barh([(group.start_s, group.closed_s - group.start_s)], (lane - 0.38, 0.76), color=colour, lw=0)
        if group.latest_s is not None and group.latest_s > group.closed_s:
            axes.plot([group.closed_s, group.latest_s], [lane, lane], color=colour, lw=1.6, solid_capstyle="butt")
        if group.expected_s is not None:
            axes.plot([group.expected_s] * 2, [lane - 0.38, lane + 0.38], color=_ON_TINT, lw=1.2)
        words = f"{plain(group.name, 12)} · {len(group.members)}"
        room_s = min(group.closed_s, group.expected_s or group.closed_s, shown.end_s) - group.start_s
        if room_s > 0.075 * inch_s * len(words):
            axes.text(group.start_s + 0.03 * inch_s, lane, words, color=_ON_TINT, size=7.5, va="center")
    published = [group.closed_s for group in shown.groups if group.closed_s <= shown.end_s]
    bottom = max(lanes.values(), default=0) + 0.5
    axes.plot(published, [bottom + 0.12] * len(published), ls="", marker="|", ms=5, color=MUTED, clip_on=False)
    axes.set_ylim(bottom + 0.15, -0.5)
    labels(axes.yaxis, [max(lanes.values(), default=0) / 2], ["groups" if together else "versions"], color=MUTED)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _members(axes: Any, shown: Chart, group: Group, colour: str) -> None:
    """Behind the bars: a tint from dispatch to aggregation in each member's row, and the line that links them."""
    rows = {row: job for job in group.members if (row := shown.row(job.client)) >= 0}
    for row, job in rows.items():
        length = group.closed_s - job.start_s
        axes.broken_barh([(job.start_s, length)], (row - 0.5, 1.0), color=colour, alpha=0.4, lw=0, zorder=1)
    if len(rows) > 1:
        axes.plot([group.closed_s] * 2, [min(rows) - 0.5, max(rows) + 0.5], color=colour, lw=1.8, zorder=4)
        axes.plot(
            [group.closed_s] * len(rows),
            list(rows),
            ls="",
            marker="o",
            ms=4.2,
            mec=INK,
            mew=0.6,
            color=colour,
            zorder=5,
        )


def _bars(axes: Any, shown: Chart) -> None:
    bars: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for span in shown.spans:
        bars.setdefault((span.kind, shown.row(span.client)), []).append((span.start_s, span.end_s - span.start_s))
    for (kind, row), pieces in bars.items():
        if kind == timeline.WAITING:
            lines = zip(*((start, start + length) for start, length in pieces))
            axes.hlines([row] * len(pieces), *lines, color=MUTED, lw=1.1, zorder=2)
        elif kind == timeline.GONE:
            axes.broken_barh(pieces, (row - 0.28, 0.56), fc="none", ec=MUTED, hatch="////", lw=0, zorder=2)
        else:
            axes.broken_barh(pieces, (row - 0.28, 0.56), fc=COLOURS[kind], lw=0, zorder=3)
    starts = [(job.start_s, shown.row(job.client)) for job in shown.jobs]
    if starts:  # where one task follows another at once, the cut between them
        times, middles = zip(*starts)
        below, above = ([middle + by for middle in middles] for by in (-0.28, 0.28))
        axes.vlines(times, below, above, color=PAPER, lw=0.9, zorder=3.5)
    places = [(time, row) for client, time in shown.troubles if (row := shown.row(client)) >= 0]
    if places:
        axes.plot(*zip(*places), ls="", marker="X", ms=7, color=INK, mec=PAPER, mew=0.7, zorder=6)


def _steps(axes: Any, shown: Chart, inch_s: float) -> None:
    """The number of local steps inside bars that are wide enough to hold it."""
    for job in shown.jobs:
        end_s = min(job.end_s, shown.end_s)
        if job.steps and end_s - job.start_s > 0.09 * inch_s * (1 + len(str(job.steps))):
            place = ((job.start_s + end_s) / 2, shown.row(job.client))
            axes.text(*place, str(job.steps), color="white", size=7.5, ha="center", va="center", zorder=7)


def _shares(axes: Any, shown: Chart) -> None:
    """At the right of each row: how much of its connected time the client spent at work."""
    for row, client in enumerate(shown.clients):
        share = timeline.busy(span for span in shown.spans if span.client == client)
        if share is not None:
            axes.annotate(
                f"{share:.0%}", (1, row), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", color=INK, size=9, annotation_clip=False,
            )  # fmt: skip
    axes.annotate(
        "at work", (1, -0.6), (4, 6), xycoords=("axes fraction", "data"), textcoords="offset points",
        color=MUTED, size=8, annotation_clip=False,
    )  # fmt: skip


def _legend(drawn: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(fc=colour, label=kind) for kind, colour in COLOURS.items()]
    handles += [
        Line2D([], [], color=MUTED, lw=1.1, label="waiting"),
        Patch(fc="none", ec=MUTED, hatch="////", lw=0, label="gone"),
        Line2D([], [], ls="", marker="X", ms=7, color=INK, label="failed, refused, expired"),
        Line2D([], [], color=ORANGE, marker="o", ms=4.2, mec=INK, mew=0.6, lw=1.8, label="aggregated together"),
        Line2D([], [], ls="", marker="|", ms=10, mew=1.2, color=INK, label="group expected"),
        Line2D([], [], color=ORANGE, lw=1.6, label="group's latest time"),
        Line2D([], [], ls="", marker="|", ms=5, color=MUTED, label="new version"),
    ]
    drawn.legend(handles=handles, loc="outside lower left", ncols=6, fontsize=8.5)
