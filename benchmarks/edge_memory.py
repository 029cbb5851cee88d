"""What the device's runtime takes beside plain onnxruntime on the same models: memory, loading, speed.

Plain is what everybody does: one file with the weights inside, all options as they come. Each figure of memory or
loading is of a fresh process; speed is of both runtimes in one process, run by run in turns, on one thread. The first
use on a machine, when fedge optimises the model, is shown apart, as is the check of the bundle's hashes, which plain
onnxruntime has not.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import onnx

from benchmarks.edge_memory_process import BUNDLE, FEDGE, MODEL, PLAIN
from benchmarks.harness import Goal, arguments, emit, goal, ratio
from benchmarks.light_models import bundled, weighted
from fedge.edge.bundle import WEIGHTS

FULL, QUICK = ("resnet50", "vgg19", "squeezenet", "shufflenet"), ("resnet50", "squeezenet")
TURNS, RUNS = {False: 5, True: 2}, {False: 40, True: 10}  # by whether it is quick
LARGE = 100e6  # bytes of weights from where on memory and loading are goals; below, they are little either way
SETTLED_S = 2.1  # after which the cache takes the word of a file's times

Line = dict[str, Any]


def child(what: str, folder: Path, repeats: int = 0) -> Line:
    """What a process of its own finds; on one thread."""
    command = [sys.executable, "-m", "benchmarks.edge_memory_process", what, str(folder), "1", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])} failed: {done.stderr.strip()}")
    found: Line = json.loads(done.stdout)
    return found


def made(name: str, folder: Path) -> int:
    """The model in both forms; the bytes of its weights."""
    folder.mkdir()
    model = weighted(name)
    onnx.save(model, folder / MODEL)
    bundled(model, folder / BUNDLE)
    return (folder / BUNDLE / WEIGHTS).stat().st_size


def compared(name: str, folder: Path, turns: int, runs: int) -> tuple[list[Line], Line]:
    """The lines of one model, and the ratios that goals are about."""
    size = made(name, folder)
    first = child(FEDGE, folder)
    time.sleep(SETTLED_S)
    child(FEDGE, folder)
    found: dict[str, list[Line]] = {FEDGE: [], PLAIN: []}
    for turn in range(turns):
        for runtime in (FEDGE, PLAIN) if turn % 2 else (PLAIN, FEDGE):
            found[runtime].append(child(runtime, folder))
    speed = child("speed", folder, runs)
    lines = [row(name, size, runtime, found[runtime], speed["seconds"][runtime]) for runtime in found]
    lines[0] |= {"first_use_ms": milliseconds(first["load_s"]), "apart": float(f"{speed['apart']:.1e}")}

    def times(what: str) -> float:
        return ratio((one[what] for one in found[PLAIN]), (one[what] for one in found[FEDGE]))

    slower = ratio(speed["seconds"][FEDGE], speed["seconds"][PLAIN])
    ratios = {"large": size >= LARGE, "memory": times("private"), "load": times("load_s"), "slower": slower}
    lines[0] |= {"memory_x": round(ratios["memory"], 1), "load_x": round(ratios["load"], 1), "run_x": round(slower, 3)}
    return lines, ratios


def row(name: str, size: int, runtime: str, found: list[Line], seconds: list[float]) -> Line:
    """One line of the result, in medians."""

    def middle(what: str) -> float | None:
        return median(one[what] for one in found) if what in found[0] else None

    return {
        "model": name,
        "weights_mib": round(size / 2**20, 1),
        "runtime": runtime,
        "load_ms": milliseconds(middle("load_s")),
        "private_mib": round((middle("private") or 0) / 2**20, 1),
        "mapped_mib": round((middle("mapped") or 0) / 2**20, 1),
        "first_run_ms": milliseconds(middle("first_run_s")),
        "run_ms": milliseconds(median(seconds)),
        "verify_ms": milliseconds(middle("verify_s")),
    }


def milliseconds(seconds: float | None) -> float | None:
    """Three digits of them."""
    return None if seconds is None else float(f"{seconds * 1e3:.3g}")


def goals(ratios: list[Line]) -> list[Goal]:
    """Judged by the worst model."""
    large = [one for one in ratios if one["large"]]
    memory, load = (min((one[what] for one in large), default=None) for what in ("memory", "load"))
    return [
        goal("times less private memory than onnxruntime, worst large model", memory, ">= 5"),
        goal("times faster to load than onnxruntime, worst large model", load, ">= 5"),
        goal(
            "run time over onnxruntime's, worst model", max((one["slower"] for one in ratios), default=None), "<= 1.05"
        ),
    ]


def main() -> None:
    options = arguments(__doc__.partition("\n")[0])
    shown: list[Line] = []
    ratios: list[Line] = []
    for name in QUICK if options.quick else FULL:
        with tempfile.TemporaryDirectory() as scratch:
            lines, found = compared(name, Path(scratch) / name, TURNS[options.quick], RUNS[options.quick])
        shown += lines
        ratios.append(found)
    emit("edge_memory", shown, goals(ratios), as_json=options.json)


if __name__ == "__main__":
    main()
