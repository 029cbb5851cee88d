"""How commands print: results on standard output, as text or as one JSON object, and notes on standard error."""

import json as jsons
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

WIDE = 240  # characters of a table that goes to a file or a pipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and errors as one too.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def say(data: Mapping[str, Any], as_json: bool, text: str) -> None:
    """The result: `data` as JSON, or `text`."""
    typer.echo(jsons.dumps(data, default=float) if as_json else text)


def note(text: str) -> None:
    """A line beside the result."""
    typer.echo(text, err=True)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Rows of cells under their heads, the first to the left."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title or None, box=None, header_style="bold", pad_edge=False)
    for index, head in enumerate(heads):
        made.add_column(head, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDE).print(made)
