"""Accuracy under attack: every attack against every chain of rules, in rounds and under FedCompass.

20 clients, 4 of them hostile, on Fashion-MNIST and CIFAR-10 (problems.py), iid and label-skewed. In rounds all clients
take part; under FedCompass with exponential speeds each group is aggregated with the last updates of the absent, and
hostile clients are as fast as drawn, or 3 or 10 times faster. Every mode has as much virtual time as FedCompass
with the plain mean needs for the updates of 20 rounds.

A cell is the test accuracy averaged over the last evaluations and over the seeds. The default chain was chosen on other
seeds (`--seeds`), and every chain has the same settings everywhere.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before NumPy loads: one thread per run, several runs at once

import argparse
import contextlib
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import fedge
from benchmarks import problems, robustness_figures
from benchmarks.harness import Goal, emit, goal
from fedge import experiment as experiments
from fedge.core.errors import TrainerError
from fedge.strategies.attacks.scaling import Scaling

CLIENTS, HOSTILE, STEPS, ROUNDS = 20, 4, 20, 20
DATA = ("fashion", "cifar")
PARTITIONS: dict[str, dict[str, Any]] = {
    "iid": {"kind": "iid"},
    "dirichlet 0.5": {"kind": "dirichlet", "alpha": 0.5},
    "dirichlet 0.1": {"kind": "dirichlet", "alpha": 0.1},
}
MODES = {"rounds": 0.0, "compass": 1.0, "compass, 3x faster": 3.0, "compass, 10x faster": 10.0}
SEEDS = {"rounds": 2}  # else one
SECONDS = 20.0  # virtual: FedCompass with the plain mean aggregates some CLIENTS x ROUNDS updates in it
LAST = 3  # evaluations that make the final accuracy

ATTACKS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "sign flip": {"kind": "sign-flip", "scale": 5.0},
    "label flip": {"kind": "label-flip"},
    "random": {"kind": "gaussian", "sigma": 100.0},
    "ALIE": {"kind": "alie", "z": 1.5},
    "IPM": {"kind": "ipm", "epsilon": 2.0},
    "min-max": {"kind": "min-max"},
    "min-sum": {"kind": "min-sum"},
    "mimic": {"kind": "mimic"},
    "optimal ALIE": {"kind": "alie-optimal", "evaluations": 8},
    "optimal IPM": {"kind": "ipm-optimal", "evaluations": 8},
    "backdoor": {"kind": "scaling"},
    "replay": {"kind": "replay"},
    "flooding": {"kind": "flooding", "scale": 5.0},
    "lying": {"kind": "lying"},
    "NaN": {"kind": "nan"},
    "Sybils": {"kind": "sybil"},
}
DEFAULT = "default"
CHAINS: dict[str, dict[str, Any]] = {
    "mean": {"kind": "mean"},
    "median": {"kind": "median"},
    "trimmed mean": {"kind": "trimmed-mean"},
    "multi-Krum": {"kind": "multi-krum"},
    "geometric median": {"kind": "geometric-median"},
    "centered clipping": {"kind": "centered-clipping"},
    "Bulyan": {"kind": "bulyan"},
    "CAF": {"kind": "caf"},
    "flag": {"kind": "flag"},
    "flag, as published": {"kind": "flag-paper"},
    "GAS, multi-Krum": {"kind": "gas", "base": "multi-krum", "splits": 50},
    "NNM, trimmed mean": {"kind": "trimmed-mean", "pre": ["nnm"]},
    DEFAULT: {"kind": "robust"},
}
# What the two papers claim, as pairs to compare: (the chain, those it is said to be ahead of, the attacks).
CLAIMS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "GAS lifts multi-Krum on skewed data": ("GAS, multi-Krum", ("multi-Krum",), ("ALIE", "IPM", "min-max", "min-sum")),
    "Flag, as published, is ahead under random vectors": (
        "flag, as published",
        ("median", "trimmed mean", "multi-Krum", "Bulyan"),
        ("random",),
    ),
    "Flag, unit rows, is ahead under random vectors": (
        "flag",
        ("median", "trimmed mean", "multi-Krum", "Bulyan"),
        ("random",),
    ),
}


@dataclass(frozen=True)
class Job:
    """One run."""

    data: str
    partition: str
    mode: str
    attack: str
    chain: str
    seed: int


Cell = tuple[str, str, str, str, str]  # a job without its seed


def experiment(job: Job) -> experiments.Experiment:
    """The run as anybody could write it into an experiment file."""
    chain, faster = dict(CHAINS[job.chain]), MODES[job.mode]
    rounds = not faster
    kept = chain["kind"] != "mean"
    if kept:
        chain["byzantine"] = HOSTILE
    attack = ATTACKS[job.attack]
    hostile = {} if attack is None else {"attack": {**attack, "clients": HOSTILE, "faster": faster or 1.0}}
    scheduler = {"kind": "fedavg", "steps": STEPS}
    if not rounds:
        scheduler = {"kind": "compass", "min_steps": STEPS // 4, "max_steps": 2 * STEPS}
    server: dict[str, Any] = {"scheduler": scheduler, "aggregator": chain}
    server["weigher"] = {"kind": "equal"} if kept else {"kind": "examples"}
    stop = {"versions": ROUNDS} if rounds else {"seconds": SECONDS}
    speeds = {"kind": "homogeneous" if rounds else "exponential"}
    return experiments.of(
        {
            "experiment": {"name": "robustness", "seed": job.seed, "evaluate_updates": 40, "stop": stop},
            "data": {
                "dataset": f"benchmarks.problems:{job.data}",
                "partition": {**PARTITIONS[job.partition], "clients": CLIENTS},
            },
            "client": {"trainer": "benchmarks.problems:perceptron"},
            "server": server,
            "simulation": {"speeds": speeds, **hostile},
        }
    )


@dataclass(frozen=True)
class Result:
    """The final accuracy, and the share of stamped test images that are taken for the target of a backdoor."""

    accuracy: float
    backdoor: float | None = None


def play(job: Job) -> Result:
    """One run."""
    plan = experiment(job)
    try:
        run = fedge.simulate(plan)
    except TrainerError:  # too few clients were left for the rule, so the model stayed as it was
        idle = problems.perceptron(plan, getattr(problems, job.data)())
        return Result(idle.evaluate(idle.initial())["accuracy"])
    accuracy = float(run.metrics["accuracy"][-LAST:].mean())
    if job.attack != "backdoor":
        return Result(accuracy)
    attack, images = Scaling(), getattr(problems, job.data)()
    others = images.y_test != attack.target
    stamped = attack.stamped(images.x_test[others])
    fooled = replace(images, x_test=stamped, y_test=np.full(len(stamped), attack.target))
    judge = problems.perceptron(plan, fooled)
    return Result(accuracy, judge.evaluate(judge.layout.flatten(run.model))["accuracy"])


def measure(jobs: Sequence[Job], processes: int, log: Path | None = None) -> dict[Job, Result]:
    """All jobs, in parallel processes, with progress on standard error. What `log` holds already is not run again."""
    found = dict(_logged(log)) if log and log.exists() else {}
    found = {job: found[job] for job in jobs if job in found}
    left = [job for job in jobs if job not in found]
    with (
        multiprocessing.get_context("spawn").Pool(processes) as pool,
        log.open("a") if log else contextlib.nullcontext() as lines,
    ):
        for job, result in zip(left, pool.imap(play, left, chunksize=4)):
            found[job] = result
            if lines:
                lines.write(json.dumps([asdict(job), asdict(result)]) + "\n")
                lines.flush()
            if len(found) % 50 == 0 or len(found) == len(jobs):
                sys.stderr.write(f"{len(found)}/{len(jobs)} runs\n")
    return found


def _logged(log: Path) -> Iterator[tuple[Job, Result]]:
    for line in log.read_text().splitlines():
        job, result = json.loads(line)
        yield Job(**job), Result(**result)


def grid(
    data: Iterable[str],
    partitions: Iterable[str],
    modes: Iterable[str],
    attacks: Iterable[str],
    chains: Iterable[str],
    first_seed: int,
    seeds: int,
) -> list[Job]:
    """Every combination, one seed after the other; an attack that no one makes is the same at any speed."""
    places = itertools.product(data, partitions, modes, attacks, chains)
    jobs = [
        Job(*place, seed)
        for place in places
        if not (place[3] == "none" and MODES[place[2]] > 1)
        for seed in range(first_seed, first_seed + min(seeds, SEEDS.get(place[2], 1)))
    ]
    return sorted(jobs, key=lambda job: job.seed)


# ---- tables ------------------------------------------------------------------------------------


def cells(found: Mapping[Job, Result]) -> dict[Cell, list[float]]:
    """Accuracies over the seeds, by cell."""
    table: dict[Cell, list[float]] = {}
    for job, result in found.items():
        table.setdefault((job.data, job.partition, job.mode, job.attack, job.chain), []).append(result.accuracy)
    return table


def backdoors(found: Mapping[Job, Result]) -> list[dict[str, Any]]:
    """Per chain: how often stamped images are taken for the target, on average and at worst."""
    shares: dict[str, list[float]] = {}
    for job, result in found.items():
        if result.backdoor is not None:
            shares.setdefault(job.chain, []).append(result.backdoor)
    return [
        {
            "chain": chain,
            "backdoor works, %": round(100 * statistics.fmean(some), 1),
            "worst, %": round(100 * max(some), 1),
        }
        for chain, some in shares.items()
    ]


def calm(table: Mapping[Cell, list[float]], data: str, partition: str, mode: str, chain: str) -> float:
    """Accuracy where nobody attacks."""
    quiet = "rounds" if mode == "rounds" else "compass"
    return statistics.fmean(table[data, partition, quiet, "none", chain])


def losses(table: Mapping[Cell, list[float]], base: Callable[[str], str]) -> dict[tuple[str, str, str], float]:
    """The worst loss of each chain on each data set and partition, in points of accuracy, against `base(chain)` where
    nobody attacks.
    """
    worst: dict[tuple[str, str, str], float] = {}
    for (data, partition, mode, _, chain), accuracies in table.items():
        lost = calm(table, data, partition, mode, base(chain)) - statistics.fmean(accuracies)
        key = (data, partition, chain)
        worst[key] = max(worst.get(key, 0.0), 100 * lost)
    return worst


def worst_cases(table: Mapping[Cell, list[float]]) -> list[dict[str, Any]]:
    """Per chain: the loss in the worst case against itself and against the mean, each unattacked; and by what."""
    own, against_mean = losses(table, lambda chain: chain), losses(table, lambda _: "mean")
    rows = []
    for data, partition, chain in own:
        means = {
            (mode, attack): statistics.fmean(accuracies)
            for (d, p, mode, attack, c), accuracies in table.items()
            if (d, p, c) == (data, partition, chain)
        }
        by = min(means, key=means.__getitem__)
        line = {"data": data, "partition": partition, "chain": chain, "worst accuracy": round(100 * means[by], 1)}
        line |= {"loss": round(own[data, partition, chain], 1)}
        line |= {"loss against mean": round(against_mean[data, partition, chain], 1), "by": f"{by[1]} ({by[0]})"}
        rows.append(line)
    return rows


def claims(table: Mapping[Cell, list[float]]) -> list[dict[str, Any]]:
    """Each claim of the papers: points ahead of the best of the others, on average over the cells it speaks of."""
    rows = []
    for words, (chain, others, attacks) in CLAIMS.items():
        ahead = []
        for data, partition, mode in dict.fromkeys(cell[:3] for cell in table):
            for attack in attacks:
                here = [table.get((data, partition, mode, attack, name)) for name in (chain, *others)]
                if any(cell is None for cell in here) or (partition == "iid" and "skewed" in words):
                    continue
                mine, *theirs = (statistics.fmean(cell) for cell in here if cell is not None)
                ahead.append(100 * (mine - max(theirs)))
        if ahead:
            held = sum(points > 0 for points in ahead)
            line = {"claim": words, "points ahead": round(statistics.fmean(ahead), 1), "cells ahead": held}
            rows.append({**line, "cells": len(ahead)})
    return rows


def goals(table: Mapping[Cell, list[float]]) -> list[Goal]:
    """The default's worst case on iid data; and on skewed data its lead over every single rule."""
    worst = losses(table, lambda _: "mean")
    iid = max(lost for (_, partition, chain), lost in worst.items() if partition == "iid" and chain == DEFAULT)
    leads = []
    for (data, partition, chain), lost in worst.items():
        if partition != "iid" and chain == DEFAULT:
            rivals = [other for (d, p, c), other in worst.items() if (d, p) == (data, partition) and c != DEFAULT]
            leads.append(lost - min(rivals))
    found = [goal("default: worst loss on iid data, points against the mean unattacked", iid, "<= 5")]
    if leads:
        name = "default: worst loss on skewed data minus that of the best rule, points, worst of data and partitions"
        found.append(goal(name, max(leads), "< 0"))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a cut-down run of under a minute")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=max(SEEDS.values()), help="at most so many per cell")
    parser.add_argument("--log", type=Path, help="write each run down in this file, and take up what is in it")
    parser.add_argument("--figures", type=Path, help="draw the heat maps into this folder")
    for name, known in (("data", DATA), ("partitions", PARTITIONS), ("modes", MODES), ("attacks", ATTACKS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--chains", nargs="+", choices=list(CHAINS), default=list(CHAINS))
    chosen = parser.parse_args(argv)
    if chosen.quick:
        chosen.data, chosen.partitions, chosen.modes = (
            ["fashion"],
            ["iid"],
            ["rounds", "compass, 10x faster", "compass"],
        )
        chosen.attacks, chosen.chains = ["none", "sign flip", "ALIE"], ["mean", "multi-Krum", DEFAULT]
    notes: dict[str, Any] = {}
    if "cifar" in chosen.data and not problems.CIFAR.is_file():
        chosen.data.remove("cifar")
        notes["missing"] = f"cifar: there is no {problems.CIFAR}; fetch CIFAR-10 into it as x_train, y_train, ..."
    for name in chosen.data:
        getattr(problems, name)()  # made once, before there are several processes
    modes = list(dict.fromkeys(["compass", *chosen.modes] if any(MODES[m] > 1 for m in chosen.modes) else chosen.modes))
    jobs = grid(chosen.data, chosen.partitions, modes, chosen.attacks, chosen.chains, chosen.first_seed, chosen.seeds)
    found = measure(jobs, chosen.processes, chosen.log)
    table = cells(found)
    rows = [
        {**dict(zip(("data", "partition", "mode", "attack", "chain"), cell)), "accuracy": [round(a, 4) for a in seeds]}
        for cell, seeds in table.items()
    ]
    worst = worst_cases(table)
    if chosen.figures:
        robustness_figures.draw(table, chosen.figures)
    shown = rows if chosen.json else worst
    emit(
        "robustness", shown, goals(table), as_json=chosen.json, notes={"worst": worst, "claims": claims(table), **notes}
    )
    if not chosen.json:
        for claim in claims(table):
            print(claim)


if __name__ == "__main__":
    main()
