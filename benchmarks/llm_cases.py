"""What the language benchmark compares: each case is a runtime with settings, run in processes of its own.

Before every run the files it reads leave the system's cache, so that whoever reads them is charged for it. Owns how a
case is run and how its runs become a row. Must never judge.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as remember
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from msgspec.structs import replace

from benchmarks import llm_models
from benchmarks.llm_models import Shape
from benchmarks.llm_processes import Process, watch
from benchmarks.llm_ranks import END_S, Crew, Opening, choose

Row = dict[str, Any]
FEDGE, TRANSFORMERS, ACCELERATE, LLAMA_CPP = "fedge", "transformers", "accelerate", "llama.cpp"
MODULES = {
    TRANSFORMERS: ("torch", "transformers"),
    ACCELERATE: ("torch", "transformers", "accelerate"),
    LLAMA_CPP: ("llama_cpp", "gguf"),
}
PROFILE = "profile"  # a part that tells where the time goes, at the cost of some
PROMPT_TOKENS, TOKENS = 64, 32
MB, MIB = 10**6, 1 << 20
TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class Case:
    """`window_mib` is what fedge may use for weights, 0 for all; with `past_cache` its window reads from the disk for
    every token, else as fedge chooses. `limit_mb` is of each process's control group.
    """

    part: str
    runtime: str
    weights: str
    ranks: int = 1
    window_mib: int = 0
    past_cache: bool = False
    limit_mb: int = 0
    threads: tuple[int, ...] = (1,)
    tokens: int = TOKENS


@dataclass(frozen=True, slots=True)
class Found:
    """One run. Memory is the largest of any process."""

    ttft_s: float
    token_s: float
    threads: int
    ids: tuple[int, ...]
    private_bytes: int
    mapped_bytes: int
    group_bytes: int | None
    kernel: str | None = None
    where: dict[str, tuple[float, float]] | None = None  # see `llm_profile.Clock.stop`


def run(case: Case, shape: Shape, cache: Path) -> Found:
    """Raises RuntimeError with what went wrong, in some words."""
    return _fedge(case, shape, cache) if case.runtime == FEDGE else _rival(case, shape, cache)


def missing(case: Case) -> str | None:
    """What would have to be installed."""
    names = [name for name in MODULES.get(case.runtime, ()) if find_spec(name) is None]
    return f"missing: {', '.join(names)}" if names else None


def prompt(shape: Shape) -> list[int]:
    """Tokens that are none of the special ones."""
    return [int(one) for one in np.random.default_rng(7).integers(3, shape.vocab, PROMPT_TOKENS)]


def row(case: Case, runs: Sequence[Found], note: str | None = None) -> Row:
    """Medians of times, largest memory."""
    facts: Row = {
        "part": case.part,
        "runtime": case.runtime,
        "weights": case.weights,
        "ranks": case.ranks,
        "window_mib": case.window_mib or None,
        "past_cache": case.past_cache or None,
        "limit_mb": case.limit_mb or None,
    }
    if not runs:
        return facts | {"note": note}
    groups = [one.group_bytes for one in runs if one.group_bytes is not None]
    token_s = median(one.token_s for one in runs)
    return (
        facts
        | {
            "threads": runs[0].threads,
            "kernel": runs[0].kernel,
            "ttft_ms": round(1e3 * median(one.ttft_s for one in runs), 1),
            "ms_per_token": round(1e3 * token_s, 2),
            "tokens_per_s": round(1 / token_s, 2),
            "private_mib": round(max(one.private_bytes for one in runs) / MIB),
            "mapped_mib": round(max(one.mapped_bytes for one in runs) / MIB),
            "group_mib": round(max(groups) / MIB) if groups else None,
            "runs": len(runs),
            "note": note,
        }
        | _where(runs[0].where or {})
    )


def _where(spent: dict[str, tuple[float, float]]) -> Row:
    """Milliseconds per token on rank 0 that passed; and those in which it computed."""
    pairs = sorted(spent.items(), key=lambda one: -one[1][0])
    return {"where_ms": {name: [round(1e3 * each, 2) for each in both] for name, both in pairs}} if pairs else {}


def paths(case: Case, shape: Shape, cache: Path) -> list[Path]:
    """The files a case reads, made where need be."""
    make: Callable[..., list[Path]] = _made
    if case.runtime == FEDGE:
        return make(shape, cache, "shards", case.weights, str(case.ranks), *(["by-bytes"] if case.limit_mb else []))
    if case.runtime == LLAMA_CPP:
        return make(shape, cache, "gguf", case.weights.upper())
    return make(shape, cache, "folder", {"bfloat16": "BF16", "float32": "F32"}[case.weights])


@remember
def _made(shape: Shape, cache: Path, *what: str) -> list[Path]:
    return llm_models.made(shape, *what, cache=cache)


@remember
def _kernel(kind: Any, streamed: bool, shape: tuple[int, int]) -> str:
    return choose(kind, streamed=streamed, shape=shape, seconds=2.0 if shape[0] * shape[1] > 1 << 20 else 0.2)


def _fedge(case: Case, shape: Shape, cache: Path) -> Found:
    files = paths(case, shape, cache)
    kernel = _kernel(case.weights, case.window_mib > 0, (2 * shape.ffn // case.ranks, shape.hidden))
    profile = case.part == PROFILE
    plain = Opening("", 0, 0, kernel, case.window_mib * MIB, direct=case.past_cache or None, profile=profile)
    openings = [replace(plain, shard=str(path), rank=rank) for rank, path in enumerate(files)]
    llm_models.forget(files)
    with Crew(openings, limit_bytes=case.limit_mb * MB or None) as crew:
        crew.order(prompt(shape), case.tokens)
        taken = crew.end(TIMEOUT_S)
        memory = _memory(crew.processes)
    return Found(taken.ttft_s, median(taken.token_s), case.ranks, taken.ids, *memory, kernel, taken.parts)


def _rival(case: Case, shape: Shape, cache: Path) -> Found:
    (path,) = paths(case, shape, cache)
    name = LLAMA_CPP if case.runtime == LLAMA_CPP else case.weights
    name += "+disk" if case.runtime == ACCELERATE else ""
    threads = ",".join(map(str, case.threads))
    given = [name, str(path), threads, json.dumps(prompt(shape)), str(case.tokens)]
    llm_models.forget([path])
    process = Process("benchmarks.llm_rivals", given, limit_bytes=case.limit_mb * MB or None)
    try:
        if not watch([process], TIMEOUT_S):
            raise RuntimeError(f"took more than {TIMEOUT_S:.0f} s")
        if process.popen.wait(END_S):
            raise RuntimeError(process.fate)
        assert process.popen.stdout
        said = json.loads(process.popen.stdout.read().splitlines()[-1])
        memory = _memory([process])
    finally:
        process.close()
    return Found(said["ttft_s"], median(said["token_s"]), said["threads"], tuple(said["ids"]), *memory)


def _memory(processes: Sequence[Process]) -> tuple[int, int, int | None]:
    groups = [one.group_bytes for one in processes if one.group_bytes is not None]
    private, mapped = (max(sizes) for sizes in zip(*((one.private_bytes, one.mapped_bytes) for one in processes)))
    return private, mapped, max(groups, default=None)
