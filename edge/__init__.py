"""Inference on devices: split and early-exit models, tensor-parallel language models, the cloud side.

Never imports `fedge.server`, and needs no torch on a device; a device that only infers needs no onnx either. The parts
are `bundle` (the folder that is deployed), `split` (where a graph can be cut, and what that takes), `coding` (tensors
as bytes), `exits` (rules, calibration, training), `runtime` (sessions that hold little memory), `plan` (what to run
where) and `cloud` (tails over gRPC, and the session of a device that falls back by itself). The public names are loaded
when they are first used: a device pays only for its part.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedge.edge.bundle import load
    from fedge.edge.cloud.session import Answer, Session
    from fedge.edge.plan.planner import Bounds
    from fedge.edge.split.export import export
    from fedge.edge.split.graph import cuts, open_graph

__all__ = ["Answer", "Bounds", "Session", "cuts", "export", "load", "open_graph"]

# onnxruntime sends figures of its use home, from version 1.31 on; what runs at a hospital does not. Read at its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Answer": "fedge.edge.cloud.session",
    "Bounds": "fedge.edge.plan.planner",
    "Session": "fedge.edge.cloud.session",
    "cuts": "fedge.edge.split.graph",
    "export": "fedge.edge.split.export",
    "load": "fedge.edge.bundle",
    "open_graph": "fedge.edge.split.graph",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedge.edge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
