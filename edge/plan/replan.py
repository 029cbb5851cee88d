"""Choosing again while the link changes, without going to and fro.

Another option is taken when it has been better by a margin for several steps in a row; each counts for as many UNITs
as it is better, so what is far better is taken at once. Every change doubles the evidence that it takes,
every quiet stretch halves it: noise around a point where two options are equal causes a handful of changes and then
hardly any. A choice that has come to break its deadline is left at once. Must never send or look at a clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedge.core.errors import ExperimentError
from fedge.edge.plan.link import Link
from fedge.edge.plan.options import Option
from fedge.edge.plan.planner import Bounds, plan
from fedge.edge.plan.scale import AS_PROFILED, Scale

MARGIN, MARGIN_S = 0.05, 1e-3  # less than this is not worth a change
UNIT = 0.10  # evidence of one: better by so much
MOST_EVIDENCE = 16.0  # of one step: some 4.6 times better
PATIENCE, MOST_PATIENCE = 6.0, 96.0  # the evidence that a change takes
CALM = 10  # times the patience, in steps without a change: it is halved


@dataclass(frozen=True, slots=True)
class Replanner:
    """The choice that stands, among options that keep every bound but maybe the deadline.

    `evidence` is what the steps in a row have given for another; `quiet` counts the steps since the last change.
    """

    options: tuple[Option, ...]
    bounds: Bounds
    choice: Option
    evidence: float = 0.0
    quiet: int = 0
    patience: float = PATIENCE


def start(options: Sequence[Option], link: Link, bounds: Bounds) -> Replanner:
    """The first choice. Raises ExperimentError where no option keeps the bounds that do not depend on the link."""
    rows = plan(options, link, replace(bounds, deadline_s=None)).rows
    allowed = tuple(row.option for row in rows if not row.breaks)
    return Replanner(allowed, bounds, best(allowed, link, bounds))


def best(options: Sequence[Option], link: Link, bounds: Bounds, scale: Scale = AS_PROFILED) -> Option:
    """The fastest that keeps the deadline; where none does, the one that misses it least."""
    try:
        return plan(options, link, bounds, scale).choice
    except ExperimentError:
        return min(options, key=lambda option: option.longest_s(link, scale))


def step(state: Replanner, link: Link, scale: Scale = AS_PROFILED) -> Replanner:
    """The state after one more look at the link. Its `choice` is what to run next."""
    other = best(state.options, link, state.bounds, scale)
    hopeless = _near(other, link, state.bounds, scale, 1.0)  # then none keeps the deadline, and the longest time counts
    cost = Option.longest_s if hopeless else Option.latency_s
    now_s, then_s = cost(state.choice, link, scale), cost(other, link, scale)
    if not hopeless and _near(state.choice, link, state.bounds, scale, 1.0):
        return _changed(state, other)
    worth = now_s > then_s * (1 + MARGIN) and now_s - then_s > MARGIN_S
    if not worth or (not hopeless and _near(other, link, state.bounds, scale, 1 + MARGIN)):
        evidence = 0.0
    else:
        evidence = state.evidence + _evidence(now_s, then_s)
    if evidence >= state.patience:
        return _changed(state, other)
    calm = state.quiet + 1 >= CALM * state.patience
    patience = max(PATIENCE, state.patience / 2) if calm else state.patience
    return replace(state, evidence=evidence, quiet=0 if calm else state.quiet + 1, patience=patience)


def _changed(state: Replanner, other: Option) -> Replanner:
    return replace(state, choice=other, evidence=0.0, quiet=0, patience=min(2 * state.patience, MOST_PATIENCE))


def _evidence(now_s: float, then_s: float) -> float:
    """How many times UNIT the other is better."""
    return min(math.log(now_s / then_s) / math.log(1 + UNIT), MOST_EVIDENCE) if then_s else MOST_EVIDENCE


def _near(option: Option, link: Link, bounds: Bounds, scale: Scale, slack: float) -> bool:
    """Whether the option misses the deadline, or would if it took `slack` times as long."""
    return bounds.deadline_s is not None and slack * option.longest_s(link, scale) > bounds.deadline_s
