"""What each operator of a piece takes, out of onnxruntime's own profiling.

onnxruntime fuses operators, and runs them in layouts of its own; a kernel is charged to the tensor of the model that it
completes. A tensor that exists only inside a fused kernel costs nothing, and the last one of the kernel everything, so
sums are right between tensors where the model may well be cut. Owns that attribution. Must never time a piece as a
whole (see `measure`).
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from fedge.core.errors import DataError
from fedge.core.params import Array
from fedge.edge.bundle import Bundle
from fedge.edge.runtime.cache import GRAPH
from fedge.edge.runtime.nodes import Node, nodes
from fedge.edge.runtime.sessions import graph_of, options, prepared
from fedge.edge.runtime.tensors import check

BLOCKED = "_nchwc"  # onnxruntime names a kernel of blocked layout after its output and this
TIMED = "_kernel_time"


def profile_operators(
    folder: Path,
    bundle: Bundle,
    start: str,
    end: str,
    inputs: Mapping[str, Array],
    *,
    threads: int = 1,
    repeats: int = 20,
    cache: Path | None = None,
) -> tuple[tuple[str, float], ...]:
    """(output tensor, seconds) of every operator of the piece, in the order of the model; the minimum over runs.

    Raises DataError where no optimised piece can be kept, as that is what is measured; otherwise as `open_piece`.
    """
    piece = bundle.piece(start, end)
    check(piece.inputs, inputs)
    graph = graph_of(folder, bundle, piece.file)
    kept = prepared(folder, bundle, piece, graph, cache)
    if kept is None:
        raise DataError(
            "Operators can be timed only where optimised pieces can be kept; name a cache that is writable."
        )
    names = [tensor.name for tensor in piece.outputs]
    return attribute(nodes(graph), nodes((kept / GRAPH).read_bytes()), _trace(kept, names, inputs, threads, repeats))


def attribute(
    model: Sequence[Node], optimised: Sequence[Node], kernels: Sequence[tuple[str, float]]
) -> tuple[tuple[str, float], ...]:
    """Charge `kernels` (name, seconds; in the order of execution) to the first outputs of the model's operators.

    What belongs to none of them, a change of layout for one, goes to the kernel before it.
    """
    costs = {node.outputs[0]: 0.0 for node in model}
    tensors = {tensor: node.outputs[0] for node in model for tensor in node.outputs if tensor}
    named: dict[str, list[str]] = {}
    for node in optimised:
        named.setdefault(node.name, []).extend(tensors[tensor] for tensor in node.outputs if tensor in tensors)
    owners: list[str | None] = []
    for name, _ in kernels:
        found = named.get(name, [])
        owners.append(found[0] if len(set(found)) == 1 else tensors.get(name.removesuffix(BLOCKED)))
    owner = next(filter(None, owners), model[-1].outputs[0])  # of what comes before all that is known
    for known, (_, seconds) in zip(owners, kernels):
        owner = known or owner
        costs[owner] += seconds
    return tuple(costs.items())


def _trace(
    kept: Path, outputs: list[str], inputs: Mapping[str, Array], threads: int, repeats: int
) -> list[tuple[str, float]]:
    """The kernels of one run in order, each with its minimum over `repeats` runs, in seconds."""
    chosen = options(threads)
    chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as scratch:
        chosen.enable_profiling = True
        chosen.profile_file_prefix = str(Path(scratch) / "trace")
        session = onnxruntime.InferenceSession(str(kept / GRAPH), chosen, providers=["CPUExecutionProvider"])
        for _ in range(repeats):
            session.run(outputs, dict(inputs))
        try:
            events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"The profile cannot be kept in {scratch} ({error}); is the disk full?") from None
    least: dict[tuple[str, str], float] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(TIMED):
            key = (name.removesuffix(TIMED), event["args"].get("node_index", ""))
            least[key] = min(least.get(key, float("inf")), event["dur"] / 1e6)
    return [(name, seconds) for (name, _), seconds in least.items()]
