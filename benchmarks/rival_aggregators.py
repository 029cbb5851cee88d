"""The aggregation rules of byzfl and Flower, and the published Flag Aggregator, each as its users call it.

Owns which rule of theirs stands beside which of fedge's, in what the two differ, and why one is not run. Must never
time anything.
"""

import importlib.util
import logging
import math
import os
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.flag_reference import of_the_code, of_the_paper
from benchmarks.harness import MISSING
from benchmarks.probes import Prepare, Work

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

GIB = 1 << 30
MOST_SUBSETS = 10**6
MOST_READ = 10**11  # numbers: about a minute
MOST_LONG = 5 * 10**6  # numbers in a row: more take minutes to decompose 5 times


@dataclass(frozen=True)
class Rows:
    """n rows of d float32 [n, d], at most `byzantine` of them hostile."""

    table: NDArray[np.float32]
    byzantine: int

    @property
    def count(self) -> int:
        """N."""
        return len(self.table)

    @cached_property
    def scale(self) -> float:
        """The median norm."""
        return float(np.median(np.linalg.norm(self.table, axis=1)))

    @property
    def beta(self) -> float:
        """The share that Flower's trimmed mean cuts on each side, so that f rows are cut."""
        return (self.byzantine + 0.5) / self.count


@dataclass(frozen=True)
class Rival:
    """One rule of a library. `prepare` (not to be timed) gives the work; `why_not` says why there is none.

    `differs`: in what its definition differs from fedge's. `scale`: what its result is to be multiplied by.
    """

    library: str
    prepare: Prepare | None
    differs: str = ""
    why_not: str = ""
    scale: float = 1.0


def vector(result: Any) -> NDArray[np.float32]:
    """The aggregate [d] in whatever a library gives back."""
    if isinstance(result, tuple):  # Flower's strategies: arrays and metrics
        result = result[0].to_numpy_ndarrays()
    return np.asarray(result[0] if isinstance(result, list) else result)


def rivals(case: str, rows: Rows) -> Iterator[Rival]:
    """What stands beside the case, run or not."""
    if case in BYZFL:
        yield from _of_byzfl(BYZFL[case], rows)
    if case in FUNCTIONS or case in STRATEGIES:
        yield from _of_flower(case, rows)
    if case == "flag":
        yield from _published(rows)


# ---- byzfl -------------------------------------------------------------------------------------

BYZFL: Mapping[str, tuple[str, ...]] = {
    "average": ("Average",),
    "krum": ("Krum",),
    "multi-krum": ("MultiKrum",),
    "mda": ("MDA",),
    "geometric-median": ("GeometricMedian",),
    "centered-clipping": ("CenteredClipping",),
    "caf": ("CAF",),
    "median": ("Median",),
    "trimmed-mean": ("TrMean",),
    "meamed": ("Meamed",),
    "nnm, multi-krum": ("NNM", "MultiKrum"),
    "nnm, trimmed-mean": ("NNM", "TrMean"),
    "bucketing, geometric-median": ("Bucketing", "GeometricMedian"),
    "arc, trimmed-mean": ("ARC", "TrMean"),
}
DIFFERS = {
    "Krum": "n - f - 1 neighbours",
    "MultiKrum": "n - f - 1 neighbours",
    "GeometricMedian": "3 steps from 0",
    "CenteredClipping": "a radius in units of the rows, the same in each step",
    "CAF": "one step of the power method from a random vector",
    "Bucketing": "an order of its own",
}


def _of_byzfl(names: tuple[str, ...], rows: Rows) -> Iterator[Rival]:
    differs = "; ".join(DIFFERS[name] for name in names if name in DIFFERS)
    why_not = _too_much(names, rows) if importlib.util.find_spec("byzfl") else MISSING
    for kind, table in (("torch", torch.from_numpy(rows.table)), ("numpy", rows.table)):
        prepare = None if why_not else partial(_chain, names, table, rows)
        yield Rival(f"byzfl, {kind}", prepare, differs, why_not)


def _chain(names: tuple[str, ...], table: Any, rows: Rows) -> Work:
    """The rules one after the other, on rows of their own where they overwrite them."""
    # Its module of experiments, which nothing here needs, wants a torchvision that fits torch.
    sys.modules.setdefault("byzfl.benchmark", types.ModuleType("byzfl.benchmark"))
    import byzfl

    steps = [getattr(byzfl, name)(**_settings(name, rows)) for name in names]
    given = np.array(table) if isinstance(table, np.ndarray) and "ARC" in names else table
    given = table.clone() if isinstance(table, torch.Tensor) and "ARC" in names else given

    def work() -> object:
        result = given
        for step in steps:
            result = step(result)
        return result

    return work


def _settings(name: str, rows: Rows) -> dict[str, Any]:
    own: Mapping[str, dict[str, Any]] = {
        "Average": {},
        "Median": {},
        "GeometricMedian": {},
        "Bucketing": {"s": 2},
        "CenteredClipping": {"L": 3, "tau": rows.scale},
    }
    return own.get(name, {"f": rows.byzantine})


def _too_much(names: tuple[str, ...], rows: Rows) -> str:
    """Why it cannot be run; empty where it can."""
    count, f = rows.count, rows.byzantine
    if "MDA" in names and math.comb(count, f) > MOST_SUBSETS:
        return f"{math.comb(count, f):.1e} subsets"
    wanted = (count - f + 1) * rows.table.nbytes / GIB if "NNM" in names else 0.0
    return f"needs {wanted:.1f} GiB beside the rows, {free_gib():.1f} are free" if wanted > 0.9 * free_gib() else ""


def free_gib() -> float:
    """Memory that can be had."""
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    free = [int(line.split()[1]) / (1 << 20) for line in lines if line.startswith("MemAvailable")]
    return free[0] if free else math.inf


# ---- Flower ------------------------------------------------------------------------------------

ONE_ROUND = "bulyan, one round of scores"
FUNCTIONS: Mapping[str, str] = {
    "average": "aggregate",
    "krum": "aggregate_krum",
    "multi-krum": "aggregate_krum",
    "median": "aggregate_median",
    "trimmed-mean": "aggregate_trimmed_avg",
    "bulyan": "aggregate_bulyan",
}
STRATEGIES: Mapping[str, str] = {
    "average": "FedAvg",
    "krum": "Krum",
    "multi-krum": "MultiKrum",
    "median": "FedMedian",
    "trimmed-mean": "FedTrimmedAvg",
    ONE_ROUND: "Bulyan",
}


@dataclass(frozen=True)
class Reply:
    """What a strategy looks at in the message of a client."""

    content: Any

    def has_error(self) -> bool:
        """It has none."""
        return False


def _of_flower(case: str, rows: Rows) -> Iterator[Rival]:
    missing = "" if importlib.util.find_spec("flwr") else MISSING
    if case in FUNCTIONS:
        theta = rows.count - 2 * rows.byzantine
        read = sum((rows.count - gone) ** 2 for gone in range(theta)) * rows.table.shape[1] if case == "bulyan" else 0
        slow = f"would read {read:.0e} numbers, some minutes" if read > MOST_READ else ""
        why_not = missing or slow
        yield Rival("flwr, functions", None if why_not else partial(_function, case, rows), why_not=why_not)
    if case in STRATEGIES:
        yield Rival("flwr, strategies", None if missing else partial(_strategy, case, rows), why_not=missing)


def _function(case: str, rows: Rows) -> Work:
    from flwr.server.strategy import aggregate as module

    own: Mapping[str, tuple[Any, ...]] = {
        "krum": (rows.byzantine, 0),
        "multi-krum": (rows.byzantine, rows.count - rows.byzantine),
        "trimmed-mean": (rows.beta,),
        "bulyan": (rows.byzantine, module.aggregate_krum),
    }
    more = {"to_keep": 0} if case == "bulyan" else {}
    results = [([row], 1) for row in rows.table]
    return partial(getattr(module, FUNCTIONS[case]), results, *own.get(case, ()), **more)


def _strategy(case: str, rows: Rows) -> Work:
    """Anew each time: strategies take the arrays out of the replies."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp import strategy as module

    logging.getLogger("flwr").setLevel(logging.WARNING)  # it logs every call

    f = {"num_malicious_nodes": rows.byzantine}
    own: Mapping[str, dict[str, Any]] = {
        "krum": f,
        "multi-krum": {**f, "num_nodes_to_select": rows.count - rows.byzantine},
        "trimmed-mean": {"beta": rows.beta},
        ONE_ROUND: f,
    }
    strategy = getattr(module, STRATEGIES[case])(**own.get(case, {}))
    replies = [
        Reply(RecordDict({"arrays": ArrayRecord({"0": Array(row)}), "metrics": MetricRecord({"num-examples": 1})}))
        for row in rows.table
    ]
    return partial(strategy.aggregate_train, 1, replies)


# ---- the published Flag Aggregator -------------------------------------------------------------


def _published(rows: Rows) -> Iterator[Rival]:
    tensor = torch.from_numpy(rows.table)
    long = "5 times what one step takes" if rows.table.shape[1] > MOST_LONG else ""
    prepare = None if long else lambda: partial(of_the_paper, tensor)
    yield Rival("the paper, 5 steps", prepare, why_not=long, scale=rows.scale)
    yield Rival(
        "its code, 1 step", lambda: partial(of_the_code, tensor), "one step, and the sum over m", "", rows.scale
    )
