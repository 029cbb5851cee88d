"""The figures of a run as they add up: what the progress shows and what summary.json holds in the end.

Fed with the records and the lines of metrics.jsonl in the order they happen. Must never write a file.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedge.server.machine.events import Record
from fedge.strategies import aggregators

OFTEN, ENOUGH = 0.9, 5  # rejected in this share of at least so many groups: always, for what one can tell
NAMED = 10  # clients in one line


@dataclass
class Heard:
    """How often a client's row was judged, and rejected; the sum of its scores."""

    judged: int = 0
    rejected: int = 0
    score_sum: float = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """One verdict, as in a member of "aggregated"."""
        self.judged += 1
        self.rejected += bool(row["rejected"])
        self.score_sum += row.get("score") or 0.0

    @property
    def always_rejected(self) -> bool:
        """Whether it was rejected nearly always, often enough to be no chance."""
        return self.judged >= ENOUGH and self.rejected >= OFTEN * self.judged


@dataclass
class Tally:
    """Sums and extremes of one run. Times in seconds since the start, accuracies in [0, 1], sizes in bytes.

    `rule` is the aggregator's table; `held` are the groups held in a row, `lacking` what the last of them lacked.
    """

    target: float | None = None
    rule: Mapping[str, Any] = field(default_factory=dict)
    t: float = 0.0
    version: int = 0
    updates: int = 0
    arrived: int = 0
    late: int = 0
    bytes_up: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    finished: str = ""
    last_failure: str = ""
    held: int = 0
    lacking: str = ""
    needs: int = 0
    left: int = 0
    time_to_target_s: float | None = None
    counts: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    updates_by_client: Counter[str] = field(default_factory=Counter)
    heard: dict[str, Heard] = field(default_factory=dict)
    hostile: list[str] = field(default_factory=list)  # known in a simulation alone
    lines: list[Mapping[str, Any]] = field(default_factory=list)

    def record(self, record: Record) -> None:
        """One line of events.jsonl."""
        self.t = record.t
        self.counts[record.kind] += 1
        values = record.values
        if record.kind == "arrived":
            self._arrived(values)
        elif record.kind == "aggregated":
            self._aggregated(values)
        elif record.kind == "refused" and not self.finished:  # what comes after the end is no fault
            self.refused[values["reason"]] += 1
            self.last_failure = values.get("detail") or values["reason"]
        elif record.kind == "failed":
            self.last_failure = values["reason"]
        elif record.kind == "hostile":
            self.hostile = [] if values["attack"] == "none" else list(values["clients"])
        elif record.kind == "held":
            self.held, self.lacking = self.held + 1, values["missing"]
        elif record.kind == "finished":
            self.finished, self.needs, self.left = values["reason"], values.get("needs", 0), values.get("left", 0)

    def _arrived(self, values: Mapping[str, Any]) -> None:
        self.arrived += 1
        self.late += bool(values.get("late"))
        self.bytes_up += values.get("bytes", 0)
        self.staleness_sum += values["staleness"]
        self.staleness_max = max(self.staleness_max, values["staleness"])
        self.updates_by_client[values["client"]] += 1

    def _aggregated(self, values: Mapping[str, Any]) -> None:
        self.version, self.held = values["version"], 0
        self.updates += len(values["members"])
        for row in (*values["members"], *values.get("absent", ())):
            if "rejected" in row:
                self.heard.setdefault(row["client"], Heard()).add(row)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self.lines.append(line)
        accuracy = line.get("accuracy")
        if self.target is not None and self.time_to_target_s is None and accuracy is not None:
            self.time_to_target_s = line["t"] if accuracy >= self.target else None

    def column(self, key: str) -> list[float]:
        """One metric over the run, without the lines that lack it."""
        return [line[key] for line in self.lines if line.get(key) is not None]

    @property
    def staleness_mean(self) -> float:
        """Versions between base and arrival, over all accepted updates; 0 where there are none."""
        return self.staleness_sum / self.arrived if self.arrived else 0.0

    @property
    def failures(self) -> str:
        """What came to nothing, and what was said last; empty where nothing did."""
        counted = {
            "tasks failed": self.counts["failed"],
            "updates refused": self.refused.total(),
            "clients shut out": self.counts["evicted"],
        }
        words = ", ".join(f"{what}: {count}" for what, count in counted.items() if count)
        return f"{words} (last: {self.last_failure})" if words else ""

    @property
    def waiting(self) -> str:
        """What groups that are held wait for; empty where none are."""
        return f"{self.held} groups in a row, the last lacks {self.lacking}" if self.held else ""

    @property
    def starved(self) -> str:
        """Why the rule had too few clients, and what would do; empty where that did not end the run."""
        if self.finished != "starved" or not self.needs:
            return ""
        words = f"{aggregators.named(self.rule)} with byzantine = {self.rule.get('byzantine', 0)} "
        if self.left >= self.needs:
            return f"{words}held {self.waiting}; {self.left} clients are left: have those that are missing take part"
        fits = aggregators.most_byzantine(self.rule, self.left, lambda rule: rule.min_rows() <= self.left)
        remedy = "take another rule" if fits is None else f"set byzantine to at most {fits}"
        words += f"needs {self.needs} clients in a group, and {self.left} are left"
        return f"{words}; {remedy}, or have more clients take part"

    @property
    def unheard(self) -> str:
        """Who was always rejected, which may be an honest client unlike the others (a simulation knows which is); empty
        where nobody was.
        """
        found = sorted(
            ((name, heard) for name, heard in self.heard.items() if heard.always_rejected),
            key=lambda item: (-item[1].rejected, item[0]),
        )
        honest = [name for name, _ in found if self.hostile and name not in self.hostile]
        words = [f"{name} ({heard.rejected} of {heard.judged}{', honest' * (name in honest)})" for name, heard in found]
        more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
        who = ", all hostile" if self.hostile and not honest else ""
        return f"always rejected{who}: {', '.join(words[:NAMED])}{more}" if words else ""

    def _verdicts(self) -> dict[str, Any]:
        """Who was listened to, where rows were judged."""
        if not self.heard:
            return {}
        known = sorted(self.heard.items())
        return {
            "verdicts": {
                name: {"judged": one.judged, "rejected": one.rejected, "score": one.score_sum / one.judged}
                for name, one in known
            },
            "always_rejected": [name for name, one in known if one.always_rejected],
            "unheard": self.unheard,
        }

    def summary(self) -> dict[str, Any]:
        """What of summary.json follows from the records alone."""
        accuracies, losses = self.column("accuracy"), self.column("loss")
        return {
            "accuracy": {"final": accuracies[-1], "best": max(accuracies)} if accuracies else {},
            "loss": losses[-1] if losses else None,
            "target": self.target,
            "time_to_target_s": self.time_to_target_s,
            "versions": self.version,
            "updates": self.updates,
            "accepted": self.arrived,
            "late": self.late,
            "refused": dict(self.refused),
            "failed": self.counts["failed"],
            "expired": self.counts["expired"],
            "left": self.counts["left"],
            "evicted": self.counts["evicted"],
            "failures": self.failures,
            "updates_by_client": dict(self.updates_by_client),
            "bytes_up": self.bytes_up,
            "bytes_down": int(max(self.column("bytes_down"), default=0)),
            "staleness": {"mean": self.staleness_mean, "max": self.staleness_max},
            "superseded": self.counts["superseded"],
            "held": self.counts["held"],
            "starved": self.starved,
            **({"hostile": self.hostile} if self.hostile else {}),
            **self._verdicts(),
            "seconds": self.t,
        }
