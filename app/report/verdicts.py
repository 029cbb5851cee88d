"""Who was listened to: of every client's rows, which the aggregation rule took in and which it rejected.

Finds the verdicts in the events and draws them, clients by versions. Must never judge a row itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedge.report.style import BLUE, INK, MUTED, PAPER, PURPLE, RULE, SKY, VERMILLION, figure, labels, plain
from fedge.report.timeline import Event, number

MAX_ROWS, MAX_COLUMNS = 100, 120

HEARD, REJECTED = "taken in", "rejected"
CACHED, CACHED_REJECTED = "absent, last row taken in", "absent, last row rejected"
_PALE = "#f4ab7c"  # to VERMILLION what SKY is to BLUE
COLOURS = {HEARD: BLUE, REJECTED: VERMILLION, CACHED: SKY, CACHED_REJECTED: _PALE}


@dataclass
class Client:
    """What became of one client's rows: by version, one of COLOURS. The rest is over all its groups."""

    fates: dict[int, str] = field(default_factory=dict)
    rejected: int = 0
    scores: list[float] = field(default_factory=list)
    staleness: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The share of its groups in which it was rejected."""
        return self.rejected / len(self.fates)

    def add(self, version: int, row: Mapping[str, Any], absent: bool) -> None:
        """One verdict."""
        fates = (CACHED, CACHED_REJECTED) if absent else (HEARD, REJECTED)
        self.fates[version] = fates[row["rejected"]]
        self.rejected += row["rejected"]
        self.scores.append(number(row.get("score")))
        if not absent:
            self.staleness.append(number(row.get("staleness")))


@dataclass(frozen=True)
class Hearing:
    """All verdicts of a run: the versions that have any, the clients by speed, and those known to be hostile."""

    versions: tuple[int, ...]
    clients: Mapping[str, Client]
    hostile: Mapping[str, str]  # the attack of each

    @staticmethod
    def of(events: Sequence[Event], by_speed: Iterable[str]) -> "Hearing":
        """The hearing in `events`."""
        found: dict[str, Client] = {}
        hostile: dict[str, str] = {}
        versions: dict[int, None] = {}
        for event in events:
            if event["event"] == "hostile":
                hostile |= dict.fromkeys(map(str, event.get("clients", ())), str(event.get("attack", "")))
            elif event["event"] == "aggregated":
                version = int(number(event.get("version")))
                for absent, key in enumerate(("members", "absent")):
                    for row in event.get(key, ()):
                        if isinstance(row.get("rejected"), bool):
                            found.setdefault(str(row.get("client", "")), Client()).add(version, row, bool(absent))
                            versions[version] = None
        order = [name for name in by_speed if name in found]
        return Hearing(tuple(versions), {name: found[name] for name in dict.fromkeys((*order, *found))}, hostile)

    def rate(self, hostile: bool) -> float | None:
        """The share of rows of hostile, or of the other, clients that were rejected; None without any."""
        chosen = [one for name, one in self.clients.items() if (name in self.hostile) == hostile]
        judged = sum(len(one.fates) for one in chosen)
        return sum(one.rejected for one in chosen) / judged if judged else None


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def draw(hearing: Hearing) -> Any:
    """Clients by versions, with rejection rate and mean staleness beside; None where nobody was judged."""
    if not hearing.clients:
        return None
    names, versions = thinned(list(hearing.clients), MAX_ROWS), thinned(hearing.versions, MAX_COLUMNS)
    shown = [hearing.clients[name] for name in names]
    height = max(0.14, 0.25 - 0.0016 * len(names))  # inches per row
    drawn = figure(11.0, height * len(names) + 1.25)
    cells, rates, stale = drawn.subplots(1, 3, sharey=True, width_ratios=[8.6, 1.0, 1.0])
    size = 8.5 if len(names) <= 40 else 6.8
    present = _cells(cells, shown, versions)
    _bars(rates, "rejected", [one.rate for one in shown], 1.0, VERMILLION, size, "{:.0%}".format)
    means = [sum(one.staleness) / len(one.staleness) if one.staleness else None for one in shown]
    longest = max((mean for mean in means if mean is not None), default=0.0)
    _bars(stale, "staleness", means, longest, MUTED, size, "{:.1f}".format)
    labels(cells.yaxis, range(len(names)), [_label(hearing, name) for name in names], color=INK, fontsize=size)
    for row, name in enumerate(names):
        if name in hearing.hostile:
            cells.axhspan(row - 0.5, row + 0.5, color=PURPLE, alpha=0.28, lw=0, zorder=0)
    cells.set_ylim(len(names) - 0.4, -0.6)
    _legend(drawn, present, any(name in hearing.hostile for name in names))
    return drawn


def _label(hearing: Hearing, name: str) -> str:
    return f"{'◆ ' if name in hearing.hostile else ''}{plain(name, 24)}"


def _cells(axes: Any, shown: Sequence[Client], versions: Sequence[int]) -> list[str]:
    """The map; the fates that are in it. Cells alike and side by side are one rectangle, so that pages stay small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    spots: dict[str, list[tuple[float, float]]] = {}
    for row, client in enumerate(shown):
        fates = [client.fates.get(version) for version in versions]
        for left, right in _runs(fates):
            if (fate := fates[left]) is not None:
                low, high = row - 0.4, row + 0.4
                spots.setdefault(fate, []).extend([(left, low), (right, low), (right, high), (left, high), (left, low)])
    steps = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for fate, corners in spots.items():
        patch = PathPatch(Path(corners, steps * (len(corners) // 5)), fc=COLOURS[fate], lw=0, zorder=2)
        axes.add_patch(patch)
    axes.hlines(range(len(shown)), 0, len(versions), color=RULE, lw=0.8, zorder=1)
    axes.vlines(range(1, len(versions)), -0.5, len(shown) - 0.5, color=PAPER, lw=0.8, zorder=3)
    axes.set_xlim(0, len(versions))
    marked = range(0, len(versions), -(-len(versions) // 14))
    labels(axes.xaxis, [mark + 0.5 for mark in marked], [versions[mark] for mark in marked], color=MUTED)
    axes.set_xlabel("version")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return [fate for fate in COLOURS if fate in spots]


def _runs(values: Sequence[object]) -> Iterable[tuple[int, int]]:
    """[start, stop) of each stretch of equal values."""
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[start]:
            yield start, stop
            start = stop


def _bars(
    axes: Any, title: str, values: Sequence[float | None], most: float, color: str, size: float, say: Any
) -> None:
    known = [(row, value) for row, value in enumerate(values) if value is not None]
    axes.barh([row for row, _ in known], [value for _, value in known], height=0.62, color=color, lw=0)
    for row, value in known:
        axes.annotate(
            say(value), (value, row), (3, 0), textcoords="offset points", va="center", color=INK, size=size - 0.5
        )
    axes.set_xlim(0, 1.5 * most or 1.0)
    axes.set_title(title, size=8.5, color=MUTED, loc="left", pad=3)
    axes.set_xticks([])
    axes.tick_params(axis="y", labelleft=False)
    axes.spines["bottom"].set_visible(False)


def _legend(drawn: Any, present: Sequence[str], hostile: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(fc=COLOURS[fate], label=fate) for fate in present]
    handles.append(Line2D([], [], color=RULE, lw=1.6, label="not in the group"))
    if hostile:
        handles.append(Patch(fc=PURPLE, alpha=0.4, label="◆ hostile client"))
    drawn.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8.5)
