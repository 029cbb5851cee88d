"""A language model over ranks of fedge and in other runtimes: time to the first token, per token, memory, under caps.

One model of TinyLlama's sizes with random weights, the same prompt of 64 tokens, 32 greedy tokens. Every run is made of
fresh processes: fedge's are one per rank, of one thread each, over loopback. Uncapped cases are run in rounds, one case
after the other, and rows are medians; memory is that of the largest process: private, mapped files, and the peak of its
control group, which counts cached files too. Under caps each process has a control group with a limit: two ranks have
twice what a runtime on one device has. A window without a cap computes on pages of the system's cache where the file
has room there; one case reads past the cache, as a device without that room does. Real small models are compared with
transformers, token by token. `--only` takes some of free, float32, int8, int4, rivals, caps, link, real and profile,
with commas between; free is the four after it.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import llm_cases, llm_link, llm_real
from benchmarks.harness import Goal, arguments, emit, goal, installed
from benchmarks.llm_cases import ACCELERATE, FEDGE, LLAMA_CPP, PROFILE, TOKENS, TRANSFORMERS, Case, Found
from benchmarks.llm_models import CACHE, LARGE, MIDDLE, TINY, Shape
from benchmarks.llm_processes import limits_work
from fedge.core.errors import FedgeError

Row = dict[str, Any]
FREE_PARTS = ("float32", "int8", "int4", "rivals")
WHOLE = ("free", "caps", llm_link.PART, llm_real.PART, PROFILE)
FAILURES = (FedgeError, RuntimeError, OSError, ValueError, subprocess.SubprocessError)
WINDOW_MIB = 512
ROUNDS, QUICK_ROUNDS = 3, 1
PACKAGES = ("llama-cpp-python", "gguf", "transformers", "accelerate", "safetensors")

FREE = (
    *(Case(kind, FEDGE, kind, ranks) for kind in ("float32", "int8", "int4") for ranks in (2, 1)),
    Case("float32", FEDGE, "float32", 2, window_mib=WINDOW_MIB),
    Case("float32", FEDGE, "float32", 2, window_mib=WINDOW_MIB, past_cache=True, tokens=12),
    Case("float32", FEDGE, "float32", 1, window_mib=WINDOW_MIB, tokens=12),
    Case("rivals", TRANSFORMERS, "float32", threads=(1, 2)),
    Case("rivals", TRANSFORMERS, "bfloat16", threads=(1, 2)),
    Case("rivals", ACCELERATE, "float32", threads=(2, 1), tokens=8),
    Case("rivals", LLAMA_CPP, "q8_0", threads=(2, 1)),
    Case("rivals", LLAMA_CPP, "q4_0", threads=(2, 1)),
)
CAPPED = (
    Case("caps", FEDGE, "int4", 2, limit_mb=600),
    Case("caps", FEDGE, "int8", 2, window_mib=320, limit_mb=600, tokens=16),
    Case("caps", LLAMA_CPP, "q8_0", limit_mb=600, threads=(2, 1), tokens=8),
    Case("caps", LLAMA_CPP, "q4_0", limit_mb=600, threads=(2, 1), tokens=8),
    Case("caps", FEDGE, "float32", 2, window_mib=880, limit_mb=1200, tokens=8),
    Case("caps", TRANSFORMERS, "float32", limit_mb=1200, threads=(1,), tokens=5),
    Case("caps", ACCELERATE, "float32", limit_mb=1200, threads=(1,), tokens=5),
)
PROFILED = tuple(Case(PROFILE, FEDGE, kind, 2) for kind in ("int8", "int4"))
QUICK = tuple(
    case
    for case in FREE
    if (case.ranks == 2 and not case.past_cache)
    or case.runtime == LLAMA_CPP
    or (case.runtime == TRANSFORMERS and case.weights == "float32")
)
# Each goal: what it is about, the row above and the row below (part, runtime, weights, ranks, whether with a window).
# None is about the window that reads past the cache: how fast that is, the disk decides.
_Key = tuple[str, str, str, int, bool]
_FEDGE_Q8, _CAPPED_Q8 = ("int8", FEDGE, "int8", 2, False), ("caps", LLAMA_CPP, "q8_0", 1, False)
GOALS: tuple[tuple[str, _Key, _Key, str], ...] = (
    (
        "float32, two ranks, over transformers float32",
        ("float32", FEDGE, "float32", 2, False),
        ("rivals", TRANSFORMERS, "float32", 1, False),
        "<= 0.58",
    ),
    (
        "float32, two ranks, a window of 0.5 GiB and room in the system's cache, over transformers float32 in memory",
        ("float32", FEDGE, "float32", 2, True),
        ("rivals", TRANSFORMERS, "float32", 1, False),
        "<= 1.3",
    ),
    ("int8, two ranks, over llama.cpp q8_0", _FEDGE_Q8, ("rivals", LLAMA_CPP, "q8_0", 1, False), "<= 1.1"),
    (
        "int4, two ranks, over llama.cpp q4_0",
        ("int4", FEDGE, "int4", 2, False),
        ("rivals", LLAMA_CPP, "q4_0", 1, False),
        "<= 1.4",
    ),
    (
        "int4 on two devices of 600 MB: times faster than llama.cpp q8_0 on one",
        _CAPPED_Q8,
        ("caps", FEDGE, "int4", 2, False),
        ">= 10",
    ),
    (
        "int8 with a window on two devices of 600 MB: times faster than llama.cpp q8_0 on one",
        _CAPPED_Q8,
        ("caps", FEDGE, "int8", 2, True),
        ">= 1",
    ),
)


def compared(cases: Sequence[Case], shape: Shape, cache: Path, rounds: int) -> list[Row]:
    """A row per case. Slow ones, which have fewer tokens, are run once; so is what fails, and the row says why."""
    runs: dict[Case, list[Found]] = {case: [] for case in cases}
    notes: dict[Case, str | None] = {case: llm_cases.missing(case) for case in cases}
    for number in range(rounds):
        for case in cases if number % 2 == 0 else cases[::-1]:
            if notes[case] is None and (number == 0 or case.tokens == TOKENS):
                notes[case] = attempt(case, shape, cache, runs[case])
    return with_agreement([llm_cases.row(case, runs[case], notes[case]) for case in cases], runs)


def attempt(case: Case, shape: Shape, cache: Path, runs: list[Found]) -> str | None:
    """Run a case once more; what went wrong, if anything did."""
    window = f"window {case.window_mib}{' past the cache' if case.past_cache else ''}"
    name = f"{case.runtime} {case.weights}, {case.ranks} ranks, {window}, limit {case.limit_mb}"
    try:
        runs.append(llm_cases.run(case, shape, cache))
    except FAILURES as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return str(error)
    print(f"{name}: {1e3 * runs[-1].token_s:.2f} ms per token", file=sys.stderr, flush=True)
    return None


def with_agreement(rows: list[Row], runs: dict[Case, list[Found]]) -> list[Row]:
    """How many tokens each case has in common with transformers in float32, from the first on, where that was run."""
    reference = next((found[0].ids for case, found in runs.items() if found and _is_reference(case)), None)
    for row, found in zip(rows, runs.values()):
        if reference and found:
            pairs = list(zip(reference, found[0].ids))
            same = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
            row["same_tokens"] = f"{same} of {len(pairs)}"
    return rows


def judged(rows: Sequence[Row]) -> list[Goal]:
    """All goals, those of parts that were not run included."""
    times: dict[_Key, float] = {}
    for row in rows:
        elsewhere = row["part"] in (llm_link.PART, llm_real.PART, PROFILE) or row.get("past_cache")
        if not elsewhere and "ms_per_token" in row:
            key = row["part"], row["runtime"], row["weights"], row["ranks"], row["window_mib"] is not None
            times[key] = row["ms_per_token"]
    found = []
    for name, above, below, wanted in GOALS:
        value = times[above] / times[below] if above in times and below in times else None
        found.append(goal(name, value, wanted))
    return found + llm_link.goals(rows) + llm_real.goals(rows)


def parts(quick: bool, cache: Path) -> dict[str, Callable[[], list[Row]]]:
    """What can be run, by name; the uncapped cases are one piece, and so stand for four names."""
    shape = TINY if quick else LARGE
    rounds = QUICK_ROUNDS if quick else ROUNDS

    def capped() -> list[Row]:
        if quick:
            return []
        if not limits_work():
            return [llm_cases.row(case, [], "missing: control groups that limit memory") for case in CAPPED]
        return compared(CAPPED, shape, cache, 1)

    def link() -> list[Row]:
        return llm_link.measure(shape if quick else MIDDLE, cache, quick=quick)

    def free(names: Sequence[str]) -> list[Row]:
        return compared([case for case in (QUICK if quick else FREE) if case.part in names], shape, cache, rounds)

    def profiled() -> list[Row]:
        return compared(PROFILED, shape, cache, 1)

    def real() -> list[Row]:
        return [] if quick else llm_real.measure(cache)

    found = {"free": lambda: free(FREE_PARTS), "caps": capped, "link": link, llm_real.PART: real, PROFILE: profiled}
    return found | {name: partial(free, [name]) for name in FREE_PARTS}


def every(names: Sequence[str], able: Mapping[str, Callable[[], list[Row]]]) -> list[Row]:
    """All rows of the parts. One that fails is a row with a note: the others may have taken an hour."""
    rows: list[Row] = []
    for name in names:
        try:
            rows += able[name]()
        except FAILURES as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            rows.append({"part": name, "note": f"failed: {error!s:.200}"})
    return rows


def main() -> None:
    """The command."""
    options = arguments(
        str(__doc__).partition("\n")[0],
        figure="a PNG to write",
        only=f"parts, with commas between: {', '.join((*WHOLE, *FREE_PARTS))}",
        cache="a folder",
    )
    wanted = options.only.split(",") if options.only else WHOLE
    able = parts(options.quick, Path(options.cache) if options.cache else CACHE)
    if unknown := set(wanted) - set(able):
        raise SystemExit(f"There is no {sorted(unknown)[0]!r}; name some of {', '.join(able)}.")
    if options.figure and not Path(options.figure).parent.is_dir():
        raise SystemExit(f"There is no folder for the figure {options.figure!r}; make it, or name another.")
    rows = every(wanted, able)
    more = {"packages": {name: installed(name) for name in PACKAGES}}
    emit("llm", rows, judged(rows), as_json=options.json, notes=more)
    if options.figure and llm_link.measured(rows):  # last: whatever goes wrong there, the rows are told
        llm_link.draw(rows, Path(options.figure))


def _is_reference(case: Case) -> bool:
    return (case.runtime, case.weights, case.limit_mb) == (TRANSFORMERS, "float32", 0)


if __name__ == "__main__":
    main()
