"""One process of the memory benchmark: it loads a model, runs it, and says what that took.

Owns what is the same for both runtimes: what is imported before anything is measured, the input, and the runs. Must
never import onnx, which no device has.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime

from benchmarks.harness import in_turns
from fedge.edge import bundle as bundles
from fedge.edge.bundle import INPUT, OUTPUT
from fedge.edge.runtime.memory import resident
from fedge.edge.runtime.sessions import open_piece

RUNS = 8
FEDGE, PLAIN = "fedge", "onnxruntime"
MODEL, BUNDLE, CACHE = "model.onnx", "bundle", "cache"  # in the folder of a model


def loaded(runtime: str, folder: Path, threads: int) -> tuple[Any, dict[str, float]]:
    """A function from inputs to outputs, and what it took to have it."""
    begun = time.perf_counter()
    if runtime == PLAIN:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        return partial(session.run, None), {"load_s": time.perf_counter() - begun}
    bundle = bundles.load(folder / BUNDLE)
    verified = time.perf_counter()
    runner = open_piece(folder / BUNDLE, bundle, INPUT, OUTPUT, threads=threads, cache=folder / CACHE)
    if not runner.optimised:
        raise SystemExit("The cache does not work, so there is nothing to measure.")
    return runner.run, {"load_s": time.perf_counter() - verified, "verify_s": verified - begun}


def resources(runtime: str, folder: Path, threads: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Seconds to load and for the first run, and the memory that load and runs have added."""
    before = resident()
    run, took = loaded(runtime, folder, threads)
    begun = time.perf_counter()
    run(inputs)
    took["first_run_s"] = time.perf_counter() - begun
    for _ in range(RUNS - 1):
        run(inputs)
    after = resident()
    if before is None or after is None:
        raise SystemExit("This system does not say what memory a process has; run the benchmark on Linux.")
    held = after.since(before)
    return {**took, "private": held.private, "mapped": held.mapped}


def speeds(folder: Path, threads: int, inputs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds of every run of both runtimes, in turns, and how far their results are apart, relative to the largest."""
    runs = {runtime: loaded(runtime, folder, threads)[0] for runtime in (FEDGE, PLAIN)}
    ours, theirs = next(iter(runs[FEDGE](inputs).values())), runs[PLAIN](inputs)[0]
    works = {runtime: partial(run, inputs) for runtime, run in runs.items()}
    return {"seconds": in_turns(works, repeats), "apart": float(np.abs(ours - theirs).max() / np.abs(theirs).max())}


def main(what: str, folder: str, threads: str, repeats: str) -> None:
    """`what` is a runtime, or "speed"; one JSON object goes to the standard output."""
    description = (Path(folder) / BUNDLE / bundles.DESCRIPTION).read_bytes()
    (tensor,) = msgspec.json.decode(description, type=bundles.Bundle).boundary(INPUT).tensors
    inputs = {tensor.name: np.random.default_rng(0).standard_normal(tensor.shape).astype(tensor.dtype)}
    if what == "speed":
        result = speeds(Path(folder), int(threads), inputs, int(repeats))
    else:
        result = resources(what, Path(folder), int(threads), inputs)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
