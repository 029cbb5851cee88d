"""Time to target accuracy of every scheduler, relative to FedCompass as published: the layout of its paper's Table 1.

Each run is a whole federation in virtual time: the perceptron of `perceptron.py` on the shipped Fashion-MNIST images,
0.15 s per local step on average with 5 % jitter, equal weights. A cell is the median over the seeds of the virtual time
at which the test accuracy first reaches the row's target, '-' where most runs miss it within the horizon.

Every scheduler gets the same local steps, batch and rate, and the best of six settings of its own: `--tune` runs all of
them on other seeds and prints the figures; CHOSEN holds the winners.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before NumPy loads: one thread per run, several runs at once

import argparse
import math
import multiprocessing
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.harness import Goal, emit
from benchmarks.perceptron import Perceptron
from fedge.client.data import PARTITIONS, Dataset, load
from fedge.server.machine import Federation, Stop
from fedge.simulation import SPEEDS, Simulation
from fedge.strategies import aggregators
from fedge.strategies.optimizers import OPTIMIZERS
from fedge.strategies.schedulers import SCHEDULERS
from fedge.strategies.weighers import STALENESS, WEIGHERS

RATE, BATCH, HIDDEN = 0.1, 32, 32
HORIZON_S = 400.0
TARGETS = {"class": 0.70, "dual-dirichlet": 0.75}
SPEED_KINDS = ("homogeneous", "normal", "exponential")
CLIENTS = (5, 10)
SEEDS, TUNING_SEEDS = range(10, 15), range(2)
BASE, DEFAULT = "compass", "default"


@dataclass(frozen=True)
class Setting:
    """A scheduler, the discount for staleness, and the server optimizer."""

    scheduler: Mapping[str, Any]
    staleness: str = "polynomial"
    momentum: float = 0.0

    def __str__(self) -> str:
        own = [f"{key} {value}" for key, value in self.scheduler.items() if key != "kind"]
        more = [f"{self.staleness} staleness"] + ([f"server momentum {self.momentum}"] if self.momentum else [])
        return ", ".join(own + more)


def compass(alpha: float, momentum: float, balance: float, staleness: str = "constant", **own: Any) -> Setting:
    """FedCompass with STEPS / 5 to STEPS local steps."""
    scheduler = {"kind": "compass", "max_steps": STEPS, "min_steps": STEPS // 5, "alpha": alpha}
    scheduler |= {"balance": balance, **own}
    return Setting(scheduler, staleness, momentum)


def timed(kind: str, staleness: str = "constant", momentum: float = 0.0, **own: Any) -> Setting:
    """A scheduler whose tasks all have STEPS local steps."""
    return Setting({"kind": kind, "steps": STEPS, **own}, staleness, momentum)


STEPS = 25
# Six settings each; server momentum is among them for every scheduler that can have it, as the default has it.
TRIED: dict[str, list[Setting]] = {
    "fedavg": [timed("fedavg", momentum=beta) for beta in (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)],
    "fedasync": [
        *(timed("fedasync", how, alpha=alpha) for how in ("polynomial", "constant") for alpha in (0.3, 0.6)),
        timed("fedasync", "polynomial", 0.5, alpha=0.3),
        timed("fedasync", "constant", 0.5, alpha=0.15),
    ],
    "fedbuff": [
        *(timed("fedbuff", how, buffer=buffer) for how in ("polynomial", "constant") for buffer in (3, 5)),
        timed("fedbuff", "polynomial", 0.5, buffer=3),
        timed("fedbuff", "constant", 0.5, buffer=5),
    ],
    "fedat": [timed("fedat", tiers=tiers) for tiers in (2, 3, 4, 5)],  # its own optimizer leaves no place for momentum
    "dbw": [timed("dbw", momentum=beta, rate=RATE) for beta in (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)],
    # As published: alpha 0.9, each update a share of 1/N, polynomial staleness, plain steps.
    BASE: [
        compass(0.9, 0.0, 0.0, "polynomial", min_steps=least, latest_factor=latest)
        for least in (5, 8, 12)
        for latest in (1.2, 1.5)
    ],
    # alpha, server momentum, balance
    DEFAULT: [
        compass(1.0, 0.6, 0.0),
        compass(1.0, 0.6, 0.5),
        compass(1.25, 0.6, 0.5),
        compass(1.5, 0.5, 0.5),
        compass(1.5, 0.6, 0.5),
        compass(1.25, 0.6, 0.25),
    ],
}
CHOSEN = {"fedavg": 3, "fedasync": 5, "fedbuff": 3, "fedat": 0, "dbw": 0, BASE: 0, DEFAULT: 1}


@dataclass(frozen=True)
class Job:
    """One run: which scheduler with which of its settings, on which row, with which seed."""

    name: str
    index: int
    speeds: str
    partition: str
    clients: int
    seed: int

    @property
    def row(self) -> tuple[str, str, int]:
        """What the runs of one line of the table share."""
        return self.speeds, self.partition, self.clients


@cache
def dataset() -> Dataset:
    """The shipped images, once per process."""
    return load("fashion-mnist")


def time_to_target(job: Job) -> float:
    """Virtual seconds to the target; infinity where the run misses it."""
    setting, images = TRIED[job.name][job.index], dataset()
    trainer = Perceptron(images, HIDDEN, BATCH, RATE, job.seed)
    partition = PARTITIONS.build({"kind": job.partition, "clients": job.clients})
    shards = partition.split(images.y_train.astype("int64"), {}, job.seed)
    kind = "fedat" if job.name == "fedat" else "momentum" if setting.momentum else "sgd"
    optimizer = {"fedat": {"tiers": setting.scheduler.get("tiers")}, "momentum": {"beta": setting.momentum}}.get(
        kind, {}
    )
    federation = Federation(
        layout=trainer.layout,
        scheduler=SCHEDULERS.build(setting.scheduler),
        share=WEIGHERS.build({"kind": "equal"}),
        staleness=STALENESS.build({"kind": setting.staleness}),
        aggregator=aggregators.build({"kind": "mean"}),
        optimizer=OPTIMIZERS.build({"kind": kind, **optimizer}),
        expected=job.clients,
        seed=job.seed,
        stop=Stop(seconds=HORIZON_S, target=TARGETS[job.partition]),
    )
    simulation = Simulation(federation, trainer, shards, SPEEDS.build({"kind": job.speeds}), jitter=0.05)
    result = simulation.run()
    return result.now if result.finished == "target" else math.inf


def measure(jobs: Sequence[Job], processes: int) -> dict[Job, float]:
    """All jobs, in parallel processes, with progress on standard error."""
    times: dict[Job, float] = {}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for job, seconds in zip(jobs, pool.imap(time_to_target, jobs)):
            times[job] = seconds
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{len(times)}/{len(jobs)} runs")
    return times


def grid(names: Iterable[tuple[str, int]], rows: Iterable[tuple[str, str, int]], seeds: Iterable[int]) -> list[Job]:
    """Every scheduler on every row with every seed."""
    rows, seeds = list(rows), list(seeds)
    return [Job(name, index, *row, seed) for name, index in names for row in rows for seed in seeds]


def geometric_mean(values: Iterable[float]) -> float:
    """Over the rows; a miss counts as twice the horizon."""
    return math.exp(statistics.fmean(math.log(min(value, 2 * HORIZON_S)) for value in values))


def tune(processes: int) -> list[dict[str, Any]]:
    """Every setting tried, on four rows and the tuning seeds: the geometric mean of its median times."""
    rows = [("homogeneous", "class", 10), ("normal", "dual-dirichlet", 5), ("exponential", "class", 5)]
    rows.append(("exponential", "dual-dirichlet", 10))
    names = [(name, index) for name, settings in TRIED.items() for index in range(len(settings))]
    times = measure(grid(names, rows, TUNING_SEEDS), processes)
    found = []
    for name, index in names:
        by_row = [
            [t for job, t in times.items() if job.row == row and (job.name, job.index) == (name, index)] for row in rows
        ]
        seconds = geometric_mean(statistics.fmean(min(t, 2 * HORIZON_S) for t in group) for group in by_row)
        chosen = "chosen" if CHOSEN[name] == index else ""
        found.append({"scheduler": name, "setting": str(TRIED[name][index]), "mean_s": round(seconds, 1), "": chosen})
    return found


def table(times: Mapping[Job, float]) -> tuple[list[dict[str, Any]], dict[tuple[str, str, int], dict[str, float]]]:
    """(rows to print, median seconds by row and scheduler)."""
    rows, medians = [], {}
    for row in dict.fromkeys(job.row for job in times):
        cells = {name: [t for job, t in times.items() if job.row == row and job.name == name] for name in TRIED}
        medians[row] = middle = {name: statistics.median(cell) for name, cell in cells.items()}
        base = middle[BASE] if math.isfinite(middle[BASE]) else HORIZON_S
        line: dict[str, Any] = dict(zip(("speeds", "partition", "clients"), row)) | {"compass_s": number(middle[BASE])}
        for name, cell in cells.items():
            spread = [t / base for t in sorted(cell)]
            low, high = spread[len(spread) // 4], spread[(3 * len(spread)) // 4]
            line[name] = f"{middle[name] / base:.2f} ({low:.2f}..{'-' if math.isinf(high) else f'{high:.2f}'})"
            if math.isinf(middle[name]):
                line[name] = "-"
        rows.append(line)
    return rows, medians


def number(seconds: float) -> float | None:
    """Rounded, or None where the target is missed."""
    return round(seconds, 1) if math.isfinite(seconds) else None


def goals(medians: Mapping[tuple[str, str, int], Mapping[str, float]]) -> list[Goal]:
    """First or within 5 % of first on every row, and first by geometric mean."""
    worst = max(middle[DEFAULT] / min(middle.values()) for middle in medians.values())
    means = {name: geometric_mean(middle[name] for middle in medians.values()) for name in TRIED}
    rival = min(value for name, value in means.items() if name != DEFAULT)
    return [
        Goal("default: worst row, times the fastest", round(worst, 3), "<= 1.05", worst <= 1.05),
        Goal(
            "default: geometric mean, times the best rival's",
            round(means[DEFAULT] / rival, 3),
            "<= 1",
            means[DEFAULT] <= rival,
        ),
    ]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="one row, one seed")
    parser.add_argument("--tune", action="store_true", help="run every setting that was tried instead")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    tried = {name: [str(setting) for setting in settings] for name, settings in TRIED.items()}
    if options.tune:
        emit("schedulers-tuning", tune(options.processes), [], as_json=options.json)
        return
    rows = [(speeds, partition, n) for speeds in SPEED_KINDS for partition in TARGETS for n in CLIENTS]
    seeds: Sequence[int] = SEEDS
    if options.quick:
        rows, seeds = [("exponential", "dual-dirichlet", 5)], SEEDS[:1]
    times = measure(grid(CHOSEN.items(), rows, seeds), options.processes)
    lines, medians = table(times)
    notes = {"targets": TARGETS, "rate": RATE, "batch": BATCH, "horizon_s": HORIZON_S, "tried": tried}
    emit("schedulers", lines, goals(medians), as_json=options.json, notes=notes)


if __name__ == "__main__":
    main()
