"""The progress of a run on a terminal, or as plain lines where there is none.

Writes to standard error, so that standard output holds results only. Must never slow a run down: the picture is drawn
a few times a second, not per event.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedge.experiment import Stop
from fedge.tally import Tally

BARS = "▁▂▃▄▅▆▇█"
SPARKS = 24  # characters of the accuracy curve
BAR = 24  # characters of the bar
FRAMES_PER_S = 4


class Progress:
    """Watches a run; a context manager."""

    def __init__(self, title: str, stop: Stop, console: Console | None = None) -> None:
        self._title, self._stop = title, stop
        self._tally = Tally()
        self._console = console or Console(file=sys.stderr)
        self._began = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._table, refresh_per_second=FRAMES_PER_S, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, tally: Tally) -> None:
        """Show this tally from now on."""
        self._tally, self._began = tally, time.monotonic()

    def metrics(self, line: Mapping[str, Any]) -> None:
        """One line per evaluation where there is no terminal."""
        if self._live is None:
            shown = "  ".join(f"{name} {value}" for name, value in self._rows(line))
            self._console.print(shown, markup=False, highlight=False, soft_wrap=True)

    def _rows(self, line: Mapping[str, Any]) -> list[tuple[str, str]]:
        tally = self._tally
        accuracy = line.get("accuracy")
        rows = [
            ("time", duration(tally.t)),
            ("wall", duration(time.monotonic() - self._began)),
            ("version", str(tally.version)),
            ("updates", str(tally.updates)),
            ("accuracy", "-" if accuracy is None else f"{accuracy:.2%}"),
            ("staleness", f"{tally.staleness_mean:.2f}"),
            ("sent up", size(tally.bytes_up)),
        ]
        further = [("held", tally.waiting), ("failures", tally.failures)]
        return [*rows, *((name, words) for name, words in further if words)]

    def _table(self) -> Table:
        line = self._tally.lines[-1] if self._tally.lines else {}
        rows = dict(self._rows(line))
        rows["updates"] += f"  {bar(self._share())}"
        rows["accuracy"] += f"  {sparkline(self._tally.column('accuracy'))}"
        table = Table.grid(padding=(0, 2))
        table.add_row(f"[bold]{self._title}", "")
        for name, value in rows.items():
            table.add_row(f"[dim]{name}", Text(value))
        return table

    def _share(self) -> float:
        """How much of the run is done: that of the stop criterion nearest to its end, in [0, 1]."""
        stop, tally = self._stop, self._tally
        shares = [
            done / limit
            for done, limit in ((tally.updates, stop.updates), (tally.version, stop.versions), (tally.t, stop.seconds))
            if limit
        ]
        return min(1.0, max(shares, default=0.0))


def sparkline(values: Sequence[float], width: int = SPARKS) -> str:
    """The last `width` values as bars, from the lowest to the highest among them."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def bar(share: float, width: int = BAR) -> str:
    """A share in [0, 1] as a bar and a percentage."""
    full = round(share * width)
    return f"{'━' * full}{'╌' * (width - full)} {share:.0%}"


def duration(seconds: float) -> str:
    """Seconds as people write them: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes as people write them, in powers of 1000: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
