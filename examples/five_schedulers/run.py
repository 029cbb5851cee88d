"""The same federation under five schedulers, side by side.

    python examples/five_schedulers/run.py [--out DIR] [--set KEY=VALUE ...]

Writes one run folder per scheduler and compare.html. Each run is also one command: `fedge run experiment.toml --set
server.scheduler.kind=fedbuff`, and the table is `fedge compare` on their folders.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fedge
from fedge.report import compare

EXPERIMENT = Path(__file__).with_name("experiment.toml")
KINDS = ("fedavg", "fedasync", "fedbuff", "fedat", "compass")


def main() -> None:
    """Play all five with their own defaults, then compare."""
    parser = argparse.ArgumentParser(description="The same federation under five schedulers.")
    parser.add_argument("--out", type=Path, default=Path("runs/five-schedulers"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    for kind in KINDS:
        settings = [f"experiment.name={kind}", f"server.scheduler.kind={kind}", *options.set]
        run = fedge.simulate(fedge.load_experiment(EXPERIMENT, settings), options.out / kind)
        print(f"{kind}: {run.summary['updates']} updates, {run.summary['wall_s']:.0f} s of computing", flush=True)
    found = compare([options.out / kind for kind in KINDS], options.out)
    title = f"to {found.target:.0%} accuracy; the times are those of simulated devices"
    table = Table(*found.heads, box=None, title=title)
    for cells in found.cells:
        table.add_row(*cells)
    Console(width=110).print(table)
    print(found.page)


if __name__ == "__main__":
    try:
        main()
    except fedge.FedgeError as error:
        raise SystemExit(f"error: {error}") from None
