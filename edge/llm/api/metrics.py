"""Figures of the server in Prometheus' text format (version 0.0.4).

Owns the names of the figures, and the histograms of times that only the server sees. Used on one thread. Must never
name a prompt, a user or a path that a user made up.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedge.edge.llm.engine.requests import Usage

TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TPOT_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")

# Figures of the engine's `stats`: name, kind, what it is. Others are shown under their own name, as gauges.
_KNOWN = {
    "running": ("requests_running", "gauge", "Requests that have a slot."),
    "waiting": ("requests_waiting", "gauge", "Requests in the queue."),
    "finished": ("requests_finished_total", "counter", "Requests that ended, by reason."),
    "steps": ("steps_total", "counter", "Passes through the model."),
    "step_tokens": ("step_tokens_total", "counter", "Tokens computed, of prompts, answers and guesses."),
    "prompt_tokens": ("prompt_tokens_total", "counter", "Tokens of prompts."),
    "generated_tokens": ("generated_tokens_total", "counter", "Tokens of answers."),
    "tokens_per_s": ("tokens_per_second", "gauge", "Tokens of answers per second of work, since the start."),
    "reused_tokens": ("reused_tokens_total", "counter", "Tokens of prompts that were in a slot already."),
    "copied_tokens": ("copied_tokens_total", "counter", "Tokens copied from one slot to another."),
    "drafted_tokens": ("drafted_tokens_total", "counter", "Tokens guessed."),
    "accepted_tokens": ("accepted_tokens_total", "counter", "Tokens guessed right."),
    "kv_tokens": ("kv_tokens", "gauge", "Tokens that all slots hold."),
    "recoveries": ("recoveries_total", "counter", "Times that lost ranks were replaced."),
    "busy_s": ("busy_seconds_total", "counter", "Time in passes."),
    "sent_bytes": ("sent_bytes", "gauge", "Bytes that rank 0 has sent to the others since the group was formed."),
    "memory_private_bytes": ("memory_private_bytes", "gauge", "Memory of a rank that is no file's."),
    "memory_file_bytes": ("memory_file_bytes", "gauge", "Memory of a rank that the system can take back: files."),
}


@dataclass(slots=True)
class Histogram:
    """Counts of values, by upper bounds."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, what: str) -> list[str]:
        """In Prometheus' format: buckets hold what lies in smaller ones too."""
        out, below = _titles(name, "histogram", what), 0
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            out.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*out, f"{name}_sum {self.total!r}", f"{name}_count {below}"]


@dataclass(slots=True)
class Metrics:
    """What the server has seen since its start."""

    ttft_s: Histogram = field(default_factory=lambda: Histogram(TTFT_S))
    tpot_s: Histogram = field(default_factory=lambda: Histogram(TPOT_S))
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)

    def seen(self, path: str, status: int) -> None:
        """One HTTP answer. Unknown paths are one, so that nobody can fill the memory with them."""
        self.answers[path if path in PATHS else "other", status] += 1

    def ended(self, usage: Usage) -> None:
        """One request to the engine is over."""
        if usage.completion_tokens:
            self.ttft_s.add(usage.ttft_s)
        if usage.completion_tokens > 1:
            self.tpot_s.add(usage.tpot_s)

    def text(self, stats: Mapping[str, float]) -> str:
        """All figures. A name in `stats` may have labels: `memory_private_bytes{rank="1"}`."""
        name = "fedge_llm_http_responses_total"
        lines = _titles(name, "counter", "HTTP answers by path and status.")
        for (path, status), count in sorted(self.answers.items()):
            lines.append(f'{name}{{path="{path}",status="{status}"}} {count}')
        lines += self.ttft_s.lines("fedge_llm_ttft_seconds", "Time from a request to its first token.")
        lines += self.tpot_s.lines("fedge_llm_tpot_seconds", "Time per token after the first, of one request.")
        groups: dict[str, list[tuple[str, float]]] = {}
        for key, value in stats.items():
            if not key.startswith("mean_"):  # the histograms tell more
                plain, labels = _split(key)
                groups.setdefault(plain, []).append((labels, value))
        for plain, rows in groups.items():
            short, kind, what = _KNOWN.get(plain, (plain, "gauge", "A figure of the engine."))
            lines += _titles(f"fedge_llm_{short}", kind, what)
            lines += [f"fedge_llm_{short}{labels} {value!r}" for labels, value in rows]
        return "\n".join(lines) + "\n"


def _split(key: str) -> tuple[str, str]:
    """Name and labels of a figure of the engine."""
    if key.startswith("finished_"):
        return "finished", f'{{reason="{key.removeprefix("finished_")}"}}'
    plain, brace, labels = key.partition("{")
    return plain, brace + labels


def _titles(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
