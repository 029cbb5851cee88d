"""The functions people call: simulate an experiment, aggregate rows.

Owns how a run is played from beginning to end. Must never print.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge import build, hostile, runs, trackers
from fedge.client.data import load as load_data
from fedge.core.errors import ExperimentError, TrainerError
from fedge.core.params import Array, Vector
from fedge.experiment import Experiment
from fedge.runs import Recorder, Run, Watcher
from fedge.strategies import aggregators
from fedge.strategies.aggregators.robust import Robust
from fedge.strategies.contracts import Aggregator
from fedge.tally import Tally


def simulate(experiment: Experiment | Path | str, out: Path | str | None = None) -> Run:
    """Simulate an experiment, or the file of one, in virtual time.

    Where `out` is given, the run folder is written there; it must be empty or new. Raises leaves of FedgeError.
    """
    plan = experiment if isinstance(experiment, Experiment) else build.load_experiment(experiment)
    return play(build.settled(plan), lambda: runs.new_folder("", Path(out)) if out is not None else None)


def play(experiment: Experiment, folder: Callable[[], Path | None], watchers: Sequence[Watcher] = ()) -> Run:
    """Simulate a settled experiment. `folder` makes the run folder, once everything else is known to be in order.

    A run that is interrupted leaves its records and a summary, but no model. Raises TrainerError where every client
    was shut out, or no update came of it because clients failed; the folder is complete then, too.
    """
    dataset = load_data(experiment.data.dataset)
    build.check_target(experiment, dataset)
    parts = build.shards(experiment, dataset)
    partition = build.partition_summary(dataset, parts)
    if hostile.poisons(experiment):
        dataset, parts = hostile.poisoned(experiment, dataset, parts, build.client_names(len(parts)))
    trainer = build.trainer(experiment, dataset)
    simulation = build.simulation(experiment, trainer, parts)
    path = folder()
    remarks = hostile.remarks(experiment)
    with trackers.opened(experiment, path) as more, Recorder(experiment, path, [*more, *watchers], remarks) as recorder:
        try:
            result = simulation.run(recorder.record, recorder.metrics)
        except BaseException as error:  # said in the summary, and passed on
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
            recorder.finish(partition, reason=reason)
            raise
        made = recorder.finish(partition, trainer.layout, result.vector, result.finished)
    if result.finished in ("idle", "starved"):
        _raise_if_all_failed(recorder.tally, len(parts))
    return made


def _raise_if_all_failed(tally: Tally, clients: int) -> None:
    if tally.counts["evicted"] == clients:
        so_far = f" after {tally.version} versions" if tally.version else ""
        raise TrainerError(f"All {clients} clients were shut out{so_far}; the last said: {tally.last_failure}")
    if tally.failures and not tally.updates:
        what = f"No version came of this run, since {tally.starved}" if tally.starved else "No update came of this run"
        raise TrainerError(f"{what}: {tally.failures}.")


def aggregate(
    rows: Any,
    kind: str = "mean",
    byzantine: int = 0,
    pre: Sequence[str | Mapping[str, Any]] = (),
    weights: Sequence[float] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Vector:
    """Rows [n, d] to one vector float32 [d] by any rule: `kind` and its settings, as in an experiment file.

    `byzantine` is f; `pre` names pre-aggregators. `weights` [n] count where the rule honours them. `root` of 'fltrust'
    is the index of the trusted row. A robust rule sets rows with NaN, infinite or overflowing values aside, each
    counted as one of the f. Raises ExperimentError where rule, rows and weights do not fit, StrategyError where a rule
    of one's own breaks.
    """
    table = _table(rows)
    shares, clients = _shares(weights, len(table)), [f"row-{index:09d}" for index in range(len(table))]
    f = _whole("byzantine", byzantine)
    rule = aggregators.build(plan := _plan({"kind": kind, **settings}, f, pre, clients))
    if weights is not None and not rule.honours_weights:
        raise ExperimentError(f"{kind!r} ignores weights; leave them out, or take 'geometric-median', which has them.")
    sound = _sound(table)
    if lost := int((~sound).sum()):
        if rule.associative or lost > f:
            raise ExperimentError(
                f"{lost} of {len(table)} rows hold NaN, infinite or overflowing values; leave them out, or take a "
                "robust rule with byzantine at least as large."
            )
        plan |= {"byzantine": f - lost}
        rule, table, shares = aggregators.build(plan), table[sound], shares[sound]
        clients = [name for name, kept in zip(clients, sound) if kept]
    if missing := rule.lacks(clients, rule.memory()):
        raise ExperimentError(_unfit(plan, rule, clients, missing))
    return _finished(rule, table, shares, clients, _whole("seed", seed))


def _finished(rule: Aggregator, table: Array, shares: Array, clients: Sequence[str], seed: int) -> Vector:
    state = rule.of(table, shares) if isinstance(rule, Robust) else rule.init(table.shape[1])
    for row, share in zip(table, shares) if not isinstance(rule, Robust) else ():
        state = rule.fold(state, row, float(share))
    return rule.finish(state, clients, rule.memory(), seed).vector


def _plan(table: dict[str, Any], f: int, pre: Any, clients: Sequence[str]) -> dict[str, Any]:
    """The settings of the rule, as in an experiment file. Raises ExperimentError."""
    kind = table["kind"]
    if idle := [name for name in ("cache", "momentum") if table.get(name)]:
        raise ExperimentError(f"{idle[0]} acts from one group of rows to the next, and here is but one; leave it out.")
    if isinstance(pre, str | Mapping) or not isinstance(pre, Sequence):
        raise ExperimentError(f'pre is a list, as in pre = ["nnm"], not {pre!r}.')
    if kind == "fltrust":
        root = table.get("root")
        if isinstance(root, bool) or not isinstance(root, int | np.integer) or not 0 <= root < len(clients):
            raise ExperimentError(f"'fltrust' needs root, the index of the trusted row: 0 to {len(clients) - 1}.")
        table["root"] = clients[int(root)]
    return table | ({"byzantine": f} if f else {}) | ({"pre": list(pre)} if pre else {})


def _unfit(plan: Mapping[str, Any], rule: Aggregator, clients: Sequence[str], missing: str) -> str:
    """Why these rows are no group for the rule, and what would be one."""
    if plan["kind"] == "fltrust":
        return "The row that 'fltrust' trusts, its root, holds NaN, infinite or overflowing values; trust another."
    fits = aggregators.most_byzantine(plan, len(clients), lambda less: not less.lacks(clients, less.memory()))
    least, what = rule.min_rows(), f"lacks {missing.replace('client', 'row')}, and there are {len(clients)} rows"
    more = "give more rows"
    if least > len(clients):
        what, more = f"needs {least} rows, and there are {len(clients)}", f"give at least {least}"
    fewer = "" if fits is None else f"set byzantine to at most {fits}, or "
    return f"{plan['kind']!r} with byzantine = {plan.get('byzantine', 0)} {what}; {fewer}{more}."


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ExperimentError(f"{name} must be a whole number, not {value!r}.")
    return int(value)


def _shares(weights: Any, count: int) -> Array:
    """[n] of float64, 1 where there are none. Raises ExperimentError."""
    shares = np.ones(count) if weights is None else _numbers(weights, np.float64)
    if shares is None or shares.shape != (count,) or not np.isfinite(shares).all() or (shares < 0).any():
        raise ExperimentError(f"weights must be {count} numbers of at least 0, one per row.")
    return shares


def _sound(table: Array) -> NDArray[np.bool_]:
    """Which rows have a finite norm, in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: NDArray[np.bool_] = np.isfinite(np.einsum("ij,ij->i", table, table))
    return found


def _table(rows: Any) -> Array:
    """[n, d] of float32, in one piece. Raises ExperimentError."""
    table = _numbers(rows, np.float32)
    if table is None:
        raise ExperimentError(
            "rows must be real numbers, one row of equal length per update, [n, d]; of a tensor with a gradient give "
            "detach()."
        )
    if table.ndim != 2 or not table.size:
        raise ExperimentError(f"rows has shape {table.shape}; give one row per update, [n, d].")
    return np.ascontiguousarray(table)


def _numbers(values: Any, kind: type[np.floating[Any]]) -> Array | None:
    """As an array of that type, infinite where they are too large for it; None where they are no real numbers."""
    try:
        found = np.asarray(values)
        with np.errstate(over="ignore"):
            return None if found.dtype.kind in "cSUmM" else found.astype(kind, copy=False)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last
        return None
