"""fedge: federated learning on slow, flaky and hostile devices.

The public names. Each is loaded when it is first used, so that a device or a coordinator pays only for its part.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedge.api import aggregate, simulate
    from fedge.build import load_experiment
    from fedge.core.errors import FedgeError, OurFault, TheirFault
    from fedge.core.params import Layout
    from fedge.core.task import Task, Update
    from fedge.experiment import Experiment
    from fedge.runs import Run, load_run

__version__ = importlib.metadata.version("fedge")

__all__ = [
    "Experiment",
    "FedgeError",
    "Layout",
    "OurFault",
    "Run",
    "Task",
    "TheirFault",
    "Update",
    "__version__",
    "aggregate",
    "load_experiment",
    "load_run",
    "simulate",
]

_HOMES = {
    "Experiment": "fedge.experiment",
    "FedgeError": "fedge.core.errors",
    "Layout": "fedge.core.params",
    "OurFault": "fedge.core.errors",
    "Run": "fedge.runs",
    "Task": "fedge.core.task",
    "TheirFault": "fedge.core.errors",
    "Update": "fedge.core.task",
    "aggregate": "fedge.api",
    "load_experiment": "fedge.build",
    "load_run": "fedge.runs",
    "simulate": "fedge.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
