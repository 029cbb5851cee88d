"""From the events of a run to what every client did when: tasks, intervals and groups.

Pure: a list of events in, plain values out; times in seconds since the start. Must never draw, nor read a file. Events
are as in docs/architecture.md, in the order of their `t`; what a log leaves out is taken as not having happened.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

Event = Mapping[str, Any]

DOWNLOADING, COMPUTING, SENDING = "downloading", "computing", "sending"
LATE, LOST, WAITING, GONE = "late", "lost", "waiting", "gone"
KINDS = (DOWNLOADING, COMPUTING, SENDING, LATE, LOST, WAITING, GONE)
WORKING = frozenset({DOWNLOADING, COMPUTING, SENDING, LATE})

_AWAY = {"left", "evicted"}  # of a client, and so of whatever it was doing
_ENDS = {"arrived", "refused", "failed", "expired"}  # of the task they name


@dataclass(frozen=True, slots=True)
class Span:
    """What one client did from `start_s` to `end_s`. `group` is the one its task was meant for, else empty.

    `late` begins where that group was closed without the client; `lost` is a task that brought nothing; `waiting` is
    being connected without a task; `gone` lasts from leaving to coming back, or to the end.
    """

    client: str
    kind: str
    start_s: float
    end_s: float
    group: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One task from dispatch to its end. `outcome` is the event that ended it; `open` where the log ends first.

    `overdue_s` is when its group was closed without it, None for an update in time. `download_s` and `compute_s` are
    what the client claims.
    """

    client: str
    task: str
    steps: int
    start_s: float
    end_s: float
    outcome: str
    group: str = ""
    overdue_s: float | None = None
    download_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """Updates aggregated together into `version`. `expected_s` and `latest_s` are None where none were announced."""

    name: str
    version: int
    closed_s: float
    members: tuple[Job, ...]
    expected_s: float | None = None
    latest_s: float | None = None

    @property
    def start_s(self) -> float:
        """When the first member was sent its task; those late for an earlier group began in that one."""
        starts = [job.start_s for job in self.members if job.overdue_s is None]
        return min(starts or [job.start_s for job in self.members] or [self.closed_s])


def number(value: Any, default: float = 0.0) -> float:
    """`value` as a finite float, else `default`: figures claimed by a client may be anything."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return default


def jobs(events: Iterable[Event]) -> list[Job]:
    """Every task of the run, in order of its end; those still open at the end come last."""
    done: list[Job] = []
    running: dict[str, Job] = {}
    closed: dict[str, float] = {}
    promised: dict[str, str] = {}
    now = 0.0
    for event in events:
        now, kind, client = event["t"], event["event"], event.get("client", "")
        if kind == "aggregated":
            for pool in event.get("pools", ()):
                closed.setdefault(str(pool), now)
        elif kind == "group":
            promised[client] = str(event.get("group", ""))
        elif kind == "dispatched":
            if client in running:
                done.append(replace(running.pop(client), end_s=now, outcome="replaced"))
            steps = int(number(event.get("steps")))
            running[client] = Job(client, str(event.get("task", "")), steps, now, now, "open")
        elif client in running and (kind in _AWAY or (kind in _ENDS and event.get("task") == running[client].task)):
            done.append(_ended(running.pop(client), event, promised.pop(client, ""), closed))
    return done + [replace(job, end_s=now, group=promised.get(job.client, "")) for job in running.values()]


def _ended(job: Job, event: Event, promised: str, closed: Mapping[str, float]) -> Job:
    group = promised or str(event.get("pool", ""))
    overdue = None
    if event.get("late"):
        # Where the log does not tell when the group was closed, the whole task counts as late.
        overdue = min(max(closed.get(group, job.start_s), job.start_s), event["t"])
    timings = event.get("timings")
    timings = timings if isinstance(timings, dict) else {}
    return replace(
        job,
        end_s=event["t"],
        outcome=event["event"],
        group=group,
        overdue_s=overdue,
        download_s=max(0.0, number(timings.get("download_s"))),
        compute_s=max(0.0, number(timings.get("compute_s"))),
    )


def _phases(job: Job) -> list[Span]:
    """A task as spans without gaps. What the claimed times leave over was spent sending; if they claim too much, they
    are scaled down to the time that passed on the coordinator's clock.
    """
    if job.outcome != "arrived":
        kind = COMPUTING if job.outcome == "open" else LOST
        return [Span(job.client, kind, job.start_s, job.end_s, job.group)]
    passed, claimed = job.end_s - job.start_s, job.download_s + job.compute_s
    if job.compute_s <= 0:
        cuts = [job.start_s, job.start_s, job.end_s, job.end_s]
    else:
        scale = min(1.0, passed / claimed)
        first = min(job.start_s + job.download_s * scale, job.end_s)
        cuts = [job.start_s, first, min(first + job.compute_s * scale, job.end_s), job.end_s]
    late_s = job.end_s if job.overdue_s is None else job.overdue_s
    spans = [
        Span(job.client, kind, start, min(end, late_s), job.group)
        for kind, start, end in zip((DOWNLOADING, COMPUTING, SENDING), cuts, cuts[1:])
    ]
    return [*spans, Span(job.client, LATE, late_s, job.end_s, job.group)]


def _absences(events: Iterable[Event]) -> tuple[dict[str, float], list[Span], float]:
    """(when each client was first seen, its times away, when the log ends)."""
    seen: dict[str, float] = {}
    away: dict[str, float] = {}
    spans: list[Span] = []
    now = 0.0
    for event in events:
        now, kind, client = event["t"], event["event"], event.get("client", "")
        if kind in ("joined", "dispatched"):
            seen.setdefault(client, now)
            if client in away:
                spans.append(Span(client, GONE, away.pop(client), now))
        elif kind in _AWAY and client in seen:
            away.setdefault(client, now)
    spans += [Span(client, GONE, start, now) for client, start in away.items()]
    return seen, spans, now


def intervals(events: Sequence[Event]) -> list[Span]:
    """What every client did, from the moment it joined to the end of the log: no gap, no overlap, nothing empty.

    Sorted by client in order of joining, then by time.
    """
    seen, gone, end = _absences(events)
    known: dict[str, list[Span]] = {client: [] for client in seen}
    for span in gone:
        known[span.client].append(span)
    for job in jobs(events):
        known[job.client] += _phases(job)
    spans: list[Span] = []
    for client, start in seen.items():
        now = start
        for span in sorted(known[client], key=lambda span: (span.start_s, span.end_s)):
            if span.end_s <= span.start_s:
                continue
            if span.start_s > now:
                spans.append(Span(client, WAITING, now, span.start_s))
            spans.append(span)
            now = span.end_s
        if end > now:
            spans.append(Span(client, WAITING, now, end))
    return spans


def groups(events: Sequence[Event]) -> list[Group]:
    """One per aggregation, in order. Named after the pool that was announced as a group, else after its last pool."""
    by_task = {(job.client, job.task): job for job in jobs(events)}
    announced: dict[str, Event] = {}
    found: list[Group] = []
    for event in events:
        if event["event"] == "group":
            announced[str(event.get("group", ""))] = event
        elif event["event"] == "aggregated":
            found.append(_group(event, by_task, announced))
    return found


def _group(event: Event, by_task: Mapping[tuple[str, str], Job], announced: Mapping[str, Event]) -> Group:
    version = int(number(event.get("version")))
    pools = [str(pool) for pool in event.get("pools", ())] or [f"v{version}"]
    name = next((pool for pool in pools if pool in announced), pools[-1])
    keys = [(str(member.get("client", "")), str(member.get("task", ""))) for member in event.get("members", ())]
    members = tuple(by_task[key] for key in keys if key in by_task)
    note = announced.get(name, {})
    times = [number(note.get(key), math.nan) for key in ("expected_t", "latest_t")]
    expected, latest = (None if math.isnan(time) else time for time in times)
    return Group(name, version, event["t"], members, expected, latest)


def busy(spans: Iterable[Span]) -> float | None:
    """The share of their connected time that clients spent on work that counted, in [0, 1]; None without any time."""
    working = connected = 0.0
    for span in spans:
        length = span.end_s - span.start_s
        working += length * (span.kind in WORKING)
        connected += length * (span.kind != GONE)
    return working / connected if connected else None


@dataclass(frozen=True)
class History:
    """All that figures ask of a log, found once. `end_s` is when the log ends."""

    events: Sequence[Event]
    jobs: list[Job]
    spans: list[Span]
    groups: list[Group]
    end_s: float

    @staticmethod
    def of(events: Sequence[Event]) -> "History":
        """The history in `events`."""
        return History(events, jobs(events), intervals(events), groups(events), events[-1]["t"] if events else 0.0)

    def by_speed(self) -> list[str]:
        """All clients, the fastest first: by median seconds per local step; those without an update come last."""
        paces: dict[str, list[float]] = {span.client: [] for span in self.spans}
        for job in self.jobs:
            if job.outcome == "arrived":
                paces.setdefault(job.client, []).append((job.end_s - job.start_s) / max(1, job.steps))
        return sorted(paces, key=lambda name: (median(paces[name]) if paces[name] else math.inf, name))
