"""What every aggregation rule costs beside byzfl, Flower, the published Flag Aggregator and what no rule can avoid.

A rule of fedge is timed end to end on a matrix of rows, and from the last arrival on, its rows having been folded one
by one as they came. What is compared runs in turns, so a ratio is of the same minute; everything may use two threads.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "2")  # before NumPy loads

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Goal, arguments, emit, goal, in_turns
from benchmarks.probes import Prepare, Work, itself, patience, probed
from benchmarks.rival_aggregators import ONE_ROUND, Rival, Rows, rivals, vector
from fedge.core.errors import ExperimentError
from fedge.strategies import aggregators
from fedge.strategies.aggregators import robust
from fedge.strategies.aggregators.evidence import Mixing

SLOW_S, SLOWEST_S, PATIENCE_S = 0.5, 10.0, 200.0  # from where on: in fewer turns; only once; not to the end
SLOW_TURNS = 2
BLOCK = 1 << 13

Line = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """n rows of d float32, f of them hostile; `turns` of everything that is fast enough."""

    name: str
    count: int
    size: int
    byzantine: int
    turns: int

    def rows(self) -> Rows:
        """Normal noise of 3.3 times the length of the mean; the last f rows point the other way."""
        generator = np.random.default_rng(0)
        table = generator.standard_normal((self.count, self.size), dtype=np.float32)
        mean = generator.standard_normal(self.size, dtype=np.float32) / np.float32(3.3)
        table[: -self.byzantine] += mean
        table[-self.byzantine :] -= mean
        return Rows(table, self.byzantine)


FULL = (Setup("A", 20, 10**6, 4, 9), Setup("B", 100, 10**6, 20, 7), Setup("C", 20, 10**7, 4, 5))
QUICK = (Setup("quick", 20, 10**5, 4, 5),)
SMALL = Setup("small", 20, 2000, 4, 1)  # on which results are compared

# The rules as they are, and what is wanted beside them.
SETTINGS: Mapping[str, Mapping[str, Any]] = {"fltrust": {"root": "row-000"}}
CHAINS: Mapping[str, Mapping[str, Any]] = {
    ONE_ROUND: {"kind": "bulyan", "selection": "multi-krum"},
    "nnm, multi-krum": {"kind": "multi-krum", "pre": ["nnm"]},
    "nnm, trimmed-mean": {"kind": "trimmed-mean", "pre": ["nnm"]},
    "bucketing, geometric-median": {"kind": "geometric-median", "pre": ["bucketing"]},
    "arc, trimmed-mean": {"kind": "trimmed-mean", "pre": ["arc"]},
}
CASES = {**{kind: {"kind": kind, **SETTINGS.get(kind, {})} for kind in aggregators.AGGREGATORS.entries}, **CHAINS}


# ---- fedge -------------------------------------------------------------------------------------


@dataclass
class Fedge:
    """One rule on these rows. Raises ExperimentError where it cannot have them."""

    case: str
    rows: Rows
    rule: Any = field(init=False)
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        folds = self.case == "mean"
        self.rule = aggregators.build({**CASES[self.case], **({} if folds else {"byzantine": self.rows.byzantine})})
        self.names = [f"row-{index:03d}" for index in range(self.rows.count)]
        if missing := self.rule.lacks(self.names, self.rule.memory()):
            raise ExperimentError(f"lacks {missing}")

    @property
    def family(self) -> str:
        """What it cannot do without: "gram", "sort", "both" of them, or "" for other rules."""
        rule = getattr(self.rule, "rule", None)
        if hasattr(rule, "coefficients"):
            return "gram"
        if not hasattr(rule, "reduce"):
            return ""
        return "both" if self.rule.pre or isinstance(rule, Mixing) else "sort"

    def at_once(self) -> Any:
        """Of the matrix, as fedge.aggregate has it."""
        if isinstance(self.rule, robust.Robust):
            state: Any = self.rule.of(self.rows.table, np.ones(self.rows.count))
        else:
            state = self.folded(list(self.rows.table))
        return self.finished(state)

    def folded(self, rows: list[Any]) -> Any:
        """The state when all have come."""
        state = self.rule.init(self.rows.table.shape[1])
        for row in rows:
            state = self.rule.fold(state, row, 1.0)
        return state

    def finished(self, state: Any) -> Any:
        """The aggregate; the state is used up."""
        return self.rule.finish(state, self.names, self.rule.memory(), 0).vector


def copied(state: Any) -> Any:
    """A state to use up; rows are not copied."""
    if isinstance(state, robust.Rows):
        return robust.Rows(list(state.rows), list(state.weights), state.gram.copy())
    return list(state) if isinstance(state, list) else copy.deepcopy(state)


# ---- what no rule can avoid --------------------------------------------------------------------


@dataclass
class Floors:
    """Each in the forms that come to mind; the fastest on these rows counts."""

    rows: Rows

    def forms(self) -> dict[str, dict[str, Work]]:
        """The works by name and form."""
        table, tensor = self.rows.table, torch.from_numpy(self.rows.table)
        weights = np.full(len(table), 1 / len(table), np.float32)
        return {
            "mean": {"numpy": lambda: table.mean(axis=0), "torch": lambda: tensor.mean(dim=0)},
            "weighted sum": {"numpy": lambda: weights @ table, "torch": lambda: torch.from_numpy(weights) @ tensor},
            "gram": {"numpy": lambda: table @ table.T, "torch": lambda: tensor @ tensor.T},
            "sort": {"numpy": lambda: np.sort(table, axis=0), "numpy, by columns, two threads": self._sort},
        }

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """The two threads."""
        return ThreadPoolExecutor(2)

    def _sort(self) -> None:
        size = self.rows.table.shape[1]
        list(self.pool.map(self._sort_part, (0, size // 2), (size // 2, size)))

    def _sort_part(self, start: int, stop: int) -> None:
        for low in range(start, stop, BLOCK):
            np.ascontiguousarray(self.rows.table[:, low : min(low + BLOCK, stop)].T).sort(axis=1)

    def fastest(self, setup: Setup) -> tuple[dict[str, Work], list[Line]]:
        """The works that count, by name; a row for each form."""
        chosen, shown = {}, []
        for name, forms in self.forms().items():
            probes = {form: probed(partial(itself, work)) for form, work in forms.items()}
            least = min(seconds for seconds, _ in probes.values())
            able = {form: work for form, work in forms.items() if probes[form][0] <= max(SLOW_S, 10 * least)}
            taken = in_turns(able, setup.turns)
            middle = {form: median(taken.get(form, [probes[form][0]])) for form in forms}
            chosen[name] = forms[min(middle, key=middle.__getitem__)]
            for form in forms:
                more = {"peak_mib": probes[form][1], "note": "" if form in able else "one run"}
                shown.append(row(setup, name, f"floor, {form}", middle[form], **more))
        return chosen, shown


# ---- one rule and its rivals -------------------------------------------------------------------


COLUMNS = (
    *("after_last_ms", "arrival_ms", "last_times_mean", "times_floor"),
    *("times_fedge", "same", "peak_mib", "note"),
)


def row(setup: Setup, rule: str, library: str, seconds: float | None, **more: Any) -> Line:
    """One line of the result."""
    line = {"setup": setup.name, "rule": rule, "library": library, "ms": digits(seconds and seconds * 1e3)}
    return line | {name: more.get(name) for name in COLUMNS}


def digits(value: float | None) -> float | None:
    """Three of them."""
    return None if value is None else float(f"{value:.3g}")


OWN, LAST = "fedge", "after the last arrival"
FLOOR: Mapping[str, tuple[str, ...]] = {"gram": ("gram", "weighted sum"), "sort": ("sort",), "both": ("gram", "sort")}


@dataclass(frozen=True)
class Taken:
    """Seconds of each work, turn by turn."""

    seconds: Mapping[str, list[float]]

    def over(self, name: str, *others: str) -> float:
        """The median ratio to the others together."""
        below = (sum(together) for together in zip(*(self.seconds[other] for other in others)))
        return float(median(one / other for one, other in zip(self.seconds[name], below)))

    def middle(self, name: str) -> float:
        """The median."""
        return median(self.seconds[name])


def timed(works: Mapping[str, Prepare], turns: int) -> Taken:
    """In turns; each work is prepared anew, which is not timed."""
    ready: dict[str, Work] = {}

    def prepared(name: str) -> None:
        ready[name] = works[name]()

    return Taken(in_turns({name: partial(_spend, ready, name) for name in works}, turns, prepared))


def _spend(ready: dict[str, Work], name: str) -> None:
    ready.pop(name)()


def compared(setup: Setup, case: str, rows: Rows, floors: Mapping[str, Work]) -> Iterator[tuple[Line, Line]]:
    """The lines of the result for one case, each with the ratios that goals are about."""
    try:
        own = Fedge(case, rows)
    except ExperimentError as error:
        yield row(setup, case, OWN, None, note=str(error)), {}
        return
    same, others = agreement(case), list(rivals(case, rows))
    arrived, arrival_s = arrivals(own)
    works: dict[str, Prepare] = {OWN: lambda: own.at_once, LAST: lambda: partial(own.finished, copied(arrived))}
    probes = {name: probed(work) for name, work in works.items()} | dict(first_runs(others))
    runs = {one.library: one.prepare for one in others if one.prepare and one.library in probes}
    fast = {name: prepare for name, prepare in runs.items() if probes[name][0] <= SLOW_S}
    slow = {name: prepare for name, prepare in runs.items() if SLOW_S < probes[name][0] <= SLOWEST_S}
    beside = {name: partial(itself, floors[name]) for name in ("mean", *FLOOR.get(own.family, ()))}
    many = timed({**works, **beside, **fast}, setup.turns)
    few = timed({OWN: works[OWN], **slow}, SLOW_TURNS) if slow else many

    yield own_line(setup, own, many, arrival_s, probes[OWN][1])
    for other in others:
        name = other.library
        if name not in probes:
            yield row(setup, case, name, None, note=other.why_not or f"not done after {PATIENCE_S:.0f} s"), {}
            continue
        part, once = many if name in fast else few, name not in fast and name not in slow
        faster = probes[name][0] / many.middle(OWN) if once else part.over(name, OWN)
        rare = "" if name in fast else "one run" if once else f"{SLOW_TURNS} runs"
        note = "; ".join(filter(None, (other.differs and f"differs: {other.differs}", rare)))
        more = {"times_fedge": digits(faster), "same": same.get(name), "peak_mib": probes[name][1], "note": note}
        line = row(setup, case, name, probes[name][0] if once else part.middle(name), **more)
        yield line, {"case": case, "family": own.family, "faster": faster}


def first_runs(others: list[Rival]) -> Iterator[tuple[str, tuple[float, float | None]]]:
    """Of those that can be run, and come to an end in time."""
    for other in others:
        if other.prepare:
            with contextlib.suppress(TimeoutError), patience(PATIENCE_S):
                yield other.library, probed(other.prepare)


def own_line(setup: Setup, own: Fedge, taken: Taken, arrival_s: float, peak_mib: float | None) -> tuple[Line, Line]:
    """What fedge takes."""
    floor = FLOOR.get(own.family)
    last = taken.over(LAST, "mean")
    whole = taken.over(OWN, *floor) if floor else None
    more = {
        "after_last_ms": digits(taken.middle(LAST) * 1e3),
        "arrival_ms": digits(arrival_s * 1e3),
        "last_times_mean": digits(last),
        "times_floor": digits(whole),
        "peak_mib": peak_mib,
        "note": f"floor: {' + '.join(floor)}" if floor else "",
    }
    ratios = {"case": own.case, "family": own.family, "last": last, "whole": whole}
    return row(setup, own.case, OWN, taken.middle(OWN), **more), ratios


def arrivals(own: Fedge) -> tuple[Any, float]:
    """The state when rows of their own memory have all come, and the mean seconds that one took."""
    separate = [np.array(one) for one in own.rows.table]
    begun = time.perf_counter()
    state = own.folded(separate)
    return state, (time.perf_counter() - begun) / own.rows.count


def agreement(case: str) -> dict[str, str]:
    """By library, whether its result on a few short rows is fedge's. It must be, where it is said to do the same."""
    rows = SMALL.rows()
    wanted = Fedge(case, rows).at_once()
    found = {}
    for rival in rivals(case, rows):
        if rival.prepare is None:
            continue
        with patience(PATIENCE_S):
            result = vector(rival.prepare()()) * rival.scale
        equal = np.allclose(result, wanted, rtol=1e-3, atol=1e-4)
        if not equal and not rival.differs:
            raise SystemExit(f"{rival.library} and fedge disagree about {case!r}, and nothing is known to differ.")
        found[rival.library] = "yes" if equal else "no"
    return found


# ---- all of it ---------------------------------------------------------------------------------


def measure(setups: tuple[Setup, ...]) -> tuple[list[Line], list[Goal]]:
    """Every rule in every setup."""
    torch.set_num_threads(2)
    shown: list[Line] = []
    ratios: list[Line] = []
    for setup in setups:
        rows = setup.rows()
        floors, lines = Floors(rows).fastest(setup)
        shown += lines
        for case in CASES:
            for line, ratio in compared(setup, case, rows, floors):
                shown.append(line)
                ratios.append(ratio)
    return shown, goals(ratios)


def goals(ratios: list[Line]) -> list[Goal]:
    """Judged by the worst of all rules and setups."""

    def found(what: str, family: str = "", case: str = "") -> list[float]:
        wanted = (one for one in ratios if (one.get("family") == family if family else one.get("case") == case))
        return [one[what] for one in wanted if one.get(what) is not None]

    last, whole, sort = found("last", "gram"), found("whole", "gram"), found("whole", "sort")
    rival, flag = found("faster", "sort"), found("faster", case="flag")
    return [
        goal("after the last arrival over the mean, worst Gram rule", max(last, default=None), "<= 1.3"),
        goal("end to end over Gram and weighted sum, worst Gram rule", max(whole, default=None), "<= 1.2"),
        goal("end to end over a sort of the rows, worst coordinate rule", max(sort, default=None), "<= 1.5"),
        goal("times faster than byzfl and Flower, worst coordinate rule", min(rival, default=None), ">= 4"),
        goal("times faster than the published Flag Aggregator", min(flag, default=None), ">= 100"),
    ]


def main() -> None:
    options = arguments(str(__doc__).splitlines()[0], only="of the setups A, B and C, e.g. A,B")
    setups = QUICK if options.quick else tuple(one for one in FULL if one.name in (options.only or "A,B,C").split(","))
    shown, judged = measure(setups)
    emit("aggregators", shown, judged, as_json=options.json)


if __name__ == "__main__":
    main()
