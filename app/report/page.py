"""report.html of one run: figures, cards and tables on one page that needs nothing else, and the plots as PNGs.

Owns the page and what its captions say. Everything from a run folder is escaped: client names and reasons come from
the network. Must never run anything, and never leave half a file.
"""

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from fedge.report import figures, gantt, verdicts
from fedge.report.files import RunFiles, load
from fedge.report.style import context, plain, png, replace_file, si, svg
from fedge.report.timeline import History, busy, number
from fedge.report.verdicts import Hearing

MAX_REFUSALS, MAX_REJECTIONS, MAX_FILE = 50, 200, 20_000

Draw = Callable[[], Any]


class Plots:
    """Draws each figure once: as SVG for the page, and as a PNG kept until `save`."""

    def __init__(self) -> None:
        self._images: dict[str, bytes] = {}

    def __call__(self, name: str, draw: Draw) -> str:
        """The figure as SVG; empty where there is nothing to show. Raises ExperimentError without matplotlib."""
        with context(name):
            drawn = draw()
            if drawn is None:
                return ""
            self._images[name] = png(drawn)
            return svg(drawn)

    def save(self, folder: Path) -> None:
        """Write the PNGs into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in self._images.items():
            replace_file(folder / f"{name}.png", image)


def write(folder: Path) -> Path:
    """Write report.html and plots/*.png into a run folder; the path of the page.

    Raises ExperimentError where the folder holds no run or matplotlib is not installed.
    """
    run, plots = load(folder), Plots()
    history = History.of(run.events)
    body = "\n".join([_cards(run, history), *_sections(run, history, plots), _refusals(run), _experiment(run)])
    page = render(run.name, _subtitle(run), body)
    plots.save(folder / "plots")
    replace_file(folder / "report.html", page)
    return folder / "report.html"


def render(title: str, subtitle: str, body: str) -> bytes:
    """The page. `body` is HTML; the others are text."""
    template = Template((Path(__file__).with_name("page.html")).read_text("utf-8"))
    text = template.substitute(title=escape(title), subtitle=escape(subtitle), body=body)
    return text.encode("utf-8", "replace")


def escape(text: object, limit: int = 200) -> str:
    """Text from anywhere as HTML: one printable line, escaped."""
    return html.escape(plain(text, limit))


def section(title: str, drawing: str, caption: str, more: str = "") -> str:
    """A framed figure with its caption; nothing without a drawing."""
    if not drawing:
        return ""
    caption = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f"<section><h2>{html.escape(title)}</h2><figure>{drawing}{caption}</figure>{more}</section>"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """A table of escaped cells; columns in `numbers` are set to the right."""

    def line(tag: str, cells: Sequence[object]) -> str:
        side = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{where}>{escape(cell)}</{tag}>" for where, cell in zip(side, cells)) + "</tr>"

    return f"<table>{line('th', heads)}{''.join(line('td', row) for row in rows)}</table>"


def seconds(value: object) -> str:
    """A time for people: 83.4 s, 12 min, 3.5 h."""
    time = number(value)
    if time < 600:
        return f"{time:.3g} s" if time < 100 else f"{time:.0f} s"
    return f"{time / 60:.0f} min" if time < 7200 else f"{time / 3600:.1f} h"


def scheduler(run: RunFiles) -> str:
    """The kind of scheduler in the experiment file, or empty."""
    server = run.settings.get("server")
    chosen = server.get("scheduler") if isinstance(server, dict) else None
    return str(chosen.get("kind", "")) if isinstance(chosen, dict) else str(chosen or "")


def _subtitle(run: RunFiles) -> str:
    known = {"scheduler": scheduler(run), "seed": run.summary.get("seed"), "model": run.summary.get("model_sha256")}
    return " · ".join(f"{word} {str(value)[:16]}" for word, value in known.items() if value not in (None, ""))


def _cards(run: RunFiles, history: History) -> str:
    summary = run.summary
    accuracy, staleness, refused = (
        value if isinstance(value := summary.get(key), dict) else {} for key in ("accuracy", "staleness", "refused")
    )
    target = summary.get("target")
    known: list[tuple[str, object, Callable[[Any], str]]] = [
        ("best accuracy", accuracy.get("best"), _percent),
        (
            f"to reach {number(target):.0%}",
            None if target is None else {"at": summary.get("time_to_target_s")},
            _reached,
        ),
        ("accuracy at the end", accuracy.get("final"), _percent),
        ("of clients' time at work", busy(history.spans), lambda share: f"{share:.0%}"),
        ("updates", summary.get("updates"), _count),
        ("versions", summary.get("versions"), _count),
        ("mean staleness", staleness.get("mean"), lambda mean: f"{number(mean):.2f}"),
        ("updates late", summary.get("late"), _count),
        ("updates refused", sum(map(number, refused.values())) if "refused" in summary else None, _count),
        ("sent by clients", summary.get("bytes_up"), lambda size: si(number(size))),
        ("sent to clients", summary.get("bytes_down"), lambda size: si(number(size))),
        ("time of the run", summary.get("seconds"), seconds),
        ("time on this machine", summary.get("wall_s"), seconds),
    ]
    cards = [
        f'<div class="card"><b>{escape(say(value))}</b><span>{escape(words)}</span></div>'
        for words, value, say in known
        if value is not None
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _reached(time: Mapping[str, object]) -> str:
    return "missed" if time["at"] is None else seconds(time["at"])


def _percent(share: object) -> str:
    return f"{number(share):.2%}"


def _count(count: object) -> str:
    return f"{number(count):,.0f}"


def _sections(run: RunFiles, history: History, plots: Plots) -> list[str]:
    summary = run.summary
    target = number(summary["target"]) if summary.get("target") is not None else None
    reached = number(summary["time_to_target_s"]) if summary.get("time_to_target_s") is not None else None
    clients = history.by_speed()
    down = number(summary.get("bytes_down"))
    pair = [
        section(
            "Staleness",
            plots("staleness", lambda: figures.staleness(run.events)),
            "How many versions were published while a client worked on its update; 0 is fresh.",
        ),
        section(
            "Traffic per client",
            plots("traffic", lambda: figures.traffic(run.events, clients, down)),
            "Fast clients send more updates, so they send more bytes."
            + _cut(len(clients), figures.MAX_CLIENTS, "clients"),
        ),
    ]
    return [
        section(
            "Learning",
            plots("curves", lambda: figures.curves(run.metrics, target, reached)),
            "Accuracy and loss on the test set as time passes; the dot marks when the target was first met.",
        ),
        _timeline(history, plots),
        _hearing(run, Hearing.of(run.events, clients), plots),
        f'<div class="pair">{"".join(pair)}</div>',
        _partition(summary.get("partition"), plots),
    ]


def _cut(count: int, most: int, what: str) -> str:
    return f" The first {most} of {count} {what} are shown." if count > most else ""


def _timeline(history: History, plots: Plots) -> str:
    if not history.spans:
        return ""
    everyone = len(history.by_speed())
    fits = gantt.TASKS_PER_ROW * max(4, min(gantt.MAX_ROWS, everyone))
    first = gantt.chart(history, fits if len(history.jobs) > 1.25 * fits else len(history.jobs))
    caption = (
        "Each row is a client, the fastest on top; numbers are local steps. Updates on one tint were aggregated at the "
        "line that joins them: the shorter the lines before it, the less anyone waited for a straggler."
    )
    if first.whole:
        return section("What every client did", plots("timeline", lambda: gantt.draw(first)), caption)
    caption += f" Shown: the first {seconds(first.end_s)} of {seconds(history.end_s)}"
    caption += (
        f", {len(first.clients)} of {everyone} clients from fast to slow." if len(first.clients) < everyone else "."
    )
    longer = gantt.chart(history, gantt.WIDE_TASKS)
    if longer.end_s <= first.end_s:
        return section("What every client did", plots("timeline", lambda: gantt.draw(first)), caption)
    width = min(90.0, 11.0 * longer.end_s / first.end_s)
    drawing = plots("timeline-wide", lambda: gantt.draw(longer, width))
    scroll = f'<div class="wide"><div style="width: {width * 96:.0f}px">{drawing}</div></div>'
    note = f"<p class='note screen'>Scroll sideways for the first {seconds(longer.end_s)}.</p>"
    return section("What every client did", plots("timeline", lambda: gantt.draw(first)), caption, note + scroll)


def _hearing(run: RunFiles, hearing: Hearing, plots: Plots) -> str:
    caption = (
        "Each row is a client, the fastest on top; each column is the group of updates that made a version. Beside it: "
        "the share of its groups in which the rule rejected the client, and how many versions old its updates were. "
        "Who is slow and holds unusual data can be honest and rejected."
    )
    if hearing.hostile:
        rates = {"of hostile clients": hearing.rate(hostile=True), "of others": hearing.rate(hostile=False)}
        words = [f"{rate:.0%} {whose}" for whose, rate in rates.items() if rate is not None]
        caption += f" Rejected, of the rows: {', '.join(words)}."
    shown = {"clients, from fast to slow": (verdicts.MAX_ROWS, len(hearing.clients))}
    shown["versions"] = (verdicts.MAX_COLUMNS, len(hearing.versions))
    cuts = [f"{most} of {count} {what}" for what, (most, count) in shown.items() if count > most]
    caption += f" Shown, evenly spread: {'; '.join(cuts)}." if cuts else ""
    unheard = run.summary.get("unheard")
    note = f"<p class='note'>{escape(str(unheard).capitalize(), 2000)}.</p>" if unheard else ""
    drawing = plots("verdicts", lambda: verdicts.draw(hearing))
    return section("Who was listened to", drawing, caption, note + _rejections(hearing))


def _rejections(hearing: Hearing) -> str:
    """The rejection rates as a table, those rejected most on top."""
    ranked = sorted(hearing.clients.items(), key=lambda item: (-item[1].rate, item[0]))
    rows = [
        (
            name,
            hearing.hostile.get(name, ""),
            f"{len(one.fates):,}",
            f"{one.rejected:,}",
            f"{one.rate:.0%}",
            f"{fmean(one.scores):.2f}",
            f"{fmean(one.staleness):.1f}" if one.staleness else "-",
        )
        for name, one in ranked[:MAX_REJECTIONS]
    ]
    heads = ["client", "attack", "groups", "rejected", "rate", "mean score", "mean staleness"]
    grid = table(heads, rows, numbers=range(2, len(heads)))
    cut = _cut(len(ranked), MAX_REJECTIONS, "clients")
    note = f"<p class='note'>{cut}</p>" if cut else ""
    return f"<details><summary>Rejection rates</summary>{grid}{note}</details>"


def _partition(given: object, plots: Plots) -> str:
    if not isinstance(given, Mapping):
        return ""
    classes, clients, counts = (given.get(key) for key in ("classes", "clients", "counts"))
    if not (isinstance(classes, list) and isinstance(clients, list) and isinstance(counts, list)):
        return ""
    if not all(isinstance(row, list) and len(row) == len(classes) for row in counts) or len(counts) != len(clients):
        return ""
    caption = "Who holds what: the area of a dot is the number of examples of a class on a client; bars are their sums."
    caption += _cut(len(clients), figures.MAX_CLIENTS, "clients") + _cut(len(classes), figures.MAX_CLASSES, "classes")
    return section("Data", plots("partition", lambda: figures.partition(classes, clients, counts)), caption)


def _refusals(run: RunFiles) -> str:
    counts = Counter(
        (event["event"], str(event.get("client", "")), str(event.get("reason", "the lease ran out")))
        for event in run.events
        if event["event"] in ("refused", "failed", "expired", "evicted")
    )
    if not counts:
        return ""
    rows = [(client, what, reason, f"{count:,}") for (what, client, reason), count in counts.most_common(MAX_REFUSALS)]
    grid = table(["client", "what", "reason", "times"], rows, numbers=[3])
    note = f"<p class='note'>{_cut(len(counts), MAX_REFUSALS, 'kinds')}</p>" if len(counts) > MAX_REFUSALS else ""
    return f"<section><h2>Refused and failed</h2>{grid}{note}</section>"


def _experiment(run: RunFiles) -> str:
    if not run.experiment:
        return ""
    lines = "\n".join(plain(line, 500) for line in run.experiment[:MAX_FILE].splitlines())
    shown = f"<summary>The experiment, as resolved</summary><pre>{html.escape(lines)}</pre>"
    return f"<section><details>{shown}</details></section>"
