"""Write docs/lifecycles.md from the transition tables of the machine."""

from pathlib import Path

from fedge.server.machine.lifecycles import CLIENT, POOL, TASK, Table

OUT = Path(__file__).resolve().parents[1] / "docs" / "lifecycles.md"
INTRO = """# Lifecycles

Drawn from `server/machine/lifecycles.py` by `python tools/draw_lifecycles.py`; a test keeps it current. An event that
has no arrow out of a state cannot happen there: it raises and changes nothing.
"""


def diagram(table: Table) -> str:
    """A Mermaid state diagram."""
    arrows = [f"    {state} --> {after}: {event}" for (state, event), after in table.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", *arrows, "```"])


def page() -> str:
    """The whole document."""
    parts = [f"## {name}\n\n{diagram(table)}\n" for name, table in (("Client", CLIENT), ("Task", TASK), ("Pool", POOL))]
    return "\n".join([INTRO, *parts])


if __name__ == "__main__":
    OUT.write_text(page())
