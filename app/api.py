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
from fedge.tally import Tally


def simulate(experiment: Experiment | Path | str, out: Path | str | None = None) -> Run:
    """Simulate an experiment, or the file of one, in virtual time.

    Where `out` is given, the run folder is written there; it must be empty or new. Raises leaves of FedgeError.
    """
    plan = experiment if isinstance(experiment, Experiment) else build.load_experiment(experiment)
    return play(build.settled(plan), lambda: runs.new_folder("", Path(out)) if out is not None else None)


def play(experiment: Experiment, folder: Callable[[], Path | None], watchers: Sequence[Watcher] = ()) -> Run:
    """Simulate a settled experiment. `folder` makes the run folder, once everything else is known to be in order.

    A run that is interrupted leaves its records and a summary, but no model. Raises TrainerError where no update came
    of it because every client failed; the folder is complete then, too.
    """
    dataset = load_data(experiment.data.dataset)
    build.check_target(experiment, dataset)
    parts = build.shards(experiment, dataset)
    partition = build.partition_summary(dataset, parts)
    if hostile.poisons(experiment):
        dataset, parts = hostile.poisoned(experiment, dataset, parts)
    trainer = build.trainer(experiment, dataset)
    simulation = build.simulation(experiment, trainer, parts)
    path = folder()
    with trackers.opened(experiment, path) as more, Recorder(experiment, path, [*more, *watchers]) as recorder:
        try:
            result = simulation.run(recorder.record, recorder.metrics)
        except BaseException as error:  # said in the summary, and passed on
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
            recorder.finish(partition, reason=reason)
            raise
        made = recorder.finish(partition, trainer.layout, result.vector, result.finished)
    if result.finished in ("idle", "starved") and not result.updates:
        _raise_if_all_failed(recorder.tally, len(parts))
    return made


def _raise_if_all_failed(tally: Tally, clients: int) -> None:
    if tally.counts["evicted"] == clients:
        raise TrainerError(f"All {clients} clients were shut out; the last said: {tally.last_failure}")
    if tally.failures:
        raise TrainerError(f"No update came of this run: {tally.failures}.")


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

    `byzantine` is f; `pre` names pre-aggregators. `weights` [n] count where the rule honours them. A robust rule sets
    rows with NaN, infinite or overflowing values aside, each counted as one of the f. Raises ExperimentError where
    rule, rows and weights do not fit.
    """
    table = _table(rows)
    if table.ndim != 2 or not table.size:
        raise ExperimentError(f"rows has shape {table.shape}; give one row per update, [n, d].")
    shares = np.ones(len(table)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(table),) or not np.isfinite(shares).all() or (shares < 0).any():
        raise ExperimentError(f"weights must be {len(table)} numbers of at least 0, one per row.")
    chain: dict[str, Any] = {"byzantine": byzantine} if byzantine else {}
    plan = {"kind": kind, **settings, **chain, **({"pre": list(pre)} if pre else {})}
    rule = aggregators.build(plan)
    if weights is not None and not rule.honours_weights:
        raise ExperimentError(f"{kind!r} ignores weights; leave them out, or take 'geometric-median', which has them.")
    sound = _sound(table)
    if not sound.all():
        if rule.associative or (~sound).sum() > byzantine:
            raise ExperimentError(
                f"{(~sound).sum()} of {len(table)} rows hold NaN, infinite or overflowing values; leave them out, or "
                "take a robust rule with byzantine at least as large."
            )
        rule = aggregators.build({**plan, "byzantine": byzantine - int((~sound).sum())})
        table, shares = table[sound], shares[sound]
    names = [f"row-{index:09d}" for index in range(len(table))]
    if missing := rule.lacks(names, rule.memory()):
        raise ExperimentError(
            f"{kind!r} needs {rule.min_rows()} rows or more, and there are {len(table)}: it lacks {missing}."
        )
    state = rule.of(table, shares) if isinstance(rule, Robust) else rule.init(table.shape[1])
    for row, share in zip(table, shares) if not isinstance(rule, Robust) else ():
        state = rule.fold(state, row, float(share))
    return rule.finish(state, names, rule.memory(), seed).vector


def _sound(table: Array) -> NDArray[np.bool_]:
    """Which rows have a finite norm, in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: NDArray[np.bool_] = np.isfinite(np.einsum("ij,ij->i", table, table))
    return found


def _table(rows: Any) -> Array:
    try:
        table: Array = np.asarray(rows, np.float32)
    except (TypeError, ValueError):
        raise ExperimentError("rows must be numbers, one row of equal length per update, [n, d].") from None
    return np.ascontiguousarray(table) if table.ndim else table
