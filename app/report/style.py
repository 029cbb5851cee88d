"""How figures look, and how they become files: sizes, colours, fonts, SVG for the page and PNG beside it.

Owns the only use of matplotlib's machinery (Figure and Agg, never pyplot, whose state is global). Colours are those of
Okabe and Ito (2008), told apart by colour-blind readers too. Names come from the network: text goes through `plain`,
and no text is read as mathematics.
"""

import io
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedge.core.errors import DataError, ExperimentError

# Stand-ins: in a page they become its own colours, so that plots follow light and dark.
INK, MUTED, RULE, PAPER = "#1f2328", "#656d77", "#d8dee5", "#fefefe"
_PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}

BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE, YELLOW = (
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#f0e442",
)  # fmt: skip
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)

_RC = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "path.simplify": True,
}


def context(name: str = "figure") -> Any:
    """A context in which to make and save one figure. Raises ExperimentError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ExperimentError(
            "The report draws with matplotlib; run: pip install '.[plots]' in fedge's folder."
        ) from error
    settings: Any = {**_RC, "svg.hashsalt": f"fedge-{name}"}
    return mpl.rc_context(settings)


def figure(width: float, height: float) -> Any:
    """An empty Figure of that size in inches; within `context`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain(text: object, limit: int = 28) -> str:
    """One line of printable text, shortened: what a figure or a page may show of a name from the network."""
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def si(count: float) -> str:
    """A number of bytes in words: 431.1 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def labels(axis: Any, at: Iterable[float], names: Iterable[object], **look: Any) -> None:
    """Tick labels from names as they are."""
    axis.set_ticks(list(at), [plain(name) for name in names], **look)


def svg(drawn: Any) -> str:
    """The figure as an <svg> element in the colours of the page; the same bytes each time."""
    text = _save(drawn, "svg", metadata={"Date": None, "Creator": None}, transparent=True).decode("utf-8")
    text = text[text.index("<svg") :]
    for colour, variable in _PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # numbered per figure, so they would clash in one page
    wide = round(drawn.get_figwidth() * 96)  # CSS pixels: wider than drawn would only make the text large
    head = rf'<svg \1 style="max-width: {wide}px">'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, text, count=1)


def png(drawn: Any) -> bytes:
    """The figure as a PNG on white."""
    return _save(drawn, "png", dpi=160 if drawn.get_figwidth() <= 12 else 80, facecolor="white")


def write_png(path: Path, drawn: Any) -> None:
    """The figure as a file that somebody has named. Raises DataError where it cannot be written."""
    try:
        replace_file(path, png(drawn))
    except OSError as error:
        raise DataError(f"The figure {str(path)!r} cannot be written ({error}); mend or name another place.") from None


def _save(drawn: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph that the font lacks is drawn as a box
        drawn.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
