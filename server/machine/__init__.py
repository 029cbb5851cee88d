"""The federation machine: sans-IO, deterministic, driven by events that carry their own time."""

from fedge.server.machine.machine import Machine
from fedge.server.machine.state import ClientRecord, Federation, Stop, TaskRecord

__all__ = ["ClientRecord", "Federation", "Machine", "Stop", "TaskRecord"]
